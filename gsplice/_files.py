"""From a file: to a socket, to another file, or through memory to anything.

The disk is waited for on a thread: what the page cache has not got is put into a pipe there, or
read, and leaves for the socket from the hub. Files copied to files are copied there.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable

from . import pipes
from ._linux import SPLICE_FLAGS
from ._stats import counters
from ._transfer import Transfer, into_file, is_refusal, read, write
from .config import COLD_PIECE, PIECE, SMALL
from .endpoints import Endpoint, File, Socket
from .offload import hub_to_serve
from .residency import refuse_uncached


class _Step(enum.Enum):
    """What has become of one step towards a socket."""

    MOVED = enum.auto()
    ENDED = enum.auto()  # the file has
    FULL = enum.auto()  # the socket is
    REFUSED = enum.auto()


def file_to_socket(transfer: Transfer, src: File, dst: Socket) -> str | None:
    """Send from *src*, at its offset: what is resident with sendfile(2), the rest through a pipe.

    Never asks for more than the file has: older kernels wait 200 ms for the rest. A file cut short
    under way ends there. Lets out what the socket says; what is wrong with the file, reading it
    has to say.
    """
    while (asked := transfer.room(min(PIECE, src.left()))) > 0:
        ready = src.ready(asked)
        if ready:
            step = _send_resident(transfer, src, dst, ready)
        else:
            step = _send_cold(transfer, src, dst, min(asked, COLD_PIECE))
        if step is _Step.REFUSED:
            return "refused"
        if step is _Step.ENDED:
            break
        if step is _Step.FULL:
            transfer.wait(dst.wait_write)
        else:
            transfer.give_way()
    return None


def _send_resident(transfer: Transfer, src: File, dst: Socket, asked: int) -> _Step:
    """Send at most *asked* bytes at *src*'s offset, and account for them."""
    try:
        number = os.sendfile(dst.fileno(), src.fileno(), src.offset, asked)
    except OSError as err:
        return _step(err, src, dst)
    return _sent(transfer, src, number, "bytes_sendfile")


def _send_cold(transfer: Transfer, src: File, dst: Socket, asked: int) -> _Step:
    """Send at most *asked* bytes at *src*'s offset, which a thread gets from the disk.

    On exit what has been sent is accounted for; what the socket did not take is given up, with the
    pipe, as it can be read again, from the page cache then.
    """
    pipe = pipes.acquire()
    if pipe is None:
        counters.fell_back("no_pipe")
        data = read(transfer, src, src.offset, min(asked, SMALL))
        try:
            number = dst.write_some(memoryview(data)) if data else 0
        except BlockingIOError:
            return _Step.FULL
        return _sent(transfer, src, number, "bytes_copied")
    try:
        ahead = min(transfer.room(src.left()) - asked, COLD_PIECE)
        pipe.pending = pipes.UNKNOWN
        filled = transfer.on_thread((src,), _fill, pipe, src.offset, asked, ahead, loans=(pipe,))
        if isinstance(filled, OSError):
            return _Step.REFUSED  # the read says what is wrong with the file
        step = _Step.ENDED
        while pipe.pending:
            try:
                drained = os.splice(pipe.read_fd, dst.fileno(), pipe.pending, flags=SPLICE_FLAGS)
            except OSError as err:
                return _step(err, None, dst)
            pipe.pending -= drained
            step = _sent(transfer, src, drained, "bytes_spliced")
        return step
    finally:
        pipes.release(pipe)


def _step(err: OSError, src: File | None, dst: Socket) -> _Step:
    """Return what *err*, of a call with these ends, means for the way; or raise it."""
    if isinstance(err, BlockingIOError):
        return _Step.FULL
    if is_refusal(err, src, dst):
        return _Step.REFUSED
    try:
        raise err
    finally:
        del err


def _sent(transfer: Transfer, src: File, number: int, counter: str) -> _Step:
    """Account for *number* bytes of *src* that have been delivered."""
    if not number:
        return _Step.ENDED
    src.offset += number
    transfer.moved(number, counter)
    return _Step.MOVED


