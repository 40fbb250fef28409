"""The threads that wait for disks, a few for each hub, and what they own while they do.

gevent's own pool (``hub.threadpool``) is left alone: DNS lookups live there, and should not queue
behind a slow disk.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Final

from gevent._hub_local import get_hub_if_exists
from gevent.lock import Semaphore
from gevent.monkey import get_original
from greenlet import getcurrent

from ._linux import in_forked_child
from ._stats import counters
from .config import settings

_close: Callable[[int], None] = get_original("os", "close")

#: Where a hub keeps its threads; they end with it.
_ATTRIBUTE: Final = "_gsplice_threads"


def run(key: Hashable, fds: tuple[int, ...], job: Callable[..., Any], *args: Any) -> Any:
    """Do ``job(*fds, *args)`` on a thread while the hub serves others; return what it returns.

    An OSError of the job is returned, too: what is raised here was thrown into the greenlet that
    waits, and the job may still be under way then. It works on duplicates of *fds*, which are its
    own, and should keep a reference to whatever else it uses. Jobs of one *key* (a filesystem) get
    half the threads at the most, in the order in which they came.

    Without a hub that could serve others meanwhile, or a descriptor left, the job is done here.
    """
    hub = hub_to_serve()
    if hub is None:
        return _outcome(job, fds, args)
    try:
        owned = [Descriptor(fd) for fd in fds]
    except OSError:
        return _outcome(job, fds, args)
    counters.add("offloads", 1)
    return _threads(hub).run(key, owned, job, args)


#: Every open duplicate, for a forked child to close: the thread that would does not exist there.
_alive: Final[dict[int, weakref.ref[Descriptor]]] = {}


class Descriptor:
    """A duplicate of a descriptor, valid for its owner whatever becomes of the first.

    Closing on the hub could have that wait (a FUSE filesystem is told of each close), so the thread
    does it; dropping the last reference does it too.
    """

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
        """Close it, once."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _forget(fd, None)
            _close(fd)

    __del__ = close


def _outcome(job: Callable[..., Any], fds: tuple[int, ...], args: tuple[Any, ...]) -> Any:
    try:
        return job(*fds, *args)
    except OSError as err:
        return err.with_traceback(None)  # whose frames hold on to what the job used


def _owned_outcome(job: Callable[..., Any], owned: list[Descriptor], args: tuple[Any, ...]) -> Any:
    try:
        return _outcome(job, tuple(descriptor.fd for descriptor in owned), args)
    finally:
        for descriptor in owned:
            descriptor.close()


def hub_to_serve() -> Any:
    """Return the hub that can run others while this greenlet waits; None if there is none."""
    if sys.is_finalizing():  # there are no greenlets any more, and asking for one is an error
        return None
    hub = get_hub_if_exists()
    return None if hub is getcurrent() else hub


class Threads:
    """The threads of one hub."""

    __slots__ = ("_lanes", "_pool", "waiting")

    def __init__(self, hub: Any) -> None:
        from gevent import config
        from gevent.threadpool import ThreadPool  # which imports concurrent.futures

        idle = config.threadpool_idle_task_timeout
        self._pool = ThreadPool(settings.threads, hub=hub, idle_task_timeout=idle)
        self._lanes: weakref.WeakValueDictionary[Hashable, Semaphore] = (
            weakref.WeakValueDictionary()
        )
        #: The greenlets that wait for a thread.
        self.waiting: set[Any] = set()

    def run(
        self, key: Hashable, owned: list[Descriptor], job: Callable[..., Any], args: Any
    ) -> Any:
        """Have *job* done by a thread, and wait for it. See :func:`run`."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Semaphore((settings.threads + 1) // 2)
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            lane.acquire()
            try:
                result = self._pool.spawn(_owned_outcome, job, owned, args)
            except BaseException:
                lane.release()
                raise
            # The greenlet may be killed before its job has ended.
            result.rawlink(lambda _: lane.release())
            return result.get()
        finally:
            self.waiting.discard(greenlet)


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
