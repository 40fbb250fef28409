"""A stream socket, as the source or the destination of a transfer."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from .._os.linux import ioctl
from .._os.results import answer
from .closed import refuse_closed
from .stream import Stream

_SIOCATMARK: Final = 0x8905


class Socket(Stream):
    """A connected stream socket: bare, or under the file that its ``makefile()`` returned."""

    __slots__ = ("sock",)

    def __init__(self, obj: Any, raw: Any, sock: Any) -> None:
        super().__init__(obj, raw)
        self.sock = sock

    def fileno(self) -> int:
        """Return the descriptor; -1 if the socket was closed, so that system calls fail with EBADF.

        Raises ValueError if the socket's file was closed.
        """
        if self.raw is not None and self.raw.closed:
            refuse_closed(self)
        return self.sock.fileno()  # type: ignore[no-any-return]

    def write_some(self, data: memoryview) -> int:
        """Send part of *data*; return how many bytes. Raises BlockingIOError when there is no room.

        Lets out the errors of send(2), and ValueError if the socket's file was closed.
        """
        self.fileno()  # raises if the socket's file was closed meanwhile
        return self.sock._sock.send(data)  # type: ignore[no-any-return]

    def receive(self, most: int) -> bytes | int:
        """Receive at most *most* bytes without waiting; or return minus the errno."""
        return answer(self.sock._sock.recv, most)  # type: ignore[no-any-return]

    def at_urgent_mark(self) -> bool:
        """Return whether the next byte is at TCP's urgent mark (tcp(7), SIOCATMARK)."""
        try:
            mark = ioctl(self.fileno(), _SIOCATMARK, bytes(4))
        except OSError:  # a Unix socket has no urgent data
            return False
        return mark != bytes(4)

    def wait_read(self) -> None:
        """Wait as recv() would, with the socket's own watcher and timeout."""
        try:
            self._wait("_read_event")
        except TimeoutError:
            if self.raw is not None:
                self.raw._timeout_occurred = (
                    True  # as SocketIO.readinto() does, to refuse later reads
                )
            raise

    def wait_write(self) -> None:
        """Wait as send() would, with the socket's own watcher and timeout."""
        self._wait("_write_event")

    def _wait(self, name: str) -> None:
        """Wait for the watcher of that *name*; OSError (EBADF) if the socket was closed."""
        Socket.fileno(self)  # raises ValueError if the socket's file was closed meanwhile
        watcher = getattr(self.sock, name)
        if watcher is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.sock._wait(watcher)
