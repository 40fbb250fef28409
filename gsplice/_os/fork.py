"""What happens when the process forks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any


def in_forked_child(handler: Callable[[], Any]) -> None:
    """Have *handler* called in every child process that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=handler)


def around_fork(before: Callable[[], Any], in_parent: Callable[[], Any]) -> None:
    """Have both called in every process that forks from now on, before and after it does."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent)


def forked_error() -> OSError:
    """Return the error of a transfer in a forked child, whose parent had started it."""
    return OSError(
        errno.ECANCELED, "transfer was under way in the parent process when this one was forked"
    )
