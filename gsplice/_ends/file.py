"""A regular file, as the source or the destination of a transfer."""

from __future__ import annotations

import errno
import io
import os
from typing import Any, ClassVar

from .closed import check_open
from .page_cache import Residency
from .small import SMALL_FILE


class File:
    """A regular file. It is read at :attr:`offset`, and written where the descriptor stands."""

    __slots__ = ("cache", "is_sink", "obj", "offset", "raw", "status")

    #: Whether bytes that were read, and not delivered, can be read again.
    rereadable: ClassVar[bool] = True

    def __init__(self, obj: Any, raw: Any, status: os.stat_result) -> None:
        self.obj = obj
        self.raw = raw
        #: Where it is read next; -1: where the object stands, which asking what is left finds out.
        self.offset = -1
        #: Whether it is written, not read: closed files have words for each.
        self.is_sink = False
        #: What fstat(2) said when the file was handed in.
        self.status = status
        self.cache = Residency(status)

    def fileno(self) -> int:
        """Return the descriptor. Raises what the object does when the file has been closed."""
        check_open(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def remaining(self) -> int:
        """Return how many bytes come after the offset, by what fstat(2) said at first.

        Asked again, it may have the hub wait for a server. The end is where a read says it is.
        """
        if self.offset < 0:
            self.offset = self.obj.tell()
        return self.status.st_size - self.offset

    def is_small(self, limit: int | None = None) -> bool:
        """Say whether reading what is left, *limit* bytes at most, costs less than splicing it."""
        left = self.remaining()
        return (left if limit is None else min(left, limit)) <= SMALL_FILE

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Move the object; it is read from there on. Raises what its own ``seek`` does."""
        self.offset = self.obj.seek(offset, whence)

    def advance(self, number: int) -> None:
        """Note that the next *number* bytes have been delivered."""
        self.offset += number

    def can_read_after(self, minus_errno: int) -> bool:
        """Say whether reading may go on after that error: it says what is wrong, if anything is."""
        return True

    def can_write_after(self, minus_errno: int) -> bool:
        """Say whether writing may go on after that error: it says what is wrong, if anything is."""
        return True

    def note_taken(self, number: int) -> None:
        """Do nothing: bytes that are taken and not delivered can be read again."""

    def cached(self, most: int) -> int:
        """Return how many bytes at the offset, *most* at the most, need no disk.

        Raises ValueError when the file has been closed.
        """
        return self.cache.cached(self.fileno(), self.offset, most)

    def is_same_file(self, other: File) -> bool:
        """Say whether *other* is the same file on disk."""
        return os.path.samestat(self.status, other.status)

    def buffered(self) -> int:
        """Return how many bytes the object has read ahead of where it stands: they go first."""
        if self.obj is self.raw:
            return 0
        if type(self.obj) is io.BufferedRandom:
            self.obj.flush()  # it may hold writes as well; then it stands where its descriptor does
            return 0
        return os.lseek(self.fileno(), 0, os.SEEK_CUR) - self.obj.tell()  # type: ignore[no-any-return]

    def take_buffered(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it."""
        ahead = self.buffered()
        if not ahead:
            return b""
        return self.obj.read(ahead if most is None else min(ahead, most))  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Write out what the object has buffered, so that the descriptor stands where it stands."""
        if self.obj is not self.raw:
            self.obj.flush()

    def leave_source(self) -> None:
        """Make the object stand after the last byte delivered."""
        if not self.obj.closed:
            self.obj.seek(self.offset)

    def leave_sink(self) -> None:
        """Make the object stand where the descriptor stands, after what it may still hold."""
        if not self.obj.closed:
            self.flush()
            self.obj.seek(os.lseek(self.fileno(), 0, os.SEEK_CUR))

    def write_some(self, data: memoryview) -> int:
        """Write part of *data* the ordinary way, where the descriptor stands; say how much.

        Raises BlockingIOError where the filesystem says EAGAIN, as a BufferedWriter would.
        """
        self.fileno()  # it may have been closed since
        written: int | None = self.raw.write(data)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the file takes no more bytes now")
        return written

    def write_may_wait(self, size: int) -> bool:
        """Say whether writing *size* bytes may have the hub wait for a disk."""
        return self.cache.write_may_wait(size)

    def close_may_wait(self) -> bool:
        """Say whether closing a descriptor of the file may have the hub wait for a server."""
        return self.cache.close_may_wait()

    def claim(self, size: int) -> int:
        """Have the descriptor stand *size* bytes further on; return where it stood.

        A thread writes these bytes, while others may write to the same file behind them.
        """
        position = os.lseek(self.fileno(), 0, os.SEEK_CUR)
        os.lseek(self.fileno(), position + size, os.SEEK_SET)
        return position

    def settle_claim(self, position: int, reserved: int, written: int) -> None:
        """Have the descriptor stand after what has been *written* of what was *reserved*.

        Unless somebody else has moved it since, or the file has been closed.
        """
        if written == reserved or self.raw.closed:
            return
        if os.lseek(self.fileno(), 0, os.SEEK_CUR) == position + reserved:
            os.lseek(self.fileno(), position + written, os.SEEK_SET)

    def wait_read(self) -> None:
        """Do nothing: a regular file is always ready."""

    wait_write = wait_read
