"""The pool of pipes: a list for each hub, a locked one for all, and reclamation.

After HAProxy's pool (``src/pipe.c``: a thread's own list, then a locked global one) and Go's
(``sync.Pool``: what two collections in a row found unused is given up). The numbers of the policy
and their reasons are in :mod:`gsplice.config`.

One rule makes the lists safe in finalizers, collections and other threads without a lock: a pipe
belongs to whoever took it out of a list, and ``list.pop`` and ``list.remove`` are atomic. The lock
guards what depends on a count (is there room for one more?), never a descriptor.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any, Final

from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original

from ._linux import in_forked_child
from ._pipe import IDLE, UNKNOWN, Pipe, alive, closed_uses, make, reserve
from ._stats import counters
from .config import LOW_WATER, RECLAIM_PERIOD, Settings, settings

__all__ = ["IDLE", "UNKNOWN", "Pipe", "acquire", "census", "reclaim", "release"]

# Native, never gevent's. Re-entrant, as a finalizer or a signal handler that uses the pool may run
# while this very thread holds it.
_new_lock: Callable[[], Any] = get_original("_thread", "RLock")

_lock = _new_lock()
_shared: Final[list[Pipe]] = []
_counts: Final = {"acquired_global": 0, "acquired_new": 0, "closed_uses": 0}

# A native thread has one hub at a time, and finding what belongs to the thread takes half as long
# as finding the hub. _here.idle is the hub's list, _here.home its keeper.
_here: Any = get_original("_thread", "_local")()
_homes: Final[list[weakref.ref[_Home]]] = []
_room = 0  # settings.max_idle_hub when the thread first came here


def acquire() -> Pipe | None:
    """Lend an empty pipe; None when there is none to be had, and bytes must go another way.

    Looks in the hub's own list, newest first, then in the shared one, then asks the kernel. On
    exit the pipe is the caller's alone until :func:`release`, or until the last reference to it
    goes, which closes it. Never waits, never raises.
    """
    try:
        pipe: Pipe = _here.idle.pop()
    except (AttributeError, IndexError):
        return _acquire_elsewhere()
    pipe.uses += 1
    pipe.pending = 0
    return pipe


def release(pipe: Pipe) -> None:
    """Take back *pipe*: into the hub's list, or the shared one, or closed if both are full.

    A pipe whose ``pending`` is not 0 is not known to be empty: it is closed. Raises ValueError for
    a pipe that the pool has already: the second owner would mix its bytes with somebody else's.
    """
    try:
        idle = _here.idle
    except AttributeError:  # the first use in this thread
        idle = _settle().idle
    if pipe.pending or len(idle) >= _room:
        _release_elsewhere(pipe)
    else:
        pipe.pending = IDLE
        idle.append(pipe)


def _acquire_elsewhere() -> Pipe | None:
    _settle().watch()
    with _lock:
        try:
            pipe = _shared.pop()
        except IndexError:
            key = reserve(settings.max_pipes)
        else:
            _counts["acquired_global"] += 1
            pipe.uses += 1
            pipe.pending = 0
            return pipe
        if key is None:
            return None
        _counts["acquired_new"] += 1
        _add_up_closed()
    new = make(key)
    if new is None:
        with _lock:
            _counts["acquired_new"] -= 1
    return new


def _release_elsewhere(pipe: Pipe) -> None:
    if pipe.pending == IDLE:
        raise ValueError(f"{pipe!r} was released twice; it belongs to the pool already")
    if pipe.pending == 0:
        with _lock:
            if len(_shared) < settings.max_idle:
                pipe.pending = IDLE
                _shared.append(pipe)
                return
    pipe.close()


def _hand_over(
    idle: list[Pipe], shared: list[Pipe] = _shared, settings: Settings = settings
) -> None:
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
            pipe.discard()


class _Home:
    """Keeps one hub's list, and hands it over when the hub or the thread is gone."""

    __slots__ = ("__weakref__", "_hub", "_timer", "idle")

    def __init__(self) -> None:
        self.idle: list[Pipe] = []
        self._hub: Callable[[], Any] = lambda: None
        self._timer: Any = None
        _homes.append(weakref.ref(self, _homes.remove))

    def watch(self) -> None:
        """Have the hub look for pipes to reclaim, and learn of its end. Called in its thread."""
        hub = get_hub_if_exists()
        if hub is None or (self._timer is not None and self._hub() is hub):
            return
        idle, me = self.idle, weakref.ref(self)
        self._hub = weakref.ref(hub, lambda _: _hand_over(idle))
        self._timer = hub.loop.timer(RECLAIM_PERIOD, RECLAIM_PERIOD, ref=False)
        # The loop keeps a running timer alive, so its callback must not keep the list alive.
        self._timer.start(lambda: _on_timer(me))

    def rest(self) -> None:
        self._timer.stop()
        self._timer.close()
        self._timer = None

    def __del__(self, _hand_over: Callable[[list[Pipe]], None] = _hand_over) -> None:
        _hand_over(self.idle)


