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

from .._os.linux import LINUX
from .closed import check_open
from .stream import Stream

# gevent's would let other greenlets run.
_poll: Callable[[], Any] = get_original("select", "poll")
_epoll: Any = get_original("select", "epoll") if LINUX else None


class CallersPipe(Stream):
    """One end of a pipe that is the caller's own, never one of the pool's."""

    __slots__ = ()

    def fileno(self) -> int:
        """Return the descriptor. Raises what the object does when the file has been closed."""
        check_open(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def may_be_read(self, answered: int) -> bool:
        """Say whether reading may go on after that error: it says what is wrong, if anything is."""
        return True

    def write_some(self, data: memoryview) -> int:
        """Write part of *data*; say how much. Raises BlockingIOError when there is no room."""
        fd = self.fileno()
        if isinstance(self.raw, io.FileIO):  # blocking: a full pipe would have the hub wait
            poll = _poll()
            poll.register(fd, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError(errno.EAGAIN, "pipe is full")
            data = data[: select.PIPE_BUF]  # for so much there is room then (pipe(7))
        return os.write(fd, data)

    def wait_read(self) -> None:
        """Wait until the pipe has bytes, or has lost its last writer."""
        self._wait("_read_watcher", gsocket.wait_read)

    def wait_write(self) -> None:
        """Wait until the pipe has room, or has lost its last reader."""
        self._wait("_write_watcher", gsocket.wait_write)

    def _wait(self, watcher: str, wait: Callable[[int], None]) -> None:
        fd = self.fileno()
        if isinstance(self.raw, io.FileIO):
            if "libuv" in get_hub().loop.__class__.__module__:
                _wait_blocking(fd, watcher)
            else:
                wait(fd)
        else:  # gevent's own: waiting as its read() does lets a close wake us
            gsocket.wait(getattr(self.raw, watcher), None, None, self.raw.hub)


def _wait_blocking(fd: int, watcher: str) -> None:
    """Wait for *fd* and leave it blocking, for others that use it: libuv would not (uv_poll_init).

    An epoll instance is ready when one of what it watches is, and is itself what libuv gets.
    """
    events = select.POLLIN if watcher == "_read_watcher" else select.POLLOUT
    with _epoll(1) as epoll:
        epoll.register(fd, events)  # the numbers are those of poll(2)
        gsocket.wait_read(epoll.fileno())
