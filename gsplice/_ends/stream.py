"""What a socket and a pipe have in common: bytes come once, and there is no position to keep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from gevent.monkey import get_original

from .._os.linux import FIONREAD, ioctl
from .._os.results import can_recv_after, can_send_after, error

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")


class Stream:
    """What a socket and a pipe have in common: there is no position to keep."""

    __slots__ = ("is_sink", "obj", "raw")

    #: Whether only a read of the object's own, after all has been moved, finds its end.
    needs_final_read: ClassVar[bool] = False

    #: Bytes that were taken exist nowhere else.
    rereadable: ClassVar[bool] = False

    def __init__(self, obj: Any, raw: Any) -> None:
        self.obj = obj
        self.raw = raw
        #: Whether it is written, not read: closed files have words for each.
        self.is_sink = False

    def fileno(self) -> int:
        """Return the descriptor, as it is now."""
        raise NotImplementedError

    def remaining(self) -> int:
        """Return how many bytes may be taken: all that come."""
        return sys.maxsize

    def withheld(self) -> int:
        """Return how many of the last bytes only the object's own read() may take."""
        return 0

    def read_withheld(self) -> bytes:
        """Have the object read these: nothing else is left. Lets out what its read() raises."""
        return b""

    def available(self) -> int:
        """Return how many bytes there are to read (pipe(7), tcp(7), unix(7): FIONREAD)."""
        return int.from_bytes(ioctl(self.fileno(), FIONREAD, bytes(4)), sys.byteorder)

    def note_taken(self, number: int) -> None:
        """Note that *number* bytes have been taken from the descriptor, not yet delivered.

        Below 0: that so many have not been taken after all.
        """

    def advance(self, number: int) -> None:
        """Do nothing: delivered bytes move no position."""

    def can_read_after(self, minus_errno: int) -> bool:
        """Say whether reading the ordinary way may go on after that error of splice(2)."""
        return can_recv_after(minus_errno)

    def can_write_after(self, minus_errno: int) -> bool:
        """Say whether writing the ordinary way may go on after that error of splice(2)."""
        return can_send_after(minus_errno)

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise what reading the object would for an error of the descriptor, minus its errno."""
        raise error(minus_errno)

    def take_buffered(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it. Neither reads nor waits."""
        if self.obj is self.raw:
            return b""
        # peek() on an empty buffer calls readinto(), which waits. There is no other way to see the
        # buffer, so readinto() answers "nothing yet" for the moment.
        read, ours = self.raw.readinto, _get_ident()

        def nothing_yet(buffer: Any) -> Any:
            # Answers as a raw file that is non-blocking and has nothing to read.
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