def _settle() -> _Home:
    """Return the keeper of this thread's list, made at the first call."""
    global _room
    try:
        return _here.home  # type: ignore[no-any-return]
    except AttributeError:
        _room = settings.max_idle_hub
        home = _here.home = _Home()
        _here.idle = home.idle
        return home


def reclaim() -> None:
    """Close the pipes that were idle at the last call and since, but leave LOW_WATER idle.

    Called after every full garbage collection and, while a hub runs, every RECLAIM_PERIOD seconds.
    Takes no lock: it may interrupt this thread inside :func:`acquire`.
    """
    lists = _idle_lists()
    spare = sum(map(len, lists)) - LOW_WATER
    for idle in lists:
        for pipe in tuple(idle):
            if pipe.seen != pipe.uses:
                pipe.seen = pipe.uses
            elif spare > 0:
                try:
                    idle.remove(pipe)
                except ValueError:  # its hub has just taken it
                    continue
                spare -= 1
                pipe.discard()


def _idle_lists() -> list[list[Pipe]]:
    homes = [home for ref in tuple(_homes) if (home := ref()) is not None]
    return [*(home.idle for home in homes), _shared]


def _open_pipes() -> set[Pipe]:
    """Return every open pipe. One that a finalizer has released is only found in its list."""
    found = {pipe for ref in alive.copy().values() if ref is not None and (pipe := ref())}
    return found.union(*_idle_lists())


def _on_gc(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        reclaim()


def _on_timer(me: weakref.ref[_Home]) -> None:
    reclaim()
    home = me()
    if home is not None and len(alive) <= LOW_WATER:
        home.rest()


def _after_fork_in_child() -> None:
    """Close the parent's pipes, idle or lent: with both at work on one, both lose bytes."""
    global _lock
    _lock = _new_lock()
    for pipe in _open_pipes():
        pipe.discard()
    alive.clear()
    for idle in _idle_lists():
        idle.clear()


def _add_up_closed() -> None:
    """Count the uses of the pipes that were closed since the last time. Called under the lock."""
    with contextlib.suppress(IndexError):
        while True:
            _counts["closed_uses"] += closed_uses.popleft()


def census() -> dict[str, int]:
    """Return the pool's part of :class:`gsplice.Stats`."""
    with _lock:
        _add_up_closed()
        now_open = len(alive)
        idle = sum(map(len, _idle_lists()))
        uses = _counts["closed_uses"] + sum(pipe.uses for pipe in _open_pipes())
        created, shared = _counts["acquired_new"], _counts["acquired_global"]
    return {
        "pipes_created": created,
        "pipes_closed": created - now_open,
        "pipes_in_use": now_open - idle,
        "pipes_idle": idle,
        "acquired_local": uses - created - shared,
        "acquired_global": shared,
        "acquired_new": created,
    }


gc.callbacks.append(_on_gc)
in_forked_child(_after_fork_in_child)
counters.pool = census
