"""Reading and writing through memory, for bytes that the kernel does not move."""

from __future__ import annotations

import os
import time
from typing import Final

from .._ends.file import File
from .._ends.page_cache import LEAST_LOOKS, SOON
from .._os.hub import hub_to_serve
from .._os.results import answer_of_job, error
from .._pool.pipe import Pipe
from ..config import KiB
from .account import PIECE
from .to_disk import write_on_thread
from .transfer import Transfer

#: Most bytes read at once.
READ_SIZE: Final = 64 * KiB

#: Free buffers. A new one costs as much as reading so much.
_buffers: Final[list[bytearray]] = []

#: How many we keep: few are in use at once but where clients are slow, and there may be thousands.
MOST_BUFFERS: Final = 16


def take_buffer() -> bytearray:
    """Return a buffer with room for READ_SIZE bytes, and one to find out that there are more."""
    try:
        return _buffers.pop()
    except IndexError:
        return bytearray(READ_SIZE + 1)


def leave_buffer(buffer: bytearray) -> None:
    """Keep *buffer*, which nobody uses any more, for the next one who takes one."""
    if len(_buffers) < MOST_BUFFERS:
        _buffers.append(buffer)


def through_memory(transfer: Transfer) -> None:
    """Read the source, a file, and write the bytes, until it ends or the limit is reached.

    On entry neither object has anything buffered. On exit, also by an error, the source's offset is
    after the last byte delivered. Lets out what :func:`read` and :func:`write` do.
    """
    buffer = take_buffer()
    while piece_through_memory(transfer, memoryview(buffer)):
        pass
    leave_buffer(buffer)  # not after an error: a thread may still write from it


def piece_through_memory(transfer: Transfer, buffer: memoryview | None = None) -> bool:
    """Do one read and write of :func:`through_memory`; return False at the end or the limit."""
    asked = transfer.within_limit(READ_SIZE)
    data = read(transfer, transfer.src.offset, asked, buffer) if asked > 0 else b""
    write(transfer, data)
    return bool(data)


def read(
    transfer: Transfer, offset: int, asked: int, buffer: memoryview | None = None
) -> bytes | memoryview:
    """Read at most *asked* bytes of the source, a file, at *offset*; no bytes: it ends there.

    The result may be part of *buffer*, which must be that large. A thread reads what may have to
    come from a disk. Lets out the errors of pread(2), after setting ``transfer.read_failed``, and
    what :meth:`Transfer.on_thread` does.
    """
    src = transfer.src
    data = answer_of_job(src.cache.read, src.fileno(), offset, asked, buffer)
    if data is None and src.cache.is_loading():
        data = _look_again(transfer, offset, asked, buffer)
    if data is None:
        data = transfer.on_thread((src,), os.pread, asked, offset)
    if isinstance(data, int):
        transfer.read_failed = True
        raise error(data)
    return data  # type: ignore[no-any-return]


def _look_again(
    transfer: Transfer, offset: int, asked: int, buffer: memoryview | None
) -> bytes | memoryview | int | None:
    """Read what was not cached, but is loading, as :func:`read` does; None: it was not there soon.

    Other greenlets run meanwhile.
    """
    hub, src = hub_to_serve(), transfer.src
    if hub is None:
        return None
    if buffer is None:
        buffer = memoryview(bytearray(asked))
    last, looks = time.monotonic() + SOON, 0
    with hub.loop.timer(0.0) as timer:
        while looks < LEAST_LOOKS or time.monotonic() < last:
            looks += 1
            hub.wait(timer)
            transfer.check_process()
            data = answer_of_job(src.cache.read, src.fileno(), offset, asked, buffer)
            if data is not None:
                return data  # type: ignore[no-any-return]
    src.cache.note_slow()
    return None


def write(transfer: Transfer, data: bytes | memoryview) -> None:
    """Write all of *data*, read from the source, to the destination, which has nothing buffered.

    On exit it is delivered. Lets out the errors of the ordinary write, and what is thrown into the
    greenlet while it waits. The rest of *data* is then lost, unless the source is a file: its
    offset is before the rest.
    """
    dst = transfer.dst
    view = memoryview(data)
    while view:
        piece = view[:PIECE]
        try:
            if isinstance(dst, File) and dst.write_may_wait(len(piece)):
                promised = None if transfer.src.rereadable else piece.__len__
                written = write_on_thread(
                    transfer, len(piece), (), _write_at, piece, promised=promised
                )
                if written < 0:
                    raise error(written)
            else:
                written = dst.write_some(piece)
        except BlockingIOError:
            if isinstance(dst, File):  # a file has no event to wait for
                raise
            transfer.wait(dst.wait_write)
            continue
        except OSError:
            transfer.write_failed = True
            raise
        view = view[written:]
        transfer.count_delivered(written, "bytes_copied")
        transfer.give_way()


def _write_at(fd: int, position: int, data: memoryview) -> int:
    return os.pwrite(fd, data, position)


def write_out(transfer: Transfer, pipe: Pipe) -> None:
    """Read *pipe* until it is empty, and write the bytes. Lets out what :func:`write` does."""
    while pipe.pending:
        data = os.read(pipe.read_fd, pipe.pending)
        pipe.pending -= len(data)
        write(transfer, data)
