"""What only Linux has, and stand-ins elsewhere, so that gsplice can be imported there.

Two questions have no function in the standard library; ctypes, which may be missing and takes a
while to import, is imported when the first of them is asked.
"""

from __future__ import annotations

import functools
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

#: preadv(2), Linux 4.14: fail with EAGAIN instead of waiting for a disk.
RWF_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)

_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if LINUX else 4096
_CACHESTAT: Final = 451  # of all architectures but alpha

__all__ = [
    "AF_UNIX",
    "F_GETFL",
    "F_GETPIPE_SZ",
    "F_SETPIPE_SZ",
    "LINUX",
    "RWF_NOWAIT",
    "SPLICE_FLAGS",
    "cached",
    "fcntl",
    "filesystem_type",
    "in_forked_child",
    "ioctl",
]


def in_forked_child(handler: Callable[[], Any]) -> None:
    """Have *handler* called in every child process that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=handler)


@functools.cache
def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    libc.syscall.argtypes += [ctypes.c_uint]
    libc.syscall.restype = ctypes.c_long
    return libc


def filesystem_type(fd: int) -> int | None:
    """Return the ``f_type`` of the filesystem that *fd* is on (statfs(2)); None if unknown."""
    try:
        import ctypes

        answer = (ctypes.c_long * 64)()
        return int(answer[0]) & 0xFFFFFFFF if _libc().fstatfs(fd, answer) == 0 else None
    except (ImportError, OSError, AttributeError):
        return None


def cached(fd: int, offset: int, length: int) -> bool | None:
    """Say whether all of that range is in the page cache; None if the kernel does not tell.

    cachestat(2), Linux 6.5; since 6.14 it answers only for files that the user owns or may write.
    """
    try:
        import ctypes

        pages = (offset + length + _PAGE - 1) // _PAGE - offset // _PAGE
        span, answer = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()
        done = _libc().syscall(_CACHESTAT, fd, span, answer, 0)
    except (ImportError, OSError, AttributeError):
        return None
    return bool(answer[0] >= pages) if done == 0 else None
