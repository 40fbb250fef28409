"""Worker processes: forked before anything runs, replaced when they die, and ended together.

The parent uses the functions that gevent has not patched, and has no hub: a hub, or a pipe of the
pool, would be the same one in every worker.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from gevent.monkey import get_original

_fork: Callable[[], int] = get_original("os", "fork")
_waitpid: Callable[[int, int], tuple[int, int]] = get_original("os", "waitpid")

_SIGNALS: Final = frozenset({signal.SIGCHLD, signal.SIGINT, signal.SIGTERM})

#: So many deaths more than there are workers, within so many seconds, are no accident.
DEATHS: Final = 5
DEATHS_PERIOD: Final = 10.0

#: Seconds that workers have to end what they are at.
PATIENCE: Final = 10.0


def prefork(
    number: int, work: Callable[[int, int], int], begun: Callable[[], None] = lambda: None
) -> int:
    """Have *work* done in *number* processes until SIGINT or SIGTERM comes; return the exit code.

    ``work(worker, lifeline)`` is called in each, with its number and a descriptor that is at its
    end when the parent has died, and returns the exit code. It is to end on SIGTERM. A worker that
    ends before is replaced, unless too many do. *begun* is called when all have been started, and
    signals are waited for.

    Returns in the parent only, when all workers have ended.
    """
    return _Parent(number, work).run(begun)


class _Parent:
    def __init__(self, number: int, work: Callable[[int, int], int]) -> None:
        self._number = number
        self._work = work
        self._workers: dict[int, int] = {}  # their numbers by process
        self._deaths: deque[float] = deque(maxlen=number + DEATHS)
        self._lifeline = os.pipe()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def run(self, begun: Callable[[], None]) -> int:
        try:
            for worker in range(self._number):
                self._start(worker)
            begun()
            while signal.sigwait(_SIGNALS) == signal.SIGCHLD:
                if not self._replace_the_dead():
                    return 1
            return 0
        finally:
            self._end()

    def _start(self, worker: int) -> None:
        sys.stdout.flush()
        process = _fork()
        if process:
            self._workers[process] = worker
        else:
            self._be(worker)

    def _be(self, worker: int) -> NoReturn:
        """Do the work, in the child, and end there: what follows in the stack is the parent's."""
        code = 1
        try:
            os.close(self._lifeline[1])
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the work has set its own
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._work(worker, self._lifeline[0])
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise  # which comes to nothing, as the process ends here
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _replace_the_dead(self) -> bool:
        """Start a worker for each that has ended; False if that makes no sense any more."""
        for process, worker, status in self._reap():
            _say(f"worker {process} {_ending(status)}")
            self._deaths.append(time.monotonic())
            often = len(self._deaths) == self._deaths.maxlen
            if often and self._deaths[-1] - self._deaths[0] < DEATHS_PERIOD:
                _say(f"{len(self._deaths)} workers ended within {DEATHS_PERIOD:.0f} s; giving up")
                return False
            self._start(worker)
        return True

    def _reap(self) -> list[tuple[int, int, int]]:
        """Forget the workers that have ended; return their processes, numbers and statuses."""
        ended: list[tuple[int, int, int]] = []
        while self._workers:
            process, status = _waitpid(-1, os.WNOHANG)
            if not process:
                break
            if process in self._workers:
                ended.append((process, self._workers.pop(process), status))
        return ended

    def _end(self) -> None:
        """End the workers; kill those that don't."""
        deadline = time.monotonic() + PATIENCE
        self._tell(signal.SIGTERM)
        while self._workers:
            left = deadline - time.monotonic()
            if left <= 0:
                self._tell(signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, max(left, 1))
            self._reap()

    def _tell(self, number: signal.Signals) -> None:
        for process in self._workers:
            os.kill(process, number)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _say(message: str) -> None:
    print(f"gsplice serve: {message}", file=sys.stderr, flush=True)
