"""Lending pipes and taking them back: the whole policy of the pool.

After HAProxy's pool (``src/pipe.c``: a thread's own list, then a locked global one) and Go's
(``sync.Pool``: what two collections in a row found unused is given up). The lists, and how idle
pipes are given up, are in :mod:`gsplice._pool.idle`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from gevent.monkey import get_original

from .._counters import counters
from .._os.fork import around_fork, in_forked_child
from ..config import settings
from .idle import Keeper, idle_lists, shared
from .pipe import IDLE, IdleList, Pipe, alive, closed_uses, keys, make, reserve

#: Seconds for which the kernel is not asked for a pipe after it has refused one: that costs 12 us,
#: and where a user's room is used up each transfer would ask many times.
REFUSED_PERIOD: Final = 0.1

# Guards what depends on a count (is there room for one more?), never a descriptor. Native, never
# gevent's; re-entrant, as a finalizer or a signal handler that uses the pool may run while this
# very thread holds it.
_new_lock: Callable[[], Any] = get_original("_thread", "RLock")
_lock = _new_lock()
_counts: Final = {"acquired_global": 0, "acquired_new": 0, "closed_uses": 0}

#: Until when the kernel is not asked for a pipe, as it has just refused one.
_refused_until = 0.0

# A native thread has one hub at a time, and finding what belongs to the thread takes half as long
# as finding the hub. _local.idle is its list, _local.keeper looks after that.
_local: Any = get_original("_thread", "_local")()


def acquire() -> Pipe | None:
    """Lend an empty pipe; None when there is none to be had, and bytes must go another way.

    Looks in the hub's own list, newest first, then in the shared one, then asks the kernel. On
    exit the pipe is the caller's alone until :func:`release`, or until the last reference to it
    goes, which closes it. Set ``pending`` to UNKNOWN before each system call that fills the pipe,
    and to what is inside after it: with 0 the pipe would be lent again. Never waits, never raises;
    the main thread gets a hub if it has none.
    """
    try:
        pipe: Pipe = _local.idle.pop()
    except (AttributeError, IndexError):
        return _acquire_elsewhere()
    if pipe.read_fd < 0:  # closed after its release
        return acquire()
    pipe.uses += 1
    pipe.pending = 0
    return pipe


def release(pipe: Pipe) -> None:
    """Take back *pipe*: into the list of the hub that acquired it, or the shared one, or close it.

    A pipe whose ``pending`` is not 0 is not known to be empty: it is closed. One that is ``lent``
    to a thread is left to the thread. Raises ValueError for
    a pipe that the pool has already: the second owner would mix its bytes with somebody else's.
    """
    home = pipe.home
    idle = home.idle
    if pipe.pending or pipe.left_to_thread or len(idle) >= home.room:
        _release_elsewhere(pipe)
    else:
        pipe.pending = IDLE
        idle.append(pipe)


def _acquire_elsewhere() -> Pipe | None:
    keeper = _keeper()
    pipe = _acquire_shared() or _acquire_new(keeper.home)
    if pipe is not None:
        pipe.home = keeper.home
        keeper.watch()  # not before: without a descriptor left, no hub can be made either
    return pipe


def _acquire_shared() -> Pipe | None:
    with _lock:
        while shared:
            with contextlib.suppress(IndexError):  # reclamation has just taken it
                pipe = shared.pop()
                if pipe.read_fd >= 0:
                    _counts["acquired_global"] += 1
                    pipe.uses += 1
                    pipe.pending = 0
                    return pipe
    return None


def _acquire_new(home: IdleList) -> Pipe | None:
    global _refused_until
    if monotonic() < _refused_until:
        return None
    key = next(keys)
    try:
        with _lock:
            if not reserve(key, settings.max_pipes):
                return None
            _add_up_closed()
        pipe = make(key, home)
        if pipe is None:
            _refused_until = monotonic() + REFUSED_PERIOD
        else:
            with _lock:
                _counts["acquired_new"] += 1
        return pipe
    finally:  # a signal handler may have raised on any line
        if alive.get(key) is None:
            alive.pop(key, None)


def _release_elsewhere(pipe: Pipe) -> None:
    """Share *pipe* or close it: where no hub looks, nobody would give it up when it is old."""
    if pipe.pending == IDLE:
        raise ValueError(f"{pipe!r} was released twice; it belongs to the pool already")
    if pipe.left_to_thread:
        return
    if pipe.pending == 0 and (pipe.home.watched or _keeper().watch()):
        with _lock:
            if len(shared) < settings.max_idle:
                pipe.pending = IDLE
                shared.append(pipe)
                return
    pipe.close()


def _keeper() -> Keeper:
    """Return the keeper of this thread's list, made at the first call."""
    try:
        return _local.keeper  # type: ignore[no-any-return]
    except AttributeError:
        keeper = _local.keeper = Keeper()
        _local.idle = keeper.home.idle
        return keeper


def _add_up_closed() -> None:
    """Count the uses of the pipes that were closed since the last time. Called under the lock."""
    with contextlib.suppress(IndexError):
        while True:
            _counts["closed_uses"] += closed_uses.popleft()


def _open_pipes() -> list[Pipe]:
    return [pipe for ref in alive.copy().values() if ref is not None and (pipe := ref())]


def _census() -> dict[str, int]:
    """Return the pool's part of :class:`gsplice.Stats`."""
    with _lock:
        _add_up_closed()
        now_open = len(alive)
        idle = sum(pipe.read_fd >= 0 for idle in idle_lists() for pipe in [*idle])
        uses = _counts["closed_uses"] + sum(pipe.uses for pipe in _open_pipes())
        created, from_shared = _counts["acquired_new"], _counts["acquired_global"]
    return {
        "pipes_created": created,
        "pipes_closed": created - now_open,
        "pipes_in_use": now_open - idle,
        "pipes_idle": idle,
        "acquired_local": uses - created - from_shared,
        "acquired_global": from_shared,
        "acquired_new": created,
    }


#: For each fork under way, the lists and what was taken out of them.
_aside: Final[list[list[tuple[list[Pipe], list[Pipe]]]]] = []


def _before_fork() -> None:
    """Put idle pipes out of reach: a handler that runs in the child before ours may want one."""
    _aside.append([])
    for idle in idle_lists():
        taken: list[Pipe] = []
        _aside[-1].append((idle, taken))
        with contextlib.suppress(IndexError):
            while True:
                taken.insert(0, idle.pop())


def _after_fork_in_parent() -> None:
    for idle, taken in _aside.pop():
        idle[:0] = taken  # what has been released meanwhile is newer


def _after_fork_in_child() -> None:
    """Close the parent's pipes, idle or lent: with both at work on one, both lose bytes."""
    global _lock
    _lock = _new_lock()
    for pipe in _open_pipes():
        if pipe.process != os.getpid():
            pipe.close()
    _aside.clear()
    for key in [key for key, ref in alive.items() if ref is None or ref() is None]:
        alive.pop(key, None)


around_fork(_before_fork, _after_fork_in_parent)
in_forked_child(_after_fork_in_child)
counters.pool = _census
