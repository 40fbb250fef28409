"""Duplicates of descriptors, which threads use: they stay valid when the first one is closed."""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
from collections.abc import Callable
from typing import Final

from gevent.monkey import get_original

from .._os.fork import in_forked_child
from .._os.linux import F_GETFL, F_OFD_GETLK, F_UNLCK, F_WRLCK, fcntl

_close: Callable[[int], None] = get_original("os", "close")

#: Every open duplicate, for a forked child to close: the thread that would does not exist there.
_alive: Final[dict[int, weakref.ref[Duplicate]]] = {}

#: Duplicates of files that somebody has locked: closing one would drop this process's own locks.
_kept: Final[list[Duplicate]] = []


class Duplicate:
    """A duplicate of a descriptor, valid for its owner whatever becomes of the first."""

    __slots__ = ("__weakref__", "fd", "lent")

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.lent = False
        self.fd = os.dup(fd)
        _alive[self.fd] = weakref.ref(self)

    def lend(self) -> None:
        """Leave it to a thread for good."""
        self.lent = True

    def close(self) -> None:
        """Close it, once, or when the file is no longer locked: see fcntl(2), Record locks.

        May wait: a FUSE filesystem is told of each close, and is asked about locks.
        """
        _kept.append(self)
        for each in [*_kept]:
            if each.fd < 0 or not _is_locked(each.fd):
                with contextlib.suppress(ValueError):  # another thread has just done it
                    _kept.remove(each)
                    each.drop()

    def drop(
        self,
        _forget: Callable[..., object] = _alive.pop,
        _close: Callable[[int], None] = _close,
    ) -> None:
        """Close it, once, whatever locks there are."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _forget(fd, None)
            with contextlib.suppress(OSError):  # the user's own close reports it
                _close(fd)

    __del__ = drop


def duplicate(fd: int) -> Duplicate:
    """Return a duplicate of *fd*, or one of the same file that had to be kept."""
    if _kept:
        file = _file(fd)
        for each in [*_kept]:
            if each.fd >= 0 and _file(each.fd) == file:
                with contextlib.suppress(ValueError):  # another thread has just taken it
                    _kept.remove(each)
                    each.lent = False
                    return each
    return Duplicate(fd)


def _file(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, fcntl(fd, F_GETFL)


def _is_locked(fd: int) -> bool:
    """Say whether any process has a record lock on the file that *fd* is open on."""
    try:
        answer = fcntl(fd, F_OFD_GETLK, _ANY_LOCK)
    except OSError:
        return False
    return bool(struct.unpack(_FLOCK, answer)[0] != F_UNLCK)


#: ``struct flock``: l_type, l_whence, l_start, l_len, l_pid. A write lock on all would meet any.
_FLOCK: Final = "hhqqi0q"
_ANY_LOCK: Final = struct.pack(_FLOCK, F_WRLCK, 0, 0, 0, 0)


def _drop_all() -> None:
    """Close the parent's duplicates: the threads that would do so do not exist in a child."""
    for ref in [*_alive.values()]:
        each = ref()
        if each is not None:
            each.drop()  # locks are the parent's


in_forked_child(_drop_all)
