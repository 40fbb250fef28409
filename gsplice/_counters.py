"""Counters: proof that the fast way ran, and how much went which way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from gevent.monkey import get_original

from ._os.fork import in_forked_child

_RLock: Callable[[], Any] = get_original("_thread", "RLock")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What gsplice has done in this process since it was imported: an immutable snapshot.

    A forked child goes on counting from its parent's figures, where the parent's pipes count as
    closed.
    """

    #: Pipes made and closed so far, lent out now, and idle now (in the hubs' lists and the shared
    #: one together). ``created == closed + in_use + idle`` while no other thread is at work.
    pipes_created: int
    pipes_closed: int
    pipes_in_use: int
    pipes_idle: int
    #: Where the pipes that were asked for came from: the hub's own list, the list that all hubs
    #: share, or the kernel.
    acquired_local: int
    acquired_global: int
    acquired_new: int
    #: Transfers that moved at least one byte, whether they ended well or not.
    transfers: int
    #: Bytes delivered by splice(2), by sendfile(2), by copy_file_range(2), and through Python's
    #: memory as part of such a transfer. Bytes that an original function moved are not counted.
    bytes_spliced: int
    bytes_sendfile: int
    bytes_copy_file_range: int
    bytes_copied: int
    #: Disk waits that went to a thread.
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

    The lock is native and re-entrant: a finalizer that copies a file can run, in a garbage
    collection, inside a count on the same thread.
    """

    __slots__ = ("_lock", "fallbacks", "numbers", "pool")

    def __init__(self) -> None:
        self.numbers = {
            "transfers": 0,
            "bytes_spliced": 0,
            "bytes_sendfile": 0,
            "bytes_copy_file_range": 0,
            "bytes_copied": 0,
            "offloads": 0,
        }
        self.fallbacks: dict[str, int] = {}
        #: Counts the pipes; the pool puts its own function here.
        self.pool: Callable[[], dict[str, int]] = dict
        self.renew_lock()

    def renew_lock(self) -> None:
        """Start with a lock that nobody holds."""
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
        """Count one call that the original function got, or had to finish."""
        with self._lock:
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def snapshot(self) -> Stats:
        """Return the figures of this moment."""
        pool = self.pool()
        with self._lock:
            return Stats(**pool, **self.numbers, fallbacks=MappingProxyType(self.fallbacks.copy()))


counters: Final = Counters()

# Another thread may hold the lock at a fork; in the child nobody would ever release it.
in_forked_child(counters.renew_lock)


def stats() -> Stats:
    """Return what gsplice has done so far."""
    return counters.snapshot()
