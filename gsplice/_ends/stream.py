"""What a socket and a pipe have in common: bytes come only once, and there is no position."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from gevent.monkey import get_original

from .._os.linux import FIONREAD, ioctl
from .._os.results import can_recv_after, can_send_after, error

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")


def unread(fd: int) -> int:
    """Return how many bytes can be read now. Lets out OSError, and ValueError for no descriptor."""
    return int.from_bytes(ioctl(fd, FIONREAD, bytes(4)), sys.byteorder)


class Stream:
    """A socket or a pipe, as the source or the destination of a transfer."""

    __slots__ = ("is_sink", "obj", "raw")

    #: Whether the caller has to call the object's own read() after the transfer, to end it.
    needs_final_read: ClassVar[bool] = False

    #: Whether bytes that were taken and not delivered can be read again.
    rereadable: ClassVar[bool] = False

    def __init__(self, obj: Any, raw: Any) -> None:
        self.obj = obj
        self.raw = raw
        #: Whether it is the destination: a closed file's error depends on that.
        self.is_sink = False

    def fileno(self) -> int:
        """Return the descriptor. Raises the object's own error if it has been closed."""
        raise NotImplementedError

    def remaining(self) -> int:
        """Return how many bytes of the stream belong to the object: all that come."""
        return sys.maxsize

    def withheld(self) -> int:
        """Return how many bytes at its end are left to the object's own read()."""
        return 0

    def read_withheld(self) -> bytes:
        """Have the object read these, when no others remain. Lets out what its read() raises."""
        return b""

    def available(self) -> int:
        """Return how many bytes can be read now (pipe(7), tcp(7), unix(7): FIONREAD)."""
        return unread(self.fileno())

    def note_taken(self, number: int) -> None:
        """Subtract *number* bytes, taken from the descriptor, from those that remain.

        Below 0: so many were not taken after all.
        """

    def advance(self, number: int) -> None:
        """Do nothing: delivered bytes move no position."""

    def can_read_after(self, minus_errno: int) -> bool:
        """Return whether an ordinary read may be tried after that error of splice(2)."""
        return can_recv_after(minus_errno)

    def can_write_after(self, minus_errno: int) -> bool:
        """Return whether an ordinary write may be tried after that error of splice(2)."""
        return can_send_after(minus_errno)

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise the error that the object's own read() would, for that error of the descriptor."""
        raise error(minus_errno)

    def take_buffered(self, most: int | None) -> bytes:
        """Take at most *most* bytes from the object's read buffer. Neither reads nor waits."""
        if self.obj is self.raw:
            return b""
        # peek() on an empty buffer calls readinto(), which waits. There is no other way to see the
        # buffer, so readinto() answers "nothing yet" for the moment.
        read, ours = self.raw.readinto, _get_ident()

        def nothing_yet(buffer: Any) -> Any:
            # None: what a non-blocking raw file returns when it has nothing to read.
            return None if _get_ident() == ours else read(buffer)

        self.raw.readinto = nothing_yet
        try:
            data: bytes = self.obj.peek(1)
        finally:
            del self.raw.readinto
        if most is not None:
            data = data[:most]
        return self.obj.read(len(data))  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Write out what the object has buffered."""
        if self.obj is not self.raw:
            self.obj.flush()

    def leave_source(self) -> None:
        """Do nothing: a stream has no position."""

    leave_sink = leave_source
