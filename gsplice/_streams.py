"""From a stream to anything: through a pipe of the pool, or directly if one end is a pipe."""

from __future__ import annotations

import errno
import os

from . import pipes
from ._linux import SPLICE_FLAGS
from ._pump import pump
from ._transfer import Transfer, into_file, is_refusal, write, write_out
from .config import PIECE, SMALL
from .endpoints import Endpoint, File, Pipe, Socket


class Refused(Exception):
    """The kernel will not fill a pipe from this source."""


def directly(transfer: Transfer, src: Socket | Pipe, dst: Endpoint) -> str | None:
    """Splice between two ends of which one is the caller's own pipe; nothing is borrowed.

    EAGAIN does not tell which end is not ready (the caller's pipe may well be full, or stalled), so
    both are waited for, one after the other. Lets out what splice(2) says of the ends.
    """
    waited = False
    while (asked := transfer.room(min(PIECE, src.left() - src.kept()))) > 0:
        result = _splice(transfer, src, dst, asked)
        if isinstance(result, OSError) and not isinstance(result, BlockingIOError):
            if is_refusal(result, src, dst):
                return "refused"
            try:
                if result.errno != errno.EPIPE:  # that one is the destination's
                    src.failed(result)
                raise result
            finally:
                del result
        number = result if isinstance(result, int) else None
        if number:
            src.took(number)
            transfer.moved(number, "bytes_spliced")
            transfer.give_way()
            waited = False
        elif (number == 0 or waited) and _has_ended(transfer, src, dst, asked, number):
            break
        else:
            transfer.wait(src.wait_read)
            transfer.wait(dst.wait_write)
            waited = True
    return None


def _splice(transfer: Transfer, src: Socket | Pipe, dst: Endpoint, asked: int) -> int | OSError:
    """Splice at most *asked* bytes from *src* to *dst*; return how many, or the error.

    What may have to wait for a disk goes by a thread. Raises as :meth:`Transfer.on_thread` does.
    """
    if isinstance(src, Pipe) and isinstance(dst, File):
        asked = min(asked, src.holds())
        if asked and dst.write_waits(asked):
            return into_file(
                transfer, dst, asked, (src,), _splice_to, asked, promised=lambda: asked
            )
        asked = asked or 1  # to learn whether it is at its end
    try:
        return os.splice(src.fileno(), dst.fileno(), asked, flags=SPLICE_FLAGS)
    except OSError as err:
        return err.with_traceback(None)  # whose frame leads to the caller's, which has it


def _splice_to(src_fd: int, dst_fd: int, position: int, asked: int) -> int:
    return os.splice(src_fd, dst_fd, asked, offset_dst=position, flags=SPLICE_FLAGS)


def through_pool(transfer: Transfer, src: Socket, dst: Endpoint) -> str | None:
    """Splice from *src* to *dst* through a pipe of the pool, lent only while it holds bytes.

    The pipe is empty whenever a fill starts, so EAGAIN means one thing at each leg: *src* has
    nothing, or *dst* has no room. Lets out what splice(2) says of the ends.
    """
    waited = False
    while (asked := transfer.room(min(PIECE, src.left() - src.kept()))) > 0:
        pipe = pipes.acquire()
        if pipe is None:
            return "no_pipe"
        try:
            filled = fill(pipe, src, asked)
            if filled and not _empty(transfer, pipe, src, dst):
                return "refused"
        except Refused:
            return "refused"
        finally:
            pipes.release(pipe)
        if filled:
            transfer.give_way()
            waited = False
        elif (filled == 0 or waited) and _has_ended(transfer, src, dst, asked, filled):
            break
        else:
            transfer.wait(src.wait_read)
            waited = True
    return None


def _empty(transfer: Transfer, pipe: pipes.Pipe, src: Socket, dst: Endpoint) -> bool:
    """Drain *pipe* into *dst*, on a thread if that may have to wait for a disk."""
    if isinstance(dst, File) and dst.write_waits(pipe.pending):
        return pump(transfer, pipe, src, dst)
    return drain(transfer, pipe, dst)


def _has_ended(
    transfer: Transfer, src: Socket | Pipe, dst: Endpoint, asked: int, spliced: int | None
) -> bool:
    """Say whether *src* has ended, from which splice(2) took nothing although it is readable.

    At TCP's urgent mark splice(2) answers 0 or EAGAIN (*spliced* is None) for ever; recv() goes on
    behind it. What it gives is delivered. Lets out the errors of recv() and of the ordinary write.
    """
    if isinstance(src, Pipe):
        return spliced == 0
    if spliced is None and not src.at_urgent_mark():
        return False
    try:
        data = src.receive(min(asked, SMALL))
    except BlockingIOError:
        return False
    write(transfer, dst, data)
    return not data


def fill(pipe: pipes.Pipe, src: Socket, asked: int) -> int | None:
    """Splice at most *asked* bytes from *src* into *pipe*, which is empty on entry.

    On exit ``pipe.pending`` is what it holds, and returned. 0 is end of file, and nothing else is;
    None: *src* has nothing now, and the pipe is still empty. Lets out Refused, and what *src*
    makes of an error of splice(2), with the pipe still empty.
    """
    fd = src.fileno()
    pipe.pending = pipes.UNKNOWN  # until the call has told: an exception may come in between
    try:
        pipe.pending = os.splice(fd, pipe.write_fd, asked, flags=SPLICE_FLAGS)
    except BlockingIOError:
        pipe.pending = 0
        return None
    except OSError as err:
        pipe.pending = 0  # splice(2) answers with an error only if it moved nothing
        if is_refusal(err, src, None):
            raise Refused from None
        src.failed(err)
    src.took(pipe.pending)
    return pipe.pending


def drain(transfer: Transfer, pipe: pipes.Pipe, dst: Endpoint) -> bool:
    """Splice all of *pipe*, which is not empty on entry, into *dst*.

    On exit the pipe is empty and its bytes are delivered. False: the kernel does not splice into
    *dst* (an append-only file, a filesystem without splice); they were written the ordinary way.
    Lets out what the ordinary write, or splice(2) into a connection, says of *dst*: bytes that are
    still in the pipe, or in the ordinary write, are lost then.
    """
    while pipe.pending:
        try:
            drained = os.splice(pipe.read_fd, dst.fileno(), pipe.pending, flags=SPLICE_FLAGS)
        except BlockingIOError:
            transfer.wait(dst.wait_write)
            continue
        except OSError as err:
            if not is_refusal(err, None, dst):
                raise
            write_out(transfer, pipe, dst)
            return False
        pipe.pending -= drained
        transfer.moved(drained, "bytes_spliced")
    return True
