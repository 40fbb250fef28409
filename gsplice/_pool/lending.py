"""Lending pipes and taking them back: the whole policy of the pool.

Modelled on HAProxy's pool (``src/pipe.c``: a thread's own list, then a locked global one) and Go's
(``sync.Pool``: what stays unused for two collections in a row is dropped). The lists, and the
closing of idle pipes, are in :mod:`gsplice._pool.idle`.
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

#: Seconds for which we don't ask the kernel for a pipe after it has refused one. Asking costs 12
#: us, and while the user's pipe room is used up, each transfer would ask many times.
REFUSED_PERIOD: Final = 0.1

# Guards decisions that depend on a count (is there room for one more?), never a descriptor. Native,
# not gevent's; re-entrant, because a finalizer or a signal handler may use the pool while its own
# thread holds the lock.
_new_lock: Callable[[], Any] = get_original("_thread", "RLock")
_lock = _new_lock()
_counts: Final = {"acquired_global": 0, "acquired_new": 0, "closed_uses": 0}

#: When we may ask the kernel again, in seconds of the monotonic clock.
_refused_until = 0.0

# The lists are by thread, not by hub: a thread has one hub at a time, and finding a thread-local
# takes half the time. _local.pop takes the newest pipe out of the thread's list (to look up the
# list and then its method takes 17 ns more), _local.keeper is its keeper.
_local: Any = get_original("_thread", "_local")()


def acquire() -> Pipe | None:
    """Lend an empty pipe; None if there is none to be had, and bytes must go another way.

    Looks in the hub's own list, newest first, then in the shared one, then asks the kernel. On
    exit the pipe belongs to the caller alone until :func:`release`; dropping the last reference
    closes it. Set ``pending`` to UNKNOWN before each system call that fills the pipe, and to the
    bytes inside after it: while it is 0, release() takes the pipe for empty. Never waits, never
    raises. Makes a hub in the main thread if that has none.
    """
    try:
        pipe: Pipe = _local.pop()
    except (AttributeError, IndexError):
        return _acquire_elsewhere()
    if pipe.read_fd < 0:  # closed after its release
        return acquire()
    pipe.uses += 1
    pipe.pending = 0
    return pipe


def release(pipe: Pipe) -> None:
    """Take *pipe* back: into the list of the hub that acquired it, or the shared one, or close it.

    If ``pending`` is not 0, the pipe may not be empty, and is closed. If it was left to a thread,
    nothing is done: the thread closes it. Raises ValueError if the pool has the pipe already: two
    later owners would mix their bytes.
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
        keeper.watch()  # only with a pipe: if no descriptor is left, making a hub would fail
    return pipe


def _acquire_shared() -> Pipe | None:
    with _lock:
        while shared:
            with contextlib.suppress(IndexError):  # reclamation has just taken the last
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
    finally:  # also if a signal handler raised on any line: the key must not stay reserved
        if alive.get(key) is None:
            alive.pop(key, None)


def _release_elsewhere(pipe: Pipe) -> None:
    """Share *pipe*, or close it if no hub's timer would reclaim it, unless a thread will."""
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
    """Return the keeper of this thread's list; makes it at the first call."""
    try:
        return _local.keeper  # type: ignore[no-any-return]
    except AttributeError:
        keeper = _local.keeper = Keeper()
        _local.pop = keeper.home.idle.pop
        return keeper


def _add_up_closed() -> None:
    """Add up the uses of the pipes closed since the last call. Called under the lock."""
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


#: For each fork under way, the lists and the pipes that were taken out of them.
_hidden: Final[list[list[tuple[list[Pipe], list[Pipe]]]]] = []


def _before_fork() -> None:
    """Empty the lists: in the child, a handler that runs before ours must get no pipe of these."""
    _hidden.append([])
    for idle in idle_lists():
        taken: list[Pipe] = []
        _hidden[-1].append((idle, taken))
        with contextlib.suppress(IndexError):
            while True:
                taken.insert(0, idle.pop())


def _after_fork_in_parent() -> None:
    for idle, taken in _hidden.pop():
        idle[:0] = taken  # in front: pipes released meanwhile are newer


def _after_fork_in_child() -> None:
    """Close the parent's pipes, idle or lent: parent and child would take each other's bytes."""
    global _lock
    _lock = _new_lock()
    for pipe in _open_pipes():
        if pipe.process != os.getpid():
            pipe.close()
    _hidden.clear()
    for key in [key for key, ref in alive.items() if ref is None or ref() is None]:
        alive.pop(key, None)


around_fork(_before_fork, _after_fork_in_parent)
in_forked_child(_after_fork_in_child)
counters.pool = _census
