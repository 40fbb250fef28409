"""What only Linux has, and stand-ins elsewhere, so that gsplice can be imported there.

Two questions have no function in the standard library: ctypes asks them, and where it is missing
there is no answer. They are asked on threads, which must not import anything: gevent makes the
locks of imports its own, and a thread that meets another at one makes a hub there. So ctypes is
imported here, which takes 3 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, Final

#: Elsewhere nothing is recognised, so every call goes to the original function.
LINUX: Final = sys.platform == "linux"

if sys.platform == "linux":
    from fcntl import (
        F_GETFL,
        F_GETPIPE_SZ,
        F_OFD_GETLK,
        F_SETPIPE_SZ,
        F_UNLCK,
        F_WRLCK,
        fcntl,
        ioctl,
    )
    from socket import AF_UNIX, MSG_MORE
    from termios import FIONREAD

    SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
else:
    F_OFD_GETLK = F_UNLCK = F_WRLCK = 0
    F_GETFL = F_GETPIPE_SZ = F_SETPIPE_SZ = FIONREAD = MSG_MORE = SPLICE_FLAGS = 0
    AF_UNIX = fcntl = ioctl = None

#: The C library, through ctypes; None where that is not to be had.
_libc: Any = None
if LINUX:
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        _Statfs = ctypes.c_long * 64
        _MAP_FAILED = ctypes.c_void_p(-1).value
        _all = ctypes.CDLL(None, use_errno=True)
        # All of them looked up and declared here, too: threads only call them.
        _all.fstatfs.argtypes = [ctypes.c_int, _Statfs]
        _all.mmap.restype = ctypes.c_void_p
        _all.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        _all.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        _all.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        _libc = _all

#: preadv(2), Linux 4.14: fail with EAGAIN instead of waiting for a disk.
RWF_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)

_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if LINUX else 4096
_PROT_NONE, _PROT_READ, _MAP_SHARED = 0, 1, 1

__all__ = [
    "AF_UNIX",
    "FIONREAD",
    "F_GETFL",
    "F_GETPIPE_SZ",
    "F_OFD_GETLK",
    "F_SETPIPE_SZ",
    "F_UNLCK",
    "F_WRLCK",
    "LINUX",
    "MSG_MORE",
    "RWF_NOWAIT",
    "SPLICE_FLAGS",
    "can_be_mapped",
    "fcntl",
    "filesystem_type",
    "in_core",
    "ioctl",
]


def _map(fd: int, size: int, protection: int, offset: int) -> int | None:
    """Map that range of *fd*; return where, or None with the reason in ctypes.get_errno()."""
    address: int | None = _libc.mmap(None, size, protection, _MAP_SHARED, fd, offset)
    return None if address == _MAP_FAILED else address


def filesystem_type(fd: int) -> int | None:
    """Return the ``f_type`` of the filesystem that *fd* is on (statfs(2)); None if unknown."""
    if _libc is None:
        return None
    answer = _Statfs()
    return int(answer[0]) & 0xFFFFFFFF if _libc.fstatfs(fd, answer) == 0 else None


def can_be_mapped(fd: int) -> bool:
    """Say whether mmap(2) does not refuse *fd* with ENODEV. May wait for the filesystem.

    True, too, where nobody can tell. mmap.mmap() would duplicate *fd*, and closing that drops the
    process's locks (fcntl(2)).
    """
    if _libc is None:
        return True
    address = _map(fd, 1, _PROT_READ, 0)
    if address is None:
        return ctypes.get_errno() != errno.ENODEV
    _libc.munmap(address, 1)
    return True


def in_core(fd: int, offset: int, length: int) -> bool:
    """Say whether all of that range is in the page cache and read: mmap(2) and mincore(2).

    False, too, where neither can tell. For a file that the user neither owns nor may write the
    kernel calls every page resident (Linux 5.2): ask about one beyond the end first.
    """
    if _libc is None:
        return False
    start = offset // _PAGE * _PAGE
    pages = (offset + length - start + _PAGE - 1) // _PAGE
    size = pages * _PAGE
    address = _map(fd, size, _PROT_NONE, start)
    if address is None:
        return False
    answer = ctypes.create_string_buffer(pages)
    try:
        return _libc.mincore(address, size, answer) == 0 and b"\0" not in answer.raw
    finally:
        _libc.munmap(address, size)
