"""The threads of each hub that wait for disks.

gevent's own pool (``hub.threadpool``) is left alone: DNS lookups live there, and should not queue
behind a slow disk.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final

from gevent import config
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.hub import Waiter
from gevent.lock import Semaphore
from greenlet import getcurrent

from .._counters import counters
from .._os.fork import forked_error, in_forked_child
from .._os.hub import hub_to_serve
from .._os.results import answer_of_job
from ..config import settings
from .job import Job, Resource
from .workers import Workers

#: The attribute of a hub that holds its threads. An idle thread ends when one of gevent's own would
#: (``GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT``).
_ATTRIBUTE: Final = "_gsplice_threads"


def threads() -> Threads | None:
    """Return the threads of this greenlet's hub; None where a job is to be done without one.

    That is where ``offload`` is "never", where no other greenlet could run meanwhile, and as long
    as no descriptor is left for a watcher.
    """
    hub = None if settings.offload == "never" else hub_to_serve()
    if hub is None:
        return None
    made: Threads | None = hub.__dict__.get(_ATTRIBUTE)
    if made is None:
        with contextlib.suppress(OSError):
            made = hub.__dict__[_ATTRIBUTE] = Threads(hub)
    return made


class WriteLock:
    """Held while a thread writes to a file, so that no other greenlet moves its position."""

    __slots__ = ("_hub", "_semaphore", "left_to_thread")

    def __init__(self, hub: Any, semaphore: Semaphore) -> None:
        self._hub = hub
        self._semaphore = semaphore
        self.left_to_thread = False

    def leave_to_thread(self) -> None:
        """Have the thread release it when the job ends."""
        self.left_to_thread = True

    def release(self) -> None:
        """Let the next greenlet write. Called on the hub."""
        self._semaphore.release()

    def close(self) -> None:
        """Have the hub release it. Called on the thread that it was left to."""
        self._hub.loop.run_callback_threadsafe(self._semaphore.release)


class Threads:
    """The threads of one hub, and the queue of greenlets that want one."""

    __slots__ = ("_busy", "_hub", "_queue", "_running", "_workers", "_writers", "waiting")

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._workers = Workers(hub, config.threadpool_idle_task_timeout)
        self._queue: deque[tuple[frozenset[int], Event]] = deque()
        #: How many jobs have a thread, and how many of them use each device.
        self._busy = 0
        self._running: Counter[int] = Counter()
        self._writers: weakref.WeakValueDictionary[Hashable, Semaphore] = (
            weakref.WeakValueDictionary()
        )
        #: Greenlets that wait for a thread, for their job, or for a write lock.
        self.waiting: set[Any] = set()

    def run(
        self,
        devices: Iterable[int],
        job: Callable[..., Any],
        fds: Sequence[int],
        args: tuple[Any, ...],
        resources: Sequence[Resource],
        begin: Callable[[], object] | None = None,
    ) -> Any:
        """Do ``job(*fds, *args)`` on a thread while the hub serves others.

        Returns what the job returns, or minus the errno of its OSError. Lets out only what is
        thrown into the waiting greenlet. If the job is under way then, *resources* (all that it
        uses) are left to the thread, which closes them when the job ends.

        Jobs that use one of the *devices* get at most half the threads; first come, first served.
        If no thread can be started, the job is done in this greenlet. *begin*, if given, is called
        here when it is the job's turn; it neither waits nor raises.
        """
        used = frozenset(devices)
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            self._wait_for_slot(used)
            task = Job(job, fds, args, resources)
            ended: Any = Waiter(self._hub)

            def end(result: Any, error: BaseException | None) -> None:
                self._free_slot(used)
                if error is None:
                    ended.switch(result)
                else:
                    ended.throw(error)

            try:
                if begin is not None:
                    begin()
                if self._workers.start(task, end):
                    counters.add("offloads", 1)
                    return ended.get()
            except BaseException:  # from a signal handler it may come on any line
                task.give_up()
                raise
            self._free_slot(used)
            return answer_of_job(job, *fds, *args)
        finally:
            self.waiting.discard(greenlet)

    def write_lock(self, file: Hashable) -> WriteLock:
        """Wait until no thread writes to *file*; return the lock, which the caller then holds."""
        semaphore = self._writers.get(file)
        if semaphore is None:
            semaphore = self._writers[file] = Semaphore()
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            semaphore.acquire()
        finally:
            self.waiting.discard(greenlet)
        return WriteLock(self._hub, semaphore)

    def forget_workers(self) -> None:
        """Have the loop not wait for jobs, in a forked child. Called on the hub."""
        self._workers.close()

    def _may_run(self, devices: frozenset[int]) -> bool:
        threads = settings.threads
        most = (threads + 1) // 2
        return self._busy < threads and all(self._running[device] < most for device in devices)

    def _wait_for_slot(self, devices: frozenset[int]) -> None:
        if self._may_run(devices):  # overtakes nobody: _free_slot() left only jobs that may not
            self._take_slot(devices)
            return
        place = devices, Event()
        self._queue.append(place)
        try:
            place[1].wait()
        except BaseException:
            if place[1].is_set():
                self._free_slot(devices)
            else:
                self._queue.remove(place)
            raise

    def _take_slot(self, devices: frozenset[int]) -> None:
        self._busy += 1
        for device in devices:
            self._running[device] += 1

    def _free_slot(self, devices: frozenset[int]) -> None:
        self._busy -= 1
        for device in devices:
            self._running[device] -= 1
            if not self._running[device]:
                del self._running[device]
        for place in [*self._queue]:
            if self._may_run(place[0]):
                self._queue.remove(place)
                self._take_slot(place[0])
                place[1].set()


def _after_fork_in_child() -> None:
    """End the waits of a forked child's greenlets, since its parent's threads don't exist there.

    The hub switches to them when it runs next, not this handler.
    """
    hub = get_hub_if_exists()
    threads = hub.__dict__.pop(_ATTRIBUTE, None) if hub is not None else None
    if threads is None:
        return

    def give_up(greenlet: Any) -> None:
        if greenlet in threads.waiting:
            greenlet.throw(forked_error())

    for greenlet in threads.waiting:
        hub.loop.run_callback(give_up, greenlet)
    hub.loop.run_callback(threads.forget_workers)


in_forked_child(_after_fork_in_child)
