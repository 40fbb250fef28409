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
    """Have *before* and *in_parent* called around each fork from now on, in the forking process."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent)


def forked_error() -> OSError:
    """Return the error that ends, in a forked child, a transfer of its parent's."""
    return OSError(
        errno.ECANCELED, "transfer was under way in the parent process when this one was forked"
    )
