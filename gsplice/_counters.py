"""Counters: how many bytes went which way, so that users see whether the fast way ran."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from gevent.monkey import get_original

from ._os.fork import in_forked_child

_RLock: Callable[[], Any] = get_original("_thread", "RLock")

#: How many fallbacks are noted before they are added up: so many take a few kilobytes.
MOST_NEW_REASONS: Final = 512


@dataclasses.dataclass(frozen=True)
class Stats:
    """What gsplice has done in this process since it was imported: an immutable snapshot.

    A forked child starts from its parent's figures, with the parent's pipes counted as closed.
    """

    #: Pipes made and closed so far, lent now, and idle now (in the hubs' lists and the shared one).
    #: ``created == closed + in_use + idle`` while no other thread acquires or releases.
    pipes_created: int
    pipes_closed: int
    pipes_in_use: int
    pipes_idle: int
    #: Pipes acquired from the hub's own list, from the list that all hubs share, and from the
    #: kernel.
    acquired_local: int
    acquired_global: int
    acquired_new: int
    #: Transfers that moved at least one byte, whether they ended well or not.
    transfers: int
    #: Bytes delivered by splice(2), sendfile(2) and copy_file_range(2), and read and written in a
    #: transfer of gsplice's. Bytes that an original function moved are not counted.
    bytes_spliced: int
    bytes_sendfile: int
    bytes_copy_file_range: int
    bytes_copied: int
    #: Jobs done on threads, which may have waited for a disk.
    offloads: int
    #: Calls handed to the original function, or finished by it, by reason (see docs/taken.md).
    fallbacks: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the same as a dictionary of numbers, with a plain one inside for ``fallbacks``."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        numbers["fallbacks"] = dict(self.fallbacks)
        return numbers


class Counters:
    """The counters behind :class:`Stats`, one set for the process.

    The lock is native, and re-entrant: a garbage collection may run a finalizer that copies a file
    while its own thread holds the lock.
    """

    __slots__ = ("_fallbacks", "_lock", "_new_reasons", "numbers", "pool")

    def __init__(self) -> None:
        self.numbers = {
            "transfers": 0,
            "bytes_spliced": 0,
            "bytes_sendfile": 0,
            "bytes_copy_file_range": 0,
            "bytes_copied": 0,
            "offloads": 0,
        }
        self._fallbacks: dict[str, int] = {}
        #: Reasons not yet in _fallbacks: to append one takes a quarter of the time, without a lock.
        self._new_reasons: deque[str] = deque()
        #: Returns the figures of the pool, which puts its function here.
        self.pool: Callable[[], dict[str, int]] = dict
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock by one that nobody holds."""
        self._lock = _RLock()

    def add(self, name: str, number: int) -> None:
        """Add *number* to the counter *name*."""
        with self._lock:
            self.numbers[name] += number

    def add_transfer(self, name: str, number: int) -> None:
        """Add *number* to the counter *name*, the first bytes of a transfer."""
        with self._lock:
            self.numbers["transfers"] += 1
            self.numbers[name] += number

    def fell_back(self, reason: str) -> None:
        """Count, under *reason*, one call that the original function got or had to finish."""
        self._new_reasons.append(reason)
        if len(self._new_reasons) >= MOST_NEW_REASONS:
            self._add_up_reasons()

    def _add_up_reasons(self) -> None:
        with self._lock, contextlib.suppress(IndexError):  # none is left
            while True:
                reason = self._new_reasons.popleft()
                self._fallbacks[reason] = self._fallbacks.get(reason, 0) + 1

    def snapshot(self) -> Stats:
        """Return the figures of this moment."""
        pool = self.pool()
        with self._lock:
            self._add_up_reasons()
            fallbacks = MappingProxyType(self._fallbacks.copy())
            return Stats(**pool, **self.numbers, fallbacks=fallbacks)


counters: Final = Counters()

# Another thread may hold the lock at a fork, and does not exist in the child to release it.
in_forked_child(counters.renew_lock)


def stats() -> Stats:
    """Return the figures so far."""
    return counters.snapshot()
