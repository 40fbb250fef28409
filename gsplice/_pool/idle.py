"""The idle pipes: in which lists they are kept, and how they are given up.

One rule makes the lists safe in finalizers, collections and other threads without a lock: a pipe
belongs to whoever took it out of a list, and ``list.pop``, ``list.remove`` and ``list.append`` are
atomic. A list is walked as ``[*idle]``, never as ``tuple(idle)``, which allocates after it has
looked: a collection in between may shorten the list.
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

#: Idle pipes that reclamation leaves open, in the whole process: enough for a quiet server's next
#: requests, two megabytes of pipe room at the most.
LOW_WATER: Final = 4

#: Seconds between two looks at the idle pipes while a hub runs. A pipe that was idle at two looks
#: in a row and not used between them is closed, so idle pipes live 10 to 20 seconds.
RECLAIM_PERIOD: Final = 10.0

get_ident: Callable[[], int] = get_original("_thread", "get_ident")

#: The list that all hubs share. lending.py guards its room with a lock.
shared: Final[list[Pipe]] = []

#: Every thread's home, for as long as the thread lives.
homes: Final[list[weakref.ref[IdleList]]] = []

#: When a timer last had the lists looked at, in seconds of the monotonic clock.
_last_look: float = 0.0


def unwatch(home: IdleList) -> None:
    """Keep no more than reclamation would leave: without a hub no timer looks at the list."""
    home.room = min(LOW_WATER, settings.max_idle_hub)
    home.watched = False


def hand_over(idle: list[Pipe], shared: list[Pipe] = shared, settings: Settings = settings) -> None:
    """Move what is in *idle* to the shared list, as far as that has room, and close the rest.

    Takes no lock, and no name of this module: it runs in finalizers, even at exit.
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
    """Looks after a thread's list for as long as the thread lives."""

    __slots__ = ("_hub", "_timer", "home")

    def __init__(self) -> None:
        self.home = IdleList()
        unwatch(self.home)
        homes.append(weakref.ref(self.home, homes.remove))
        self._hub: Callable[[], Any] = lambda: None
        self._timer: Any = None

    def watch(self) -> bool:
        """Have the hub look for pipes to reclaim, and learn of its end; False if there is no hub.

        Called in its thread. The main thread gets a hub if it has none; another thread, which would
        have to destroy it, does not.
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
    """Close the pipes that were idle at the last call and since, but leave LOW_WATER idle.

    Called after every full garbage collection and, while a hub runs, every RECLAIM_PERIOD seconds.
    It may interrupt any line of this package, on a thread that holds any of its locks.
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
