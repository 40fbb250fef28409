"""Native threads that work for one hub.

Not ``gevent.threadpool.ThreadPool``, which makes a watcher for each job and hands jobs over through
a queue written in Python. An empty job and back took 34 us of CPU time with that and takes 20 now,
under libuv 120 and 51.
"""

from __future__ import annotations

import contextlib
import sys
from _queue import Empty, SimpleQueue  # gevent.monkey replaces queue.SimpleQueue only
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from gevent.monkey import get_original

_start_thread: Final[Callable[..., int]] = get_original("_thread", "start_new_thread")

#: What the hub is to do when a job has ended, given its result and its error, or None.
Then = Callable[[Any, BaseException | None], object]
_Job = tuple[Callable[[], Any], Then]


class Workers:
    """As many threads as there are jobs at once; one that was idle for *idle* seconds ends.

    Below 0: it does not.
    """

    __slots__ = ("_alive", "_done", "_idle", "_loop", "_queue", "_unfinished", "_watcher")

    def __init__(self, hub: Any, idle: float) -> None:
        self._loop = hub.loop
        self._idle = None if idle < 0 else idle
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        #: One element for each thread: list.pop and list.append are atomic.
        self._alive: list[None] = []
        self._done: deque[tuple[Then, Any, BaseException | None]] = deque()
        self._unfinished = 0
        #: One watcher for all jobs: the threads wake the hub with it.
        self._watcher = hub.loop.async_(ref=False)
        self._watcher.start(self._hand_back)

    def __len__(self) -> int:
        """Return how many jobs have not ended."""
        return self._unfinished

    def start(self, job: Callable[[], Any], then: Then) -> bool:
        """Have a thread call *job*, and the hub *then*. Called on the hub; does not wait.

        Returns False if there is no thread and none can be started; then neither will be called.
        """
        self._unfinished += 1  # before a thread has the job, whatever a signal handler raises here
        self._watcher.ref = True  # the hub must not end for want of events
        self._queue.put((job, then))
        if self._unfinished > len(self._alive):
            try:
                self._start_thread()
            except (RuntimeError, MemoryError):
                if not self._alive and self._take_back():
                    self._note_ended()
                    return False
        return True

    def _start_thread(self) -> None:
        self._alive.append(None)
        try:
            _start_thread(_work, (self._queue, self._done, self._alive, self._watcher, self._idle))
        except BaseException:
            self._alive.pop()
            raise

    def _take_back(self) -> bool:
        """Return whether the job that was put last is still in the queue, which is empty then."""
        try:
            self._queue.get_nowait()
        except Empty:  # a thread that was about to end has it
            return False
        return True

    def _hand_back(self) -> None:
        """Have the loop call what comes after the jobs that have ended. Called on the hub.

        Not from here: under libuv no greenlet may run, and close a watcher, in this callback.
        """
        while self._done:
            self._note_ended()
            self._loop.run_callback(*self._done.popleft())

    def _note_ended(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            self._watcher.ref = False

    def close(self) -> None:
        """Close the watcher, in a forked child, where there are no threads. Called on the hub."""
        self._watcher.close()


def _work(
    queue: SimpleQueue[_Job],
    done: deque[tuple[Then, Any, BaseException | None]],
    alive: list[None],
    watcher: Any,
    idle: float | None,
) -> None:
    """Do jobs until there is none for *idle* seconds. Runs on a thread."""
    threading = sys.modules.get("threading")
    if threading is not None:  # as in its own threads
        profile, trace = threading.getprofile(), threading.gettrace()
        sys.setprofile(profile)
        sys.settrace(trace)
    while True:
        try:
            found = queue.get(True, idle)
        except Empty:
            alive.pop()  # before looking again: start() puts a job first, and counts threads then
            try:
                found = queue.get_nowait()
            except Empty:
                return
            alive.append(None)
        job, then = found
        result = error = None
        try:
            result = job()
        except BaseException as err:  # noqa: BLE001 raised again in the greenlet
            error = err
        done.append((then, result, error))
        del found, job, then, result, error  # not to be kept until the next job comes
        with contextlib.suppress(Exception):  # the hub has gone: each loop has its own error then
            watcher.send()
