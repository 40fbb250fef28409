"""A pipe of the caller's, as the source or the destination of a transfer."""

from __future__ import annotations

import errno
import io
import os
import select
from collections.abc import Callable
from typing import Any

from gevent import get_hub
from gevent import socket as gsocket
from gevent.monkey import get_original

from .._os.linux import F_GETPIPE_SZ, LINUX, RWF_NOWAIT, SPLICE_FLAGS, fcntl
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN
from .closed import check_open
from .stream import Stream

# gevent's would let other greenlets run.
_poll: Callable[[], Any] = get_original("select", "poll")
_close: Callable[[int], None] = get_original("os", "close")
_epoll: Any = get_original("select", "epoll") if LINUX else None


class CallersPipe(Stream):
    """One end of a pipe that is the caller's own, never one of the pool's."""

    __slots__ = ()

    def fileno(self) -> int:
        """Return the descriptor. Raises what the object does when the file has been closed."""
        check_open(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def can_read_after(self, minus_errno: int) -> bool:
        """Say whether reading may go on after that error: it says what is wrong, if anything is."""
        return True

    def write_some(self, data: memoryview) -> int:
        """Write part of *data*; say how much. Raises BlockingIOError when there is no room."""
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            return os.write(fd, data)
        # It is blocking: a write(2) of more than there is room for would have the hub wait.
        if RWF_NOWAIT:
            try:
                return os.pwritev(fd, (data,), -1, RWF_NOWAIT)
            except (BlockingIOError, BrokenPipeError):
                raise
            except OSError:  # before Linux 6.4, or a FIFO that has a name
                pass
        poll = _poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "pipe is full")
        return self._splice(fd, data) or os.write(fd, data[: select.PIPE_BUF])

    def _splice(self, fd: int, data: memoryview) -> int:
        """Write part of *data* through a pipe of the pool, from which splice(2) never waits.

        Returns 0 where there is no such pipe, or splice(2) is refused. On entry the caller's pipe
        has room for PIPE_BUF bytes: so much has a slot of its own (pipe(7)). Lets out
        BlockingIOError if others have just filled that, and BrokenPipeError.
        """
        room = (fcntl(fd, F_GETPIPE_SZ) - self.available()) & -select.PIPE_BUF
        pipe = acquire()
        if pipe is None:
            return 0
        try:
            pipe.pending = UNKNOWN
            pipe.pending = os.write(pipe.write_fd, data[: max(room, select.PIPE_BUF)])
            moved = os.splice(pipe.read_fd, fd, pipe.pending, flags=SPLICE_FLAGS)
            pipe.pending -= moved
            return moved
        except (BlockingIOError, BrokenPipeError):
            raise
        except OSError:
            return 0
        finally:
            release(pipe)  # which closes it if something is left

    def wait_read(self) -> None:
        """Wait until the pipe has bytes, or has lost its last writer."""
        self._wait("_read_watcher", gsocket.wait_read)

    def wait_write(self) -> None:
        """Wait until the pipe has room, or has lost its last reader."""
        self._wait("_write_watcher", gsocket.wait_write)

    def _wait(self, watcher: str, wait: Callable[[int], None]) -> None:
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            # gevent's own: waiting as its read() does lets a close wake us
            gsocket.wait(getattr(self.raw, watcher), None, None, self.raw.hub)
            return
        try:
            # Closed by another greenlet meanwhile, the first would never wake us, and libev aborts
            # when it finds that out. A forked child keeps it for the same reason.
            own = os.dup(fd)
        except OSError:  # there are none left
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
    """Wait for *fd* and leave it blocking, for others that use it: libuv would not (uv_poll_init).

    An epoll instance is ready when one of what it watches is, and is itself what libuv gets.
    """
    events = select.POLLIN if watcher == "_read_watcher" else select.POLLOUT
    with _epoll(1) as epoll:
        epoll.register(fd, events)  # the numbers are those of poll(2)
        gsocket.wait_read(epoll.fileno())
