"""The figures that the server's page shows: gsplice's counters, and what only the server knows.

Of several workers each notes its own in memory that they share, so that the one that is asked can
answer for all.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import gevent

import gsplice

#: Seconds after the last question for which the figures count as watched.
WATCHED: Final = 5.0
#: Seconds between two notes of a worker, when nobody watches and when somebody does.
IDLE_PERIOD: Final = 1.0
BUSY_PERIOD: Final = 0.25

#: Seconds that a greenlet sleeps to find out how late it is woken, and for how long the longest
#: delay is remembered, at least.
NAP: Final = 0.01
WINDOW: Final = 1.0


class Figures:
    """The figures of all workers. Made before they are forked; :meth:`begin` is called in each."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._board = _Board(workers)
        self._worker = 0
        self._under_way = 0
        self._stall = _StallMeter()

    def begin(self, worker: int) -> None:
        """Be the worker of that number, and keep its figures up to date if there are others."""
        self._worker = worker
        self._board.write(worker, self._own())
        if self.workers > 1:
            gevent.spawn(self._keep_noting)

    @contextlib.contextmanager
    def response(self) -> Iterator[None]:
        """Count a response as under way."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def watch(self) -> dict[str, Any]:
        """Return the figures of all workers together; measure stalls for the next few seconds.

        ``gsplice.stats()``, summed, and ``responses`` under way, ``hub_stall``, the longest delay
        of any hub in the last second or two, in seconds, and how many ``workers`` there are.
        """
        self._board.watched = time.monotonic()
        self._note()
        total: Counter[str] = Counter()
        fallbacks: Counter[str] = Counter()
        hub_stall = 0.0
        for figures in self._board.read():
            fallbacks.update(figures.pop("fallbacks"))
            hub_stall = max(hub_stall, figures.pop("hub_stall"))
            total.update(figures)
        return {
            **total,
            "fallbacks": dict(sorted(fallbacks.items())),
            "hub_stall": hub_stall,
            "workers": self.workers,
        }

    def _own(self) -> dict[str, Any]:
        longest = self._stall.longest()
        return {
            **gsplice.stats().as_dict(),
            "responses": self._under_way,
            "hub_stall": longest,
        }

    def _note(self) -> None:
        self._stall.measure_until(self._board.watched + WATCHED)
        self._board.write(self._worker, self._own())

    def _keep_noting(self) -> None:
        while True:
            self._note()
            watched = time.monotonic() < self._board.watched + WATCHED
            gevent.sleep(BUSY_PERIOD if watched else IDLE_PERIOD)


class _StallMeter:
    """A greenlet that sleeps for a moment and notes how late it wakes, while that is asked for.

    As late as it is woken, so late is every other greenlet of the hub whose socket is ready.
    """

    def __init__(self) -> None:
        self._greenlet: gevent.Greenlet | None = None
        self._end = 0.0
        self._windows = (0.0, 0.0)  # the longest delay of the last window and of this one

    def measure_until(self, end: float) -> None:
        """Measure until that time of the monotonic clock."""
        self._end = end
        if not self._greenlet and time.monotonic() < end:
            self._greenlet = gevent.spawn(self._measure)

    def longest(self) -> float:
        """Return the longest delay in the last second or two, in seconds."""
        return max(self._windows)

    def _measure(self) -> None:
        began = now = time.monotonic()
        while now < self._end:
            gevent.sleep(NAP)
            woken = time.monotonic()
            last, longest = self._windows
            self._windows = last, max(longest, woken - now - NAP)
            if woken - began > WINDOW:
                began = woken
                self._windows = self._windows[1], 0.0
            now = woken
        self._windows = (0.0, 0.0)


class _Board:
    """A note of each worker that all workers can read: memory that processes share by forking.

    A note is written twice over in turn, and one byte tells which of the two is whole.
    """

    _NOTE = 4096
    _WATCHED = struct.Struct("d")

    def __init__(self, workers: int) -> None:
        self._workers = workers
        size = (1 + 2 * workers) * self._NOTE
        # A single one keeps it to itself: whoever forks it then has not asked for anything shared.
        self._memory = bytearray(size) if workers == 1 else mmap.mmap(-1, size)

    def write(self, worker: int, figures: dict[str, Any]) -> None:
        """Put *figures* in place of what the worker had noted."""
        which = 1 - self._memory[self._WATCHED.size + worker]
        text = json.dumps(figures).encode().ljust(self._NOTE)
        begin = (1 + 2 * worker + which) * self._NOTE
        self._memory[begin : begin + self._NOTE] = text
        self._memory[self._WATCHED.size + worker] = which

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield what each worker that has begun has noted last."""
        for worker in range(self._workers):
            which = self._memory[self._WATCHED.size + worker]
            begin = (1 + 2 * worker + which) * self._NOTE
            text = self._memory[begin : begin + self._NOTE].strip(b"\0")
            if text:
                yield json.loads(text)

    @property
    def watched(self) -> float:
        """When the figures were last asked for, by the monotonic clock, which all share."""
        return float(self._WATCHED.unpack_from(self._memory)[0])

    @watched.setter
    def watched(self, now: float) -> None:
        self._WATCHED.pack_into(self._memory, 0, now)
