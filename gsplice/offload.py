"""The threads that wait for disks, a few for each hub, and what they own while they do.

gevent's own pool (``hub.threadpool``) is left alone: DNS lookups live there, and should not queue
behind a slow disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, Protocol

from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.monkey import get_original
from greenlet import getcurrent

from ._linux import F_GETFL, F_OFD_GETLK, F_UNLCK, F_WRLCK, fcntl, in_forked_child
from ._stats import counters
from .config import settings

_close: Callable[[int], None] = get_original("os", "close")

#: Where a hub keeps its threads. They end when they have been idle for as long as gevent's own may
#: be (``GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT``).
_ATTRIBUTE: Final = "_gsplice_threads"


class Loan(Protocol):
    """Something of the greenlet's that a thread uses as well: a pipe, a duplicate."""

    #: Whether the thread has it for good, as its greenlet has ended first.
    lent: bool

    def lend(self) -> None:
        """Leave it to the thread for good. Called on the hub."""

    def close(self) -> None:
        """Give it up. Called on the thread, if it was left to that."""


def hub_to_serve() -> Any:
    """Return the hub that can run others while this greenlet waits; None if there is none."""
    if sys.is_finalizing():  # there are no greenlets any more, and asking for one is an error
        return None
    hub = get_hub_if_exists()
    return None if hub is getcurrent() else hub


def threads() -> Threads | None:
    """Return the threads of this greenlet's hub; None where nobody could run meanwhile.

    None, too, as long as no descriptor is left to import gevent's pool with.
    """
    hub = None if settings.offload == "never" else hub_to_serve()
    if hub is None:
        return None
    made: Threads | None = hub.__dict__.get(_ATTRIBUTE)
    if made is None:
        with contextlib.suppress(OSError):
            made = hub.__dict__[_ATTRIBUTE] = Threads(hub)
    return made


def here(job: Callable[..., Any], fds: Sequence[int], args: tuple[Any, ...]) -> Any:
    """Do ``job(*fds, *args)``; return what it returns, its OSError too."""
    try:
        return job(*fds, *args)
    except OSError as err:
        return err.with_traceback(None)  # whose frames hold on to what the job used


#: Every open duplicate, for a forked child to close: the thread that would does not exist there.
_alive: Final[dict[int, weakref.ref[Descriptor]]] = {}

#: Duplicates of files that somebody has locked: closing one would drop this process's own locks.
_kept: Final[list[Descriptor]] = []


class Descriptor:
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


def duplicate(fd: int) -> Descriptor:
    """Return a duplicate of *fd*, or one of the same file that had to be kept."""
    if _kept:
        file = _file(fd)
        for each in [*_kept]:
            if each.fd >= 0 and _file(each.fd) == file:
                with contextlib.suppress(ValueError):  # another thread has just taken it
                    _kept.remove(each)
                    each.lent = False
                    return each
    return Descriptor(fd)


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


class _Task:
    """A job on its way to a thread and back, which the greenlet may give up at any time.

    A token in a list is taken by exactly one side, as ``list.pop`` is atomic. Who takes the first
    decides whether the job begins; who does not get the last has to clean up.
    """

    __slots__ = ("_args", "_fds", "_first", "_job", "_last", "_loans")

    def __init__(
        self, job: Callable[..., Any], fds: Sequence[int], args: Any, loans: Sequence[Loan]
    ) -> None:
        self._job = job
        self._fds = fds
        self._args = args
        self._loans = loans
        self._first, self._last = [None], [None]

    def __call__(self) -> Any:
        """Do the job. Called on the thread."""
        if not _take(self._first):
            return None
        try:
            return here(self._job, self._fds, self._args)
        finally:
            is_ours = not _take(self._last)  # before the loans are forgotten: see give_up()
            loans, self._loans, self._args = self._loans, (), ()  # the thread's frame may live on
            if is_ours:
                for loan in loans:
                    loan.close()

    def give_up(self) -> bool:
        """Leave the loans to the thread, if it is using them; say whether it began. On the hub."""
        loans = self._loans
        if _take(self._first):
            return False
        if _take(self._last):
            for loan in loans:
                loan.lend()
        return True


def _take(tokens: list[None]) -> bool:
    try:
        tokens.pop()
    except IndexError:
        return False
    return True


class TurnToWrite:
    """The right to have a thread write to a file, which lasts as long as that writes."""

    __slots__ = ("_hub", "_semaphore", "lent")

    def __init__(self, hub: Any, semaphore: Semaphore) -> None:
        self._hub = hub
        self._semaphore = semaphore
        self.lent = False

    def lend(self) -> None:
        """Leave it to a thread for good."""
        self.lent = True

    def end(self) -> None:
        """End it. Called on the hub."""
        self._semaphore.release()

    def close(self) -> None:
        """End it. Called on a thread."""
        self._hub.loop.run_callback_threadsafe(self._semaphore.release)


