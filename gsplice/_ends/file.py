"""A regular file, as the source or the destination of a transfer."""

from __future__ import annotations

import errno
import io
import os
from typing import Any, ClassVar

from .closed import refuse_closed
from .page_cache import Residency
from .small import SMALL_FILE


class File:
    """A regular file. It is read at :attr:`offset`, and written at the descriptor's position."""

    __slots__ = ("cache", "is_sink", "may_be_cached", "obj", "offset", "raw", "status")

    #: Whether bytes that were taken and not delivered can be read again.
    rereadable: ClassVar[bool] = True

    def __init__(self, obj: Any, raw: Any, status: os.stat_result) -> None:
        self.obj = obj
        self.raw = raw
        #: Where to read next; -1: at the object's position, until remaining() asks for that.
        self.offset = -1
        #: Whether it is the destination: a closed file's error depends on that.
        self.is_sink = False
        #: From fstat(2), when the file was handed in.
        self.status = status
        self.cache = Residency(status)
        #: Whether it is known that splice(2) gives what a read would: see refuse_uncached().
        self.may_be_cached = False

    def fileno(self) -> int:
        """Return the descriptor. Raises the object's own error if the file has been closed."""
        if self.raw.closed:
            refuse_closed(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def remaining(self) -> int:
        """Return how many bytes come after the offset, by the size when the file was handed in.

        fstat(2) is not called again, as it may wait for a server. Only a read finds the real end.
        """
        if self.offset < 0:
            self.offset = self.obj.tell()
        return self.status.st_size - self.offset

    def is_small(self, limit: int | None = None) -> bool:
        """Return whether reading the rest, at most *limit* bytes, costs less than splicing it."""
        size = self.remaining()
        return (size if limit is None else min(size, limit)) <= SMALL_FILE

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Seek in the object, and read from there on. Raises what its own ``seek`` does."""
        self.offset = self.obj.seek(offset, whence)

    def advance(self, number: int) -> None:
        """Move the offset past *number* bytes that have been delivered."""
        self.offset += number

    def can_read_after(self, minus_errno: int) -> bool:
        """Return True: if anything is wrong, an ordinary read reports the error again."""
        return True

    def can_write_after(self, minus_errno: int) -> bool:
        """Return True: if anything is wrong, an ordinary write reports the error again."""
        return True

    def note_taken(self, number: int) -> None:
        """Do nothing: bytes that are taken and not delivered can be read again."""

    def cached(self, most: int) -> int:
        """Return how many bytes at the offset are in the page cache, *most* at the most.

        Raises ValueError if the file has been closed.
        """
        return self.cache.cached(self.fileno(), self.offset, most)

    def is_same_file(self, other: File) -> bool:
        """Return whether *other* is the same file on disk."""
        return os.path.samestat(self.status, other.status)

    def buffered(self) -> int:
        """Return how many bytes the object has in its read buffer after its position."""
        if self.obj is self.raw:
            return 0
        if type(self.obj) is io.BufferedRandom:
            self.obj.flush()  # it may have buffered writes; this drops its read buffer, too
            return 0
        return os.lseek(self.fileno(), 0, os.SEEK_CUR) - self.obj.tell()  # type: ignore[no-any-return]

    def take_buffered(self, most: int | None) -> bytes:
        """Take at most *most* bytes from the object's read buffer."""
        buffered = self.buffered()
        if not buffered:
            return b""
        return self.obj.read(buffered if most is None else min(buffered, most))  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Write out the object's buffer: then its position is the descriptor's."""
        if self.obj is not self.raw:
            self.obj.flush()

    def leave_source(self) -> None:
        """Set the object's position after the last byte delivered."""
        if not self.obj.closed:
            self.obj.seek(self.offset)

    def leave_sink(self) -> None:
        """Set the object's position to the descriptor's, after writing out its buffer."""
        if not self.obj.closed:
            self.flush()
            self.obj.seek(os.lseek(self.fileno(), 0, os.SEEK_CUR))

    def write_some(self, data: memoryview) -> int:
        """Write part of *data* with write(2), at the descriptor's position; return how many bytes.

        Raises BlockingIOError if the filesystem returns EAGAIN, as a BufferedWriter does.
        """
        self.fileno()  # raises if it was closed meanwhile
        written: int | None = self.raw.write(data)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the file takes no more bytes now")
        return written

    def write_may_wait(self, size: int) -> bool:
        """Return whether writing *size* bytes may wait for a disk or a server."""
        return self.cache.write_may_wait(size)

    def close_may_wait(self) -> bool:
        """Return whether closing a descriptor of the file may wait for a server."""
        return self.cache.close_may_wait()

    def claim(self, size: int) -> int:
        """Move the descriptor's position *size* bytes on; return the old one.

        A thread writes these bytes; others that write to the file meanwhile write after them.
        """
        position = os.lseek(self.fileno(), 0, os.SEEK_CUR)
        os.lseek(self.fileno(), position + size, os.SEEK_SET)
        return position

    def settle_claim(self, position: int, claimed: int, written: int) -> None:
        """Set the descriptor's position after the bytes *written* of those *claimed* at *position*.

        Not if somebody else has moved it since, or the file has been closed.
        """
        if written == claimed or self.raw.closed:
            return
        if os.lseek(self.fileno(), 0, os.SEEK_CUR) == position + claimed:
            os.lseek(self.fileno(), position + written, os.SEEK_SET)

    def wait_read(self) -> None:
        """Do nothing: a regular file is always ready."""

    wait_write = wait_read
