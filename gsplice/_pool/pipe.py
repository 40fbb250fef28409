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

from .._os.linux import F_GETPIPE_SZ, F_SETPIPE_SZ, LINUX, SPLICE_FLAGS, fcntl
from ..config import KiB, MiB, settings

#: Capacity of a new pipe by how many are open already: (up to this many pipes, at most this many
#: bytes). An unprivileged user has 64 MiB of pipe room for all processes (``pipe-user-pages-soft``
#: in pipe(7), Linux 4.5: 16,384 pages). Filled to ``max_pipes`` these steps take
#: 16 x 1 MiB + 48 x 256 KiB + 192 x 64 KiB = 40 MiB of it.
CAPACITY_STEPS: Final = ((16, 1 * MiB), (64, 256 * KiB))

#: Past the last step a pipe has the kernel's default. One that is granted less has two slots (the
#: user's room is used up) and is not used: two system calls for 8 KiB cost more than read and send.
DEFAULT_CAPACITY: Final = 64 * KiB

#: The number of the device /dev/null, null(4).
_NULL_DEVICE: Final = os.makedev(1, 3)

#: Values of :attr:`Pipe.pending` that are no number of bytes.
UNKNOWN: Final = -1
IDLE: Final = -2

# gevent's version defers the close to the hub. Bound as defaults below, for finalizers that run
# while the interpreter takes the module apart.
_close: Callable[[int], None] = get_original("os", "close")

#: Every open pipe by its key; None while it is being made. ``len(alive)`` is how many there are.
alive: Final[dict[int, weakref.ref[Pipe] | None]] = {}

#: How often each closed pipe had been acquired, until somebody adds it up.
closed_uses: Final[deque[int]] = deque()

#: The keys of :data:`alive`, each used once.
keys: Final = itertools.count()


class IdleList:
    """The idle pipes of one thread, to which those return that were lent from there."""

    __slots__ = ("__weakref__", "idle", "room", "watched")

    def __init__(self) -> None:
        self.idle: list[Pipe] = []
        #: Most pipes in the list: few without a hub, none when the thread has ended.
        self.room = 0
        #: Whether a hub looks at the list from time to time.
        self.watched = False


class Pipe:
    """A pipe of the pool, both ends non-blocking and closed on exec.

    Dropping the last reference closes it. Nothing here waits or takes a lock, so that may happen
    in any thread and inside a garbage collection.
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
    #: What the kernel granted, in bytes. How much fits depends on how it is cut, as socket data
    #: takes a slot per segment: a full pipe may hold less or more.
    capacity: int
    #: Bytes known to be inside. 0 also means that the pipe may go back to the pool; UNKNOWN that a
    #: fill is under way or was interrupted, or that the pipe is closed; IDLE that the pool has it.
    pending: int
    #: Whose list it goes back to.
    home: IdleList
    #: Whether a thread that is still at work on it will close it.
    left_to_thread: bool
    #: Who made it.
    process: int
    #: How often it has been acquired, and how often it had been when reclamation last looked.
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
        """Give up what the pipe holds, as its owner can get the bytes again.

        On exit the pipe is empty; or it is not, as there is no /dev/null to be had, and the pool
        will close it.
        """
        dropped = 1
        with contextlib.suppress(OSError):
            while self.pending > 0 and dropped:
                dropped = os.splice(self.read_fd, _null(), self.pending, flags=SPLICE_FLAGS)
                self.pending -= dropped

    def leave_to_thread(self) -> None:
        """Leave it to a thread that is still at work on it, which will close it."""
        self.left_to_thread = True

    def close(
        self,
        _forget: Callable[..., object] = alive.pop,
        _close: Callable[[int], None] = _close,
        _closed_uses: deque[int] = closed_uses,
    ) -> None:
        """Close both ends, once: later calls, from whichever thread, do nothing.

        What the pipe still holds is lost. Raises nothing: close(2) releases the descriptor of a
        pipe whatever it returns.
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


#: Descriptors of /dev/null, kept for the life of the process: one, or more if threads raced.
_nulls: Final[list[int]] = []


def _null() -> int:
    """Return a descriptor of /dev/null. Lets out the error of opening that.

    Each time it is made sure that the number is still that of /dev/null: a program may close what
    it does not know, as daemons do, and bytes would go to whoever has the number then.
    """
    for fd in [*_nulls]:
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_rdev == _NULL_DEVICE:
                return fd
        with contextlib.suppress(ValueError):  # another thread has just done it
            _nulls.remove(fd)
    fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    _nulls.append(fd)
    return fd


def reserve(key: int, limit: int) -> bool:
    """Count *key* as a pipe to be made, unless *limit* are open. Called under a lock."""
    if len(alive) >= limit or not LINUX:
        return False
    alive[key] = None
    return True


def capacity_of(number: int) -> int:
    """Return the capacity to ask for the pipe that is the *number*-th open one, in bytes."""
    sizes = (size for most, size in CAPACITY_STEPS if number <= most)
    return min(settings.pipe_size, next(sizes, DEFAULT_CAPACITY))


def make(key: int, home: IdleList) -> Pipe | None:
    """Open the pipe that *key* was reserved for; None if there is none to be had.

    The kernel refuses with EMFILE, ENFILE or ENOMEM (pipe(2)), a sandbox with whatever it likes,
    and a user whose pipe room is used up gets two slots (pipe(7)), which are not worth having.
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
    except OSError:  # EPERM: past the user's room; the pipe stays as it was made
        pipe.capacity = fcntl(write_fd, F_GETPIPE_SZ)
    if pipe.capacity < min(wanted, DEFAULT_CAPACITY):
        pipe.uses = 0
        pipe.close()
        return None
    return pipe