class Threads:
    """The threads of one hub, and who waits for one."""

    __slots__ = ("_busy", "_pool", "_queue", "_running", "_writers", "waiting")

    def __init__(self, hub: Any) -> None:
        from gevent import config
        from gevent.threadpool import ThreadPool  # which imports concurrent.futures

        idle = config.threadpool_idle_task_timeout
        self._pool = ThreadPool(settings.threads, hub=hub, idle_task_timeout=idle)
        self._queue: deque[tuple[frozenset[int], Event]] = deque()
        #: How many jobs are under way, and how many of them for each device.
        self._busy = 0
        self._running: Counter[int] = Counter()
        self._writers: weakref.WeakValueDictionary[Hashable, Semaphore] = (
            weakref.WeakValueDictionary()
        )
        #: The greenlets that wait, for a thread or for the end of their job.
        self.waiting: set[Any] = set()

    def run(
        self,
        devices: Iterable[int],
        job: Callable[..., Any],
        fds: Sequence[int],
        args: tuple[Any, ...],
        loans: Sequence[Loan],
    ) -> Any:
        """Do ``job(*fds, *args)`` on a thread while the hub serves others.

        Returns what the job returns, and its OSError, too, instead of raising it: what is raised
        here was thrown into the greenlet that waits. The job may be under way then, and *loans*,
        which are all that it uses, are the thread's: it closes them when the job ends.

        Jobs for one of the *devices* get half the threads at the most; whoever comes first is
        served first. If no thread can be started, the job is done here.
        """
        turn = frozenset(devices)
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            self._wait_for_turn(turn)
            task = _Task(job, fds, args, loans)
            result = None
            try:
                result = self._pool.spawn(task)  # does not wait, as there is a thread for it
                result.rawlink(lambda _: self._end_turn(turn))
                counters.add("offloads", 1)
                return result.get()
            except BaseException as err:
                begun = task.give_up()
                if result is None:
                    self._end_turn(turn)
                    if not begun and isinstance(err, (RuntimeError, MemoryError)):
                        return here(job, fds, args)
                raise
        finally:
            self.waiting.discard(greenlet)

    def turn_to_write(self, file: Hashable) -> TurnToWrite:
        """Wait until no thread writes to *file*; return what ends the turn that begins then."""
        semaphore = self._writers.get(file)
        if semaphore is None:
            semaphore = self._writers[file] = Semaphore()
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            semaphore.acquire()
        finally:
            self.waiting.discard(greenlet)
        return TurnToWrite(self._pool.hub, semaphore)

    def _may_run(self, turn: frozenset[int]) -> bool:
        threads = settings.threads
        most = (threads + 1) // 2
        return self._busy < threads and all(self._running[device] < most for device in turn)

    def _wait_for_turn(self, turn: frozenset[int]) -> None:
        if self._may_run(turn):  # no one in the queue may
            self._begin_turn(turn)
            return
        place = turn, Event()
        self._queue.append(place)
        try:
            place[1].wait()
        except BaseException:
            if place[1].is_set():
                self._end_turn(turn)
            else:
                self._queue.remove(place)
            raise

    def _begin_turn(self, turn: frozenset[int]) -> None:
        self._busy += 1
        self._running.update(turn)

    def _end_turn(self, turn: frozenset[int]) -> None:
        self._busy -= 1
        self._running.subtract(turn)
        self._running += Counter()  # forgets the devices that nobody uses
        for place in [*self._queue]:
            if self._may_run(place[0]):
                self._queue.remove(place)
                self._begin_turn(place[0])
                place[1].set()


def forked() -> OSError:
    """Return the error of a transfer in a forked child, whose parent had started it."""
    return OSError(
        errno.ECANCELED, "transfer was under way in the parent process when this one was forked"
    )


def _after_fork_in_child() -> None:
    """Have the greenlets that wait for a thread give up: in the child there is none.

    They are not switched to from here; the hub does that when it runs.
    """
    for ref in [*_alive.values()]:
        descriptor = ref()
        if descriptor is not None:
            descriptor.drop()  # locks are the parent's
    hub = get_hub_if_exists()
    threads = hub.__dict__.pop(_ATTRIBUTE, None) if hub is not None else None
    if threads is None:
        return

    def give_up(greenlet: Any) -> None:
        if greenlet in threads.waiting:
            greenlet.throw(forked())

    for greenlet in threads.waiting:
        hub.loop.run_callback(give_up, greenlet)


in_forked_child(_after_fork_in_child)
