"""The lists of idle pipes, and how pipes that stay idle are closed (reclamation).

Finalizers, collections and other threads use the lists without a lock, by one rule: whoever takes a
pipe out of a list owns it, and ``list.pop``, ``list.remove`` and ``list.append`` are atomic. Walk a
list as ``[*idle]``, never as ``tuple(idle)``, which allocates after it has read the length: a
collection at that moment may shorten the list.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

from gevent._hub_local import get_hub_if_exists
from gevent.hub import MAIN_THREAD_IDENT, get_hub
from gevent.monkey import get_original

from ..config import Settings, settings
from .pipe import IdleList, Pipe

#: How many idle pipes reclamation leaves open in the process: enough for a quiet server's next
#: requests, and at most two megabytes of pipe room.
LOW_WATER: Final = 4

#: Seconds between two reclamations while a hub runs. One closes the pipes that have been idle since
#: the one before, so a pipe stays idle for 10 to 20 seconds.
RECLAIM_PERIOD: Final = 10.0

get_ident: Callable[[], int] = get_original("_thread", "get_ident")

#: The list that all hubs share. lending.py guards its length with a lock.
shared: Final[list[Pipe]] = []

#: Every thread's list, for as long as the thread lives.
homes: Final[list[weakref.ref[IdleList]]] = []

#: When a timer last called reclaim(), in seconds of the monotonic clock.
_last_look: float = 0.0


def unwatch(home: IdleList) -> None:
    """Limit *home* to what reclamation leaves open: without a hub, no timer calls that."""
    home.room = min(LOW_WATER, settings.max_idle_hub)
    home.watched = False


def hand_over(idle: list[Pipe], shared: list[Pipe] = shared, settings: Settings = settings) -> None:
    """Move the pipes in *idle* to the shared list while that has room; close the others.

    Takes no lock, and uses no global name, since finalizers call it, even at exit.
    """
    while True:
        try:
            pipe = idle.pop()
        except IndexError:
            return
        if len(shared) < settings.max_idle:
            shared.append(pipe)
        else:
            pipe.close()


class Keeper:
    """Owns a thread's list: has its hub reclaim idle pipes, and empties it when the thread ends."""

    __slots__ = ("_hub", "_timer", "home")

    def __init__(self) -> None:
        self.home = IdleList()
        unwatch(self.home)
        homes.append(weakref.ref(self.home, homes.remove))
        self._hub: Callable[[], Any] = lambda: None
        self._timer: Any = None

    def watch(self) -> bool:
        """Have this thread's hub call reclaim() from time to time; return False if it has none.

        Makes a hub in the main thread if that has none. Not in another thread, which would have to
        destroy it.
        """
        hub = get_hub_if_exists()
        if hub is None:
            if get_ident() != MAIN_THREAD_IDENT:
                return False
            try:
                hub = get_hub()
            except (OSError, SystemError):  # no descriptors for its loop
                return False
        if self._timer is not None and self._hub() is hub:
            return True
        home = self.home

        def hub_ended(_: object) -> None:
            unwatch(home)
            hand_over(home.idle)

        self._hub = weakref.ref(hub, hub_ended)
        home.room = settings.max_idle_hub
        home.watched = True
        self._timer = hub.loop.timer(RECLAIM_PERIOD, RECLAIM_PERIOD, ref=False)
        self._timer.start(_on_timer)
        return True

    def __del__(self, _hand_over: Callable[[list[Pipe]], None] = hand_over) -> None:
        self.home.room = 0
        self.home.watched = False
        _hand_over(self.home.idle)


def _on_timer() -> None:
    global _last_look
    now = time.monotonic()
    if now - _last_look > 0.9 * RECLAIM_PERIOD:  # each hub has a timer; one of them is enough
        _last_look = now
        reclaim()


def _on_gc(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        reclaim()


gc.callbacks.append(_on_gc)


def reclaim() -> None:
    """Close the pipes that have been idle since the last call, but leave LOW_WATER open.

    Called after every full garbage collection and, while a hub runs, every RECLAIM_PERIOD seconds.
    So it may run between any two lines of this package, with any of its locks held.
    """
    lists = idle_lists()
    spare = sum(map(len, lists)) - LOW_WATER
    for idle in lists:
        for pipe in [*idle]:
            if pipe.uses_seen != pipe.uses:
                pipe.uses_seen = pipe.uses
            elif spare > 0:
                try:
                    idle.remove(pipe)
                except ValueError:  # its hub has just taken it
                    continue
                spare -= 1
                pipe.close()


def idle_lists() -> list[list[Pipe]]:
    """Return every list of idle pipes."""
    return [*(home.idle for ref in [*homes] if (home := ref()) is not None), shared]
