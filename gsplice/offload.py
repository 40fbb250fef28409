"""The threads that wait for disks, a few for each hub, and what they own while they do.

gevent's own pool (``hub.threadpool``) is left alone: DNS lookups live there, and should not queue
behind a slow disk.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Protocol

from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.monkey import get_original
from greenlet import getcurrent

from ._linux import in_forked_child
from ._stats import counters
from .config import settings

_close: Callable[[int], None] = get_original("os", "close")

#: Where a hub keeps its threads. They end when they have been idle for as long as gevent's own may
#: be (``GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT``).
_ATTRIBUTE: Final = "_gsplice_threads"


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class Loan(Protocol):
    """Something of the greenlet's that a thread uses as well, such as a pipe."""

    #: Whether the thread has it for good, as its greenlet has ended first.
    lent: bool

    def close(self) -> None:
        """Give it up."""


def run(
    key: Hashable,
    files: Sequence[_HasDescriptor],
    job: Callable[..., Any],
    *args: Any,
    loan: Loan | None = None,
) -> Any:
    """Do ``job(*descriptors of files, *args)`` on a thread while the hub serves others.

    Returns what the job returns, and its OSError, too, instead of raising it: what is raised here
    was thrown into the greenlet that waits, or comes from ``fileno()``. The job may be under way
    then. It works on duplicates of the descriptors, which are its own, and *loan* is the thread's
    from then on: it is closed when the job ends.

    Jobs of one *key* (a filesystem) get half the threads at the most; whoever comes first is served
    first. Without a hub that could serve others meanwhile, without a descriptor left, and with the
    policy ``never``, the job is done here.
    """
    hub = hub_to_serve()
    if hub is None or settings.offload == "never":
        return _outcome(job, [file.fileno() for file in files], args)
    return _threads(hub).run(key, files, job, args, loan)


def hub_to_serve() -> Any:
    """Return the hub that can run others while this greenlet waits; None if there is none."""
    if sys.is_finalizing():  # there are no greenlets any more, and asking for one is an error
        return None
    hub = get_hub_if_exists()
    return None if hub is getcurrent() else hub


#: Every open duplicate, for a forked child to close: the thread that would does not exist there.
_alive: Final[dict[int, weakref.ref[Descriptor]]] = {}


class Descriptor:
    """A duplicate of a descriptor, valid for its owner whatever becomes of the first."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.fd = os.dup(fd)
        _alive[self.fd] = weakref.ref(self)

    def close(
        self,
        _forget: Callable[..., object] = _alive.pop,
        _close: Callable[[int], None] = _close,
    ) -> None:
        """Close it, once. May wait: a FUSE filesystem is told of each close."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _forget(fd, None)
            _close(fd)

    __del__ = close


def _outcome(job: Callable[..., Any], fds: list[int], args: tuple[Any, ...]) -> Any:
    try:
        return job(*fds, *args)
    except OSError as err:
        return err.with_traceback(None)  # whose frames hold on to what the job used


class _Task:
    """A job on its way to a thread and back, which the greenlet may give up at any time.

    A token in a list is taken by exactly one side, as ``list.pop`` is atomic. Who takes the first
    decides whether the job begins; who does not get the last has to clean up.
    """

    __slots__ = ("_args", "_first", "_job", "_last", "_loan", "_owned")

    def __init__(
        self, owned: list[Descriptor], job: Callable[..., Any], args: Any, loan: Loan | None
    ) -> None:
        self._owned = owned
        self._job = job
        self._args = args
        self._loan = loan
        self._first, self._last = [None], [None]

    def __call__(self) -> Any:
        """Do the job. Called on the thread."""
        try:
            if not _take(self._first):
                return None
            return _outcome(self._job, [each.fd for each in self._owned], self._args)
        finally:
            for each in self._owned:
                each.close()
            loan, self._loan, self._args = self._loan, None, ()  # the thread's frame may live on
            if not _take(self._last) and loan is not None:
                loan.close()

    def give_up(self) -> None:
        """Leave the loan to the thread, if that is using it. Called on the hub."""
        loan = self._loan
        if not _take(self._first) and _take(self._last) and loan is not None:
            loan.lent = True


def _take(tokens: list[None]) -> bool:
    try:
        tokens.pop()
    except IndexError:
        return False
    return True


class Threads:
    """The threads of one hub, and who waits for one."""

    __slots__ = ("_pool", "_queue", "_running", "waiting")

    def __init__(self, hub: Any) -> None:
        from gevent import config
        from gevent.threadpool import ThreadPool  # which imports concurrent.futures

        idle = config.threadpool_idle_task_timeout
        self._pool = ThreadPool(settings.threads, hub=hub, idle_task_timeout=idle)
        self._queue: deque[tuple[Hashable, Event]] = deque()
        self._running: Counter[Hashable] = Counter()
        #: The greenlets that wait, for a thread or for the end of their job.
        self.waiting: set[Any] = set()

    def run(
        self,
        key: Hashable,
        files: Sequence[_HasDescriptor],
        job: Callable[..., Any],
        args: tuple[Any, ...],
        loan: Loan | None,
    ) -> Any:
        """Have *job* done by a thread, and wait for it. See :func:`run`."""
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            self._wait_for_turn(key)
            try:
                try:
                    owned = [Descriptor(file.fileno()) for file in files]
                except OSError:  # no descriptor left
                    self._end_turn(key)
                    return _outcome(job, [file.fileno() for file in files], args)
                task = _Task(owned, job, args, loan)
                result = self._pool.spawn(task)  # does not wait, as there is a thread for it
            except BaseException:
                self._end_turn(key)
                raise
            counters.add("offloads", 1)
            result.rawlink(lambda _: self._end_turn(key))
            try:
                return result.get()
            except BaseException:
                task.give_up()
                raise
        finally:
            self.waiting.discard(greenlet)

    def _may_run(self, key: Hashable) -> bool:
        threads = settings.threads
        return self._running.total() < threads and self._running[key] < (threads + 1) // 2

    def _wait_for_turn(self, key: Hashable) -> None:
        if not any(waiting == key for waiting, _ in self._queue) and self._may_run(key):
            self._running[key] += 1
            return
        place = key, Event()
        self._queue.append(place)
        try:
            place[1].wait()
        except BaseException:
            if place[1].is_set():
                self._end_turn(key)
            else:
                self._queue.remove(place)
            raise

    def _end_turn(self, key: Hashable) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        for place in [*self._queue]:
            if self._may_run(place[0]):
                self._queue.remove(place)
                self._running[place[0]] += 1
                place[1].set()


def _threads(hub: Any) -> Threads:
    try:
        return hub.__dict__[_ATTRIBUTE]  # type: ignore[no-any-return]
    except KeyError:
        threads = hub.__dict__[_ATTRIBUTE] = Threads(hub)
        return threads


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
            descriptor.close()
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
