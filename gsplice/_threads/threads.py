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

from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.lock import Semaphore
from greenlet import getcurrent

from .._counters import counters
from .._os.fork import forked_error, in_forked_child
from .._os.hub import hub_to_serve
from .._os.results import answer
from ..config import settings
from .job import Job, Loan

#: Where a hub keeps its threads. They end when they have been idle for as long as gevent's own may
#: be (``GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT``).
_ATTRIBUTE: Final = "_gsplice_threads"


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

        Returns what the job returns, or minus the errno of its OSError: what is raised here was
        thrown into the greenlet that waits. The job may be under way then, and *loans*, which are
        all that it uses, are the thread's: it closes them when the job ends.

        Jobs for one of the *devices* get half the threads at the most; whoever comes first is
        served first. If no thread can be started, the job is done here.
        """
        turn = frozenset(devices)
        greenlet = getcurrent()
        self.waiting.add(greenlet)
        try:
            self._wait_for_turn(turn)
            task = Job(job, fds, args, loans)
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
                        return answer(job, *fds, *args)
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


def _after_fork_in_child() -> None:
    """Have the greenlets that wait for a thread give up: in the child there is none.

    They are not switched to from here; the hub does that when it runs.
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


in_forked_child(_after_fork_in_child)
