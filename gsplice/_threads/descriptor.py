"""Duplicates of descriptors, for threads: they stay valid when the original is closed."""

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

#: Every open duplicate, for a forked child to close: the thread that would close it isn't there.
_alive: Final[dict[int, weakref.ref[Duplicate]]] = {}

#: Duplicates of locked files. Closing any descriptor of a file drops this process's locks on it, so
#: these are closed, or used again, later.
_kept_for_locks: Final[list[Duplicate]] = []


class Duplicate:
    """A duplicate of a descriptor, owned by one transfer, or by the thread it was left to."""

    __slots__ = ("__weakref__", "fd", "left_to_thread")

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.left_to_thread = False
        self.fd = os.dup(fd)
        _alive[self.fd] = weakref.ref(self)

    def leave_to_thread(self) -> None:
        """Have the thread close it when the job ends."""
        self.left_to_thread = True

    def close(self) -> None:
        """Close it, once, and those kept; keep each whose file is locked (fcntl(2), Record locks).

        May wait: a FUSE filesystem is told of each close, and is asked about locks.
        """
        _kept_for_locks.append(self)
        for each in [*_kept_for_locks]:
            if each.fd < 0 or not _is_locked(each.fd):
                with contextlib.suppress(ValueError):  # another thread has just done it
                    _kept_for_locks.remove(each)
                    each.close_now()

    def close_now(
        self,
        _forget: Callable[..., object] = _alive.pop,
        _close: Callable[[int], None] = _close,
    ) -> None:
        """Close it, once, even if that drops locks. Raises nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _forget(fd, None)
            with contextlib.suppress(OSError):  # the user's own close reports it
                _close(fd)

    __del__ = close_now


def duplicate(fd: int) -> Duplicate:
    """Return a duplicate of *fd*, kept or new. Lets out OSError if no descriptor is left."""
    if _kept_for_locks:
        file = _identity(fd)
        for each in [*_kept_for_locks]:
            if each.fd >= 0 and _identity(each.fd) == file:
                with contextlib.suppress(ValueError):  # another thread has just taken it
                    _kept_for_locks.remove(each)
                    each.left_to_thread = False
                    return each
    return Duplicate(fd)


def _identity(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, fcntl(fd, F_GETFL)


def _is_locked(fd: int) -> bool:
    """Return whether any process has a record lock on the file behind *fd*."""
    try:
        answer = fcntl(fd, F_OFD_GETLK, _ANY_LOCK)
    except OSError:
        return False
    return bool(struct.unpack(_FLOCK, answer)[0] != F_UNLCK)


#: ``struct flock``: l_type, l_whence, l_start, l_len, l_pid. A write lock conflicts with any other.
_FLOCK: Final = "hhqqi0q"
_ANY_LOCK: Final = struct.pack(_FLOCK, F_WRLCK, 0, 0, 0, 0)


def _drop_all() -> None:
    """Close the parent's duplicates, in a forked child."""
    for ref in [*_alive.values()]:
        each = ref()
        if each is not None:
            each.close_now()  # record locks are not inherited, so there are none to drop


in_forked_child(_drop_all)