def _fill(fd: int, pipe: pipes.Pipe, offset: int, asked: int, ahead: int) -> int:
    """Splice at most *asked* bytes at *offset* into *pipe*, which is empty; have *ahead* more read.

    On exit ``pipe.pending`` is what it holds. Lets out the errors of splice(2), which moves nothing
    then.
    """
    filled = 0
    try:
        refuse_uncached(fd)
        filled = os.splice(fd, pipe.write_fd, asked, offset_src=offset)
        if ahead > 0:
            os.posix_fadvise(fd, offset + filled, ahead, os.POSIX_FADV_WILLNEED)
    finally:
        pipe.pending = filled
    return filled


_Way = Callable[[Transfer, File, File, int], int | OSError | None]


def file_to_file(transfer: Transfer, src: File, dst: File) -> str | None:
    """Copy from *src*, at its offset, to where *dst* stands: copy_file_range(2), else splice(2).

    Any error of these ends the way, not the transfer: nothing is under way between the calls, so
    the next way meets the same error, and reading and writing, which comes last, raises it. Lets
    out ValueError for a file that has been closed.
    """
    ways: list[tuple[str, _Way]] = [
        ("bytes_copy_file_range", _by_copy_file_range),
        ("bytes_spliced", _by_splice),
    ]
    if hub_to_serve() is None:
        del ways[1]  # the pipe would bring a hub
    if not hasattr(os, "copy_file_range"):  # where Python was built with glibc < 2.27
        del ways[0]
    while (asked := transfer.room(min(PIECE, src.left()))) > 0:
        if not ways:
            return "refused"
        counter, way = ways[0]
        copied = way(transfer, src, dst, asked)
        if copied is None or isinstance(copied, OSError):
            del ways[0]
            continue
        if copied == 0:
            break
        _sent(transfer, src, copied, counter)
        transfer.give_way()
    return None


def _by_copy_file_range(transfer: Transfer, src: File, dst: File, asked: int) -> int | OSError:
    return into_file(transfer, dst, asked, (src,), _copy_range, src.offset, asked)


def _copy_range(src_fd: int, dst_fd: int, position: int, offset: int, asked: int) -> int:
    """Copy *asked* bytes, or what there is; say how many."""
    copied = 0
    try:
        while copied < asked and (
            number := os.copy_file_range(
                src_fd,
                dst_fd,
                asked - copied,
                offset_src=offset + copied,
                offset_dst=position + copied,
            )
        ):
            copied += number
    except OSError:
        if not copied:
            raise
    return copied


def _by_splice(transfer: Transfer, src: File, dst: File, asked: int) -> int | OSError | None:
    """Copy through a pipe, which unlike sendfile(2) leaves the position of *dst* alone."""
    pipe = pipes.acquire()
    if pipe is None:
        return None
    try:
        pipe.pending = pipes.UNKNOWN
        return into_file(
            transfer, dst, asked, (src,), _splice_range, src.offset, asked, pipe, loans=(pipe,)
        )
    finally:
        pipes.release(pipe)


def _splice_range(
    src_fd: int, dst_fd: int, position: int, offset: int, asked: int, pipe: pipes.Pipe
) -> int:
    """Copy *asked* bytes through *pipe*, which is empty, or what there is; say how many.

    On exit ``pipe.pending`` is what it holds: not 0 after an error that came too late to tell.
    """
    pending = copied = 0
    try:
        refuse_uncached(src_fd)
        while pending or copied < asked:
            if not pending:
                pending = os.splice(
                    src_fd, pipe.write_fd, asked - copied, offset_src=offset + copied
                )
                if not pending:
                    break
            drained = os.splice(pipe.read_fd, dst_fd, pending, offset_dst=position + copied)
            pending -= drained
            copied += drained
    except OSError:
        if not copied:
            raise
    finally:
        pipe.pending = pending
    return copied


def through_memory(transfer: Transfer, src: File, dst: Endpoint) -> None:
    """Read and write, until *src* ends or the limit.

    On entry the objects have nothing buffered. Lets out the errors of reading and writing, with
    *src*'s offset after the last byte delivered.
    """
    buffer = memoryview(bytearray(SMALL))
    while (asked := transfer.room(SMALL)) > 0 and (
        data := read(transfer, src, src.offset, asked, buffer)
    ):
        write(transfer, dst, data, src)
