"""The ordinary ways to read and write, for what the kernel will not move."""

from __future__ import annotations

import os
from typing import Final

from .._ends.file import File
from .._os.results import answer, error
from .._pool.pipe import Pipe
from ..config import KiB
from .account import PIECE
from .to_disk import into_file
from .transfer import Transfer

#: Most bytes read at once.
READ_SIZE: Final = 64 * KiB


def through_memory(transfer: Transfer) -> None:
    """Read the source, a file, and write what it gives, until it ends or the limit is reached.

    On entry the objects have nothing buffered. Lets out the errors of reading and writing; the
    source's offset is then after the last byte delivered.
    """
    buffer = memoryview(bytearray(READ_SIZE))
    while piece_through_memory(transfer, buffer):
        pass


def piece_through_memory(transfer: Transfer, buffer: memoryview | None = None) -> bool:
    """Do one piece of :func:`through_memory`; return False at the end of the file or the limit."""
    asked = transfer.room(READ_SIZE)
    data = read(transfer, transfer.src.offset, asked, buffer) if asked > 0 else b""
    write(transfer, data)
    return bool(data)


def read(
    transfer: Transfer, offset: int, asked: int, buffer: memoryview | None = None
) -> bytes | memoryview:
    """Read at most *asked* bytes of the source, a file, at *offset*; none: it ends there.

    They may be part of *buffer*, which has room for as many.
    A thread reads what may have to come from a disk. Lets out the errors of pread(2), and notes in
    the transfer that there was one.
    """
    src = transfer.src
    data = answer(src.cache.read, src.fileno(), offset, asked, buffer)
    if data is None:
        data = transfer.on_thread((src,), os.pread, asked, offset)
    if isinstance(data, int):
        transfer.read_failed = True
        raise error(data)
    return data  # type: ignore[no-any-return]


def write(transfer: Transfer, data: bytes | memoryview) -> None:
    """Write all of *data*, read from the source, to the destination, which has nothing buffered.

    Lets out the errors of the ordinary write(). What had not been written then is lost, unless the
    source is a file, which is left to stand before it.
    """
    dst = transfer.dst
    view = memoryview(data)
    while view:
        piece = view[:PIECE]
        try:
            if isinstance(dst, File) and dst.write_waits(len(piece)):
                promised = None if transfer.src.rereadable else piece.__len__
                written = into_file(transfer, len(piece), (), _write_at, piece, promised=promised)
                if written < 0:
                    raise error(written)
            else:
                written = dst.write_some(piece)
        except BlockingIOError:
            if isinstance(dst, File):  # there is nothing to wait for
                raise
            transfer.wait(dst.wait_write)
            continue
        view = view[written:]
        transfer.moved(written, "bytes_copied")
        transfer.give_way()


def _write_at(fd: int, position: int, data: memoryview) -> int:
    return os.pwrite(fd, data, position)


def write_out(transfer: Transfer, pipe: Pipe) -> None:
    """Write all that *pipe* holds to the destination. Lets out what :func:`write` does."""
    while pipe.pending:
        data = os.read(pipe.read_fd, pipe.pending)
        pipe.pending -= len(data)
        write(transfer, data)
