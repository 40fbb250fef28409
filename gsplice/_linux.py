"""What only Linux has, and stand-ins elsewhere, so that gsplice can be imported there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

#: Elsewhere nothing is recognised, so every call goes to the original function.
LINUX: Final = sys.platform == "linux"

if sys.platform == "linux":
    from fcntl import F_GETFL, F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl, ioctl
    from socket import AF_UNIX

    SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
else:
    F_GETFL = F_GETPIPE_SZ = F_SETPIPE_SZ = SPLICE_FLAGS = 0
    AF_UNIX = fcntl = ioctl = None

__all__ = [
    "AF_UNIX",
    "F_GETFL",
    "F_GETPIPE_SZ",
    "F_SETPIPE_SZ",
    "LINUX",
    "SPLICE_FLAGS",
    "fcntl",
    "in_forked_child",
    "ioctl",
]


def in_forked_child(handler: Callable[[], Any]) -> None:
    """Have *handler* called in every child process that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=handler)
