"""Mixed transfers at full load with kills: nothing grows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ended_with
from paths import PYTHONPATH

HERE = Path(__file__).parent

#: How long the long one takes, in minutes, and where its plot goes: options of run.py.
MINUTES = float(os.environ.get("GSPLICE_SOAK_MINUTES", "20"))
PLOT = os.environ.get("GSPLICE_SOAK_PLOT")


def part(rows: list[dict[str, float]], name: str, first: float, last: float) -> list[float]:
    """Return the values of the rows from *first* to *last*, which are shares of the time."""
    return [row[name] for row in rows[int(first * len(rows)) : max(1, int(last * len(rows)))]]


@pytest.mark.parametrize(
    "minutes",
    [
        0.05,
        pytest.param(
            MINUTES, marks=[pytest.mark.long, pytest.mark.timeout(60 * MINUTES + 300)], id="long"
        ),
    ],
)
def test_nothing_grows(
    tmp_path: Path, minutes: float, record_property: Callable[[str, object], None]
) -> None:
    command = [sys.executable, str(HERE / "soak.py"), str(minutes), str(tmp_path / "figures")]
    if PLOT and minutes == MINUTES:
        command.append(PLOT)
    with ended_with(
        command, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": PYTHONPATH}
    ) as process:
        errors = process.communicate()[1].decode()
    assert (process.returncode, errors) == (0, "")
    figures: dict[str, Any] = json.loads((tmp_path / "figures").read_text())
    rows, stats = figures["rows"], figures["stats"]
    assert figures["strays"] == []
    assert stats["pipes_in_use"] == 0
    assert stats["pipes_created"] == stats["pipes_closed"] + stats["pipes_idle"]
    # The heap settles in the beginning; after that it may breathe, but not grow.
    before = statistics.median(part(rows, "resident MiB", 0.3, 0.5))
    after = statistics.median(part(rows, "resident MiB", 0.8, 1))
    assert after < 1.1 * before + 4, (before, after)
    if minutes >= 1:  # a few seconds' figures say nothing about these
        for name in ("descriptors", "pipe pages"):
            assert max(part(rows, name, 0.8, 1)) <= 1.3 * max(part(rows, name, 0, 0.8)), name
    # A guard, not a measure: a hub that waited for a disk or spun would be far beyond it.
    assert max(row["longest stall, ms"] for row in rows) < 5000
    record_property("cases", sum(figures["ended"].values()))
    for name, number in figures["ended"].items():
        record_property(name, number)
    record_property("resident MiB", f"{before:.0f} to {after:.0f}")
    p99 = statistics.median(row["stall p99, ms"] for row in rows)
    record_property("stall p99, ms", round(p99, 1))
    record_property("longest stall, ms", round(max(row["longest stall, ms"] for row in rows)))
