"""The caller's own pipe, as the source or the destination of a transfer."""

from __future__ import annotations

import errno
import io
import os
import select
from collections.abc import Callable
from typing import Any, Final

from gevent import get_hub
from gevent import socket as gsocket
from gevent.monkey import get_original

from .._os.linux import F_GETPIPE_SZ, LINUX, RWF_NOWAIT, fcntl
from .._os.results import NOT_NOW, answer, error, splice
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN
from .closed import refuse_closed
from .stream import Stream

#: Answers of a write that no other way of writing changes.
_FINAL: Final = frozenset({NOT_NOW, -errno.EPIPE})

# Unpatched: gevent's own would switch to the hub.
_poll: Callable[[], Any] = get_original("select", "poll")
_close: Callable[[int], None] = get_original("os", "close")
_epoll: Any = get_original("select", "epoll") if LINUX else None


class CallersPipe(Stream):
    """One end of a pipe of the caller's, never of a pipe of the pool."""

    __slots__ = ()

    def fileno(self) -> int:
        """Return the descriptor. Raises the object's own error if the file has been closed."""
        if self.raw.closed:
            refuse_closed(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def can_read_after(self, minus_errno: int) -> bool:
        """Return True: if anything is wrong, an ordinary read reports the error again."""
        return True

    def write_some(self, data: memoryview) -> int:
        """Write part of *data*; return how many bytes. Raises BlockingIOError if none fit."""
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            return os.write(fd, data)
        # The pipe is blocking: a write(2) of more than there is room for would have the hub wait.
        if RWF_NOWAIT:
            written: int = answer(os.pwritev, fd, (data,), -1, RWF_NOWAIT)
            if written >= 0:
                return written
            if written in _FINAL:
                raise error(written)
            # else not supported: before Linux 6.4, or by a named FIFO
        poll = _poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "pipe is full")
        return self._splice(fd, data) or os.write(fd, data[: select.PIPE_BUF])

    def _splice(self, fd: int, data: memoryview) -> int:
        """Write part of *data* through a pipe of the pool, since splice(2) can be told not to wait.

        Returns how many bytes were written: 0 if the pool has no pipe, or splice(2) is refused. On
        entry the caller's pipe has a free slot, room for PIPE_BUF bytes (pipe(7)). Lets out
        BlockingIOError if others have filled it meanwhile, and BrokenPipeError.
        """
        room = (fcntl(fd, F_GETPIPE_SZ) - self.available()) & -select.PIPE_BUF
        pipe = acquire()
        if pipe is None:
            return 0
        try:
            pipe.pending = UNKNOWN
            pipe.pending = os.write(pipe.write_fd, data[: max(room, select.PIPE_BUF)])
            moved = splice(pipe.read_fd, fd, pipe.pending)
            if moved in _FINAL:
                raise error(moved)
            pipe.pending -= max(0, moved)
            return max(0, moved)
        finally:
            release(pipe)  # closes it if bytes are left inside

    def wait_read(self) -> None:
        """Wait until the pipe has bytes, or its last writer has closed it."""
        self._wait("_read_watcher", gsocket.wait_read)

    def wait_write(self) -> None:
        """Wait until the pipe has room, or its last reader has closed it."""
        self._wait("_write_watcher", gsocket.wait_write)

    def _wait(self, watcher: str, wait: Callable[[int], None]) -> None:
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            # gevent's own file: wait with its watcher, as its read() does, so that a close wakes us
            gsocket.wait(getattr(self.raw, watcher), None, None, self.raw.hub)
            return
        try:
            # If another greenlet closed the descriptor that we wait for, nothing would wake us, and
            # libev would abort when it notices. So a forked child keeps the duplicate open, too.
            own = os.dup(fd)
        except OSError:  # no descriptor is left
            own = fd
        try:
            if "libuv" in get_hub().loop.__class__.__module__:
                _wait_blocking(own, watcher)
            else:
                wait(own)
        finally:
            if own != fd:
                _close(own)


def _wait_blocking(fd: int, watcher: str) -> None:
    """Wait for *fd* under libuv, which would make it non-blocking for all its users (uv_poll_init).

    So libuv gets an epoll instance that watches *fd*: it is readable when *fd* is ready.
    """
    events = select.POLLIN if watcher == "_read_watcher" else select.POLLOUT
    with _epoll(1) as epoll:
        epoll.register(fd, events)  # the numbers are those of poll(2)
        gsocket.wait_read(epoll.fileno())
