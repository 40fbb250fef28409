"""What only Linux has, and stand-ins elsewhere, so that gsplice can be imported there.

statfs(2) and mincore(2) are called through ctypes, as the standard library has neither; without
ctypes they have no answer. Threads call them, and must not import anything: gevent patches the
locks of imports, and a thread that has to wait for one gets a hub of its own. So ctypes is imported
here, which takes 3 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, Final

#: If False, no object is recognised, so every call goes to the original function.
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

#: The C library, through ctypes; None without ctypes.
_libc: Any = None
if LINUX:
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        _Statfs = ctypes.c_long * 64
        _MAP_FAILED = ctypes.c_void_p(-1).value
        _all = ctypes.CDLL(None, use_errno=True)
        # Looked up and declared here as well: threads only call them.
        _all.fstatfs.argtypes = [ctypes.c_int, _Statfs]
        _all.mmap.restype = ctypes.c_void_p
        _all.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        _all.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        _all.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        _libc = _all

#: Flag of preadv2(2), Linux 4.14: fail with EAGAIN instead of waiting for a disk.
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
    """Map that range of *fd*; return the address, or None with the errno in ctypes.get_errno()."""
    address: int | None = _libc.mmap(None, size, protection, _MAP_SHARED, fd, offset)
    return None if address == _MAP_FAILED else address


def filesystem_type(fd: int) -> int | None:
    """Return the ``f_type`` of the filesystem that *fd* is on (statfs(2)); None if unknown."""
    if _libc is None:
        return None
    answer = _Statfs()
    return int(answer[0]) & 0xFFFFFFFF if _libc.fstatfs(fd, answer) == 0 else None


def can_be_mapped(fd: int) -> bool:
    """Return False if mmap(2) refuses *fd* with ENODEV. May wait for the filesystem.

    True without ctypes. Not by mmap.mmap(): that duplicates *fd*, and closing the duplicate drops
    the process's record locks (fcntl(2)).
    """
    if _libc is None:
        return True
    address = _map(fd, 1, _PROT_READ, 0)
    if address is None:
        return ctypes.get_errno() != errno.ENODEV
    _libc.munmap(address, 1)
    return True


def in_core(fd: int, offset: int, length: int) -> bool:
    """Return whether all of that range is in the page cache, and loaded, by mmap(2) and mincore(2).

    False if either fails. For a file that the user neither owns nor may write, the kernel calls
    every page resident (Linux 5.2): to find that out, ask about a page beyond the end first.
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
