"""A socket that a thread may use for as long as its greenlet waits for the thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from gevent.monkey import get_original

from .._ends.socket import Socket
from .._threads.descriptor import Duplicate

_new_lock: Final[Callable[[], Any]] = get_original("_thread", "allocate_lock")


class LentSocket:
    """A socket, and what a thread does with it: nothing more once the greenlet has given up.

    Each step of the thread is non-blocking, and done while it holds the lock. So when
    :meth:`leave_to_thread` returns, it is known which bytes the socket has given or taken.
    """

    __slots__ = ("_end", "_ino", "_lock", "_pid", "left_to_thread")

    def __init__(self, end: Socket) -> None:
        self._end = end
        #: Whether the greenlet has stopped waiting.
        self.left_to_thread = False
        try:
            self._ino = os.fstat(Socket.fileno(end)).st_ino
        except (OSError, ValueError):  # closed; no file has this number
            self._ino = -1
        self._lock = _new_lock()
        self._pid = os.getpid()

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Give a duplicate for a step; -1 if the greenlet has given up, or the socket is closed.

        The duplicate is closed right after the step: while it is open, closing the socket sends no
        FIN.
        """
        with self._lock:
            own = None if self.left_to_thread else self._duplicate()
            try:
                # If it was closed meanwhile, the number may belong to another file.
                same = own is not None and os.fstat(own.fd).st_ino == self._ino
                yield own.fd if own is not None and same else -1
            finally:
                if own is not None:
                    own.close_now()

    def _duplicate(self) -> Duplicate | None:
        try:
            # Socket.fileno itself: a body translates its errors in its greenlet, not on this thread
            return Duplicate(Socket.fileno(self._end))
        except (OSError, ValueError):  # closed, or no descriptor is left
            return None

    def leave_to_thread(self) -> None:
        """Let the thread do no more. May wait for its step, which is non-blocking."""
        if os.getpid() != self._pid:  # the thread that holds the lock is the parent's
            self.left_to_thread = True
            return
        with self._lock:
            self.left_to_thread = True

    def close(self) -> None:
        """Do nothing: the socket is the caller's."""
