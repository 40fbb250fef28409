"""Where things lie, and what a program needs that imports what the tests do."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PROJECT = TESTS.parent
APPS = TESTS / "support" / "apps"

PYTHONPATH = os.pathsep.join(map(str, [TESTS / "support", TESTS, TESTS / "faults", PROJECT]))
