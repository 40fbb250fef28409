"""One pipe: the only owner of its two descriptors."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

from gevent.monkey import get_original

from .._os.linux import F_GETPIPE_SZ, F_SETPIPE_SZ, LINUX, fcntl
from .._os.results import answer, splice
from ..config import KiB, MiB, settings

#: Capacity of a new pipe by how many are open: (up to this many pipes, so many bytes each). An
#: unprivileged user has 64 MiB of pipe room for all processes (``pipe-user-pages-soft`` in pipe(7),
#: Linux 4.5: 16,384 pages). With ``max_pipes`` open, these steps take
#: 16 x 1 MiB + 48 x 256 KiB + 192 x 64 KiB = 40 MiB of it.
CAPACITY_STEPS: Final = ((16, 1 * MiB), (64, 256 * KiB))

#: The kernel's default, for pipes past the last step. One with less has two slots (the user's room
#: is used up) and is not used: splicing 8 KiB at a time costs more than read and send.
DEFAULT_CAPACITY: Final = 64 * KiB

#: The number of the device /dev/null, null(4).
_NULL_DEVICE: Final = os.makedev(1, 3)

#: Values of :attr:`Pipe.pending` that are not a number of bytes.
UNKNOWN: Final = -1
IDLE: Final = -2

# gevent's version defers the close to the hub. Bound as a default below, for finalizers that run at
# exit, when the module's globals are gone.
_close: Callable[[int], None] = get_original("os", "close")

#: Every open pipe by its key; None while it is being made. ``len(alive)`` is how many there are.
alive: Final[dict[int, weakref.ref[Pipe] | None]] = {}

#: The ``uses`` of each closed pipe, until the pool adds them up.
closed_uses: Final[deque[int]] = deque()

#: The keys of :data:`alive`, each used once.
keys: Final = itertools.count()


class IdleList:
    """The idle pipes of one thread; a pipe that was acquired in the thread returns there."""

    __slots__ = ("__weakref__", "idle", "room", "watched")

    def __init__(self) -> None:
        self.idle: list[Pipe] = []
        #: How many pipes the list may hold: few without a hub, none when the thread has ended.
        self.room = 0
        #: Whether a hub's timer reclaims its pipes.
        self.watched = False


class Pipe:
    """A pipe of the pool, both ends non-blocking and closed on exec.

    Dropping the last reference closes it. That may happen in any thread and during a garbage
    collection, because close() neither waits nor takes a lock.
    """

    __slots__ = (
        "__weakref__",
        "_key",
        "capacity",
        "home",
        "left_to_thread",
        "pending",
        "process",
        "read_fd",
        "uses",
        "uses_seen",
        "write_fd",
    )

    #: The descriptors; -1 once closed.
    read_fd: int
    write_fd: int
    #: What the kernel granted, in bytes. A full pipe may hold less or more, since each segment of a
    #: socket's data takes a slot, whatever its size.
    capacity: int
    #: How many bytes are inside; 0: the pipe may go back to the pool. UNKNOWN: a fill is under way
    #: or was interrupted, or the pipe is closed. IDLE: the pool has it.
    pending: int
    #: The list that it goes back to.
    home: IdleList
    #: Whether its greenlet was interrupted while a thread used it, so that the thread closes it.
    left_to_thread: bool
    #: The pid of the process that made it.
    process: int
    #: How often it has been acquired, and how often at the last reclamation.
    uses: int
    uses_seen: int

    def __init__(self, key: int, read_fd: int, write_fd: int) -> None:
        self._key = key
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.capacity = 0
        self.pending = 0
        self.left_to_thread = False
        self.process = os.getpid()
        self.uses = 1
        self.uses_seen = 0
        alive[key] = weakref.ref(self)

    def discard(self) -> None:
        """Splice what the pipe holds into /dev/null: its owner can read the bytes again.

        On exit ``pending`` is 0; or, if /dev/null can't be opened or refuses, it is what is left,
        and release() closes the pipe. Raises nothing.
        """
        dropped = 1
        while self.pending > 0 and dropped > 0:
            dropped = splice(self.read_fd, _null(), self.pending)
            self.pending -= max(0, dropped)

    def leave_to_thread(self) -> None:
        """Have the thread that still uses it close it when the job ends."""
        self.left_to_thread = True

    def close(
        self,
        _forget: Callable[..., object] = alive.pop,
        _close: Callable[[int], None] = _close,
        _closed_uses: deque[int] = closed_uses,
    ) -> None:
        """Close both ends, once: later calls, from any thread, do nothing.

        Bytes inside are lost. Lets out an error of close(2), by which the descriptor is released
        all the same.
        """
        read_fd, write_fd = self.read_fd, self.write_fd
        if _forget(self._key, None) is None:
            return
        try:
            self.read_fd = self.write_fd = self.pending = UNKNOWN
            _closed_uses.append(self.uses)
            _close(read_fd)
        finally:
            _close(write_fd)

    __del__ = close

    def __repr__(self) -> str:
        return (
            f"<Pipe {self.read_fd}<-{self.write_fd} capacity={self.capacity} "
            f"pending={self.pending} uses={self.uses}>"
        )


#: Descriptors of /dev/null, open for the life of the process: one, or more if threads raced.
_nulls: Final[list[int]] = []


def _null() -> int:
    """Return a descriptor of /dev/null; -1 if there is none, as in some chroots.

    Checks each time that the number still is /dev/null: a program may close descriptors that it
    does not know, as daemons do, and the bytes would go to whatever has the number next.
    """
    for known in [*_nulls]:
        if _is_null(known):
            return known
        with contextlib.suppress(ValueError):  # another thread has removed it
            _nulls.remove(known)
    fd: int = answer(os.open, os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    if fd >= 0 and not _is_null(fd):  # a file that somebody has put there
        _close(fd)
        return -1
    if fd >= 0:
        _nulls.append(fd)
    return fd


def _is_null(fd: int) -> bool:
    status = answer(os.fstat, fd)
    return not isinstance(status, int) and status.st_rdev == _NULL_DEVICE


def reserve(key: int, limit: int) -> bool:
    """Count *key* as open before make() is called; False if *limit* are. Called under a lock."""
    if len(alive) >= limit or not LINUX:
        return False
    alive[key] = None
    return True


def capacity_of(number: int) -> int:
    """Return the capacity in bytes to ask for, for the *number*-th open pipe."""
    sizes = (size for most, size in CAPACITY_STEPS if number <= most)
    return min(settings.pipe_size, next(sizes, DEFAULT_CAPACITY))


def make(key: int, home: IdleList) -> Pipe | None:
    """Open the pipe that *key* was reserved for; None if there is none worth having.

    The kernel refuses with EMFILE, ENFILE or ENOMEM (pipe(2)), a sandbox with any errno, and a user
    whose pipe room is used up gets a pipe of two slots (pipe(7)), which is closed again.
    """
    try:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pipe = Pipe(key, read_fd, write_fd)
    except OSError:
        return None
    pipe.home = home
    wanted = capacity_of(len(alive))
    try:
        pipe.capacity = fcntl(write_fd, F_SETPIPE_SZ, wanted)
    except OSError:  # EPERM: the user's room is used up; the capacity stays as it was
        pipe.capacity = fcntl(write_fd, F_GETPIPE_SZ)
    if pipe.capacity < min(wanted, DEFAULT_CAPACITY):
        pipe.uses = 0
        pipe.close()
        return None
    return pipe
