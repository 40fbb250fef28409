"""Fill a pipe from the source, drain it into the destination: the two steps and their loops.

A transfer is a loop of the two steps through a pipe that is empty whenever the loop begins, so
EAGAIN means one thing at each of them: the source has nothing, or the destination takes nothing.
What happens to bytes that the destination does not take depends only on the source. Those of a
stream exist nowhere else, so they stay in the pipe until the destination takes them. Those of a
file can be read again, so they are discarded, and a transfer to a slow reader holds no pipe while
it waits.

On entry to each loop neither object has anything buffered. It ends in one of three ways. It returns
None: the source has ended, or the limit is reached. It returns a reason: the kernel will move no
more in this way; all bytes taken are delivered, and the caller goes on in another. It raises: the
ends' own errors (OSError, TimeoutError, ValueError for a file closed under way), or what is thrown
into the waiting greenlet (GreenletExit, gevent.Timeout). In every case ``transfer.delivered`` says
how many bytes were delivered, and the pool has its pipe back, unless a thread still works on it.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from .._ends.file import File
from .._ends.pipe import CallersPipe
from .._os.linux import SPLICE_FLAGS
from .._os.results import NOT_NOW, TOOK_NOTHING, answer, error, splice
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN, Pipe
from ..config import KiB
from .account import PIECE
from .from_disk import send_from_disk
from .memory import READ_SIZE, piece_through_memory, write, write_out
from .to_disk import drain_to_disk, write_on_thread
from .transfer import Transfer

#: A fill from a file asks for twice what the socket took of the last one, but at least for this:
#: bytes that the socket does not take are spliced in vain.
LEAST_FILL: Final = 64 * KiB

#: If a splice moved fewer bytes than this, the socket is probably empty: wait for it. A second,
#: failing splice(2) costs as much as a switch to the hub and back.
LULL: Final = 128 * KiB


def file_to_socket(transfer: Transfer) -> str | None:
    """Send a file through a pipe of the pool; what the socket does not take is discarded.

    Never asks for more than fstat(2) said the file has: older kernels wait 200 ms for the rest. A
    file that was truncated meanwhile ends there.
    """
    src, dst = transfer.src, transfer.dst
    next_fill = PIECE
    while (asked := transfer.within_limit(min(PIECE, src.remaining()))) > 0:
        before = transfer.delivered
        if cached := src.cached(asked):
            pipe = acquire()
            if pipe is None:
                return "no_pipe"
            try:
                filled, drained = send_cached(transfer, pipe, cached, next_fill)
                pipe.discard()
            finally:
                release(pipe)
        else:
            answers = send_from_disk(transfer)
            if answers is None:
                return "no_pipe"
            filled, drained = answers
        if filled == 0:
            break
        if filled < 0:
            return "refused"
        if drained > 0:
            transfer.give_way()
        elif drained == NOT_NOW:
            next_fill = max(LEAST_FILL, 2 * (transfer.delivered - before))
            transfer.wait(dst.wait_write)
        elif dst.can_write_after(drained):
            return "refused"
        else:
            raise error(drained)
    return None


def send_cached(transfer: Transfer, pipe: Pipe, cached: int, next_fill: int) -> tuple[int, int]:
    """Fill and drain in turn until *cached* bytes are delivered, or the socket takes no more.

    On entry *pipe* is empty, and that many bytes at the source's offset are in the page cache. The
    first fill asks for *next_fill* bytes at most, each later one for twice as many as the last. On
    exit ``pipe.pending`` is what the pipe still holds. Returns what the last fill and the last
    drain returned, as :func:`fill` and :func:`drain` do. Lets out ValueError for a closed file.

    Nothing waits in here, so what could change during a wait is looked up once, and counted once:
    per MiB that saves 5 % of the CPU time (benchmarks/file_to_socket.py).
    """
    src_fd, dst_fd = transfer.src.fileno(), transfer.dst.fileno()
    read_fd, write_fd = pipe.read_fd, pipe.write_fd
    begin, delivered, pending, drained = transfer.src.offset, 0, 0, 1
    try:
        while True:
            asked = min(next_fill, cached - delivered)
            pending = UNKNOWN  # an exception before the result is known must not look like empty
            filled = splice(src_fd, write_fd, asked, begin + delivered)
            pending = max(0, filled)
            while pending and (drained := splice(read_fd, dst_fd, pending)) > 0:
                delivered += drained
                pending -= drained
            if filled <= 0 or pending or delivered == cached:
                return filled, drained or TOOK_NOTHING
            next_fill *= 2
    finally:
        pipe.pending = pending
        if delivered:
            transfer.count_delivered(delivered, "bytes_spliced")


def file_to_socket_by_sendfile(transfer: Transfer) -> str | None:
    """Send a file when the pool has no pipe: by sendfile(2), or read and sent if not cached."""
    src, dst = transfer.src, transfer.dst
    while (asked := transfer.within_limit(min(PIECE, src.remaining()))) > 0:
        cached = src.cached(asked)
        if not cached:
            if not piece_through_memory(transfer):
                break
            continue
        sent = answer(os.sendfile, dst.fileno(), src.fileno(), src.offset, cached)
        if sent == 0:
            break
        if sent == NOT_NOW:
            transfer.wait(dst.wait_write)
        elif sent > 0:
            transfer.count_delivered(sent, "bytes_sendfile")
            transfer.give_way()
        elif dst.can_write_after(sent):
            return "refused"
        else:
            raise error(sent)
    return None


def stream_through_pool(transfer: Transfer) -> str | None:
    """Splice from a socket through a pipe of the pool until all that was taken is delivered.

    The transfer has the pipe only while there are bytes in it: none while it waits for the source.
    An error of the destination loses what is in the pipe.
    """
    src = transfer.src
    wait_first = False
    while (asked := transfer.within_limit(min(PIECE, src.remaining() - src.withheld()))) > 0:
        if wait_first:
            transfer.wait(src.wait_read)
        else:
            transfer.give_way()
        pipe = acquire()
        if pipe is None:
            return "no_pipe"
        try:
            filled = fill(transfer, pipe, asked)
            if not drain_all(transfer, pipe):
                return "refused"
        finally:
            release(pipe)
        if filled > 0:
            if not transfer.keep_splicing(filled):
                break
            wait_first = filled < LULL
        elif filled == 0 or (filled == NOT_NOW and wait_first):
            if _has_ended(transfer, asked, filled):
                break
            wait_first = True
        elif filled == NOT_NOW:
            wait_first = True
        elif src.can_read_after(filled):
            return "refused"
        else:
            src.raise_read_error(filled)
    return None


def fill(transfer: Transfer, pipe: Pipe, asked: int) -> int:
    """Splice at most *asked* bytes of the source, a socket, into *pipe*, which is empty, once.

    Returns how many bytes that was, on exit also ``pipe.pending``; 0: the source has ended, or is
    at TCP's urgent mark. Or returns minus the errno (NOT_NOW: it has nothing now), with the pipe
    still empty. Lets out ValueError for a closed file.
    """
    fd = transfer.src.fileno()
    pipe.pending = UNKNOWN  # an exception before the result is known must not look like empty
    filled = splice(fd, pipe.write_fd, asked)
    pipe.pending = max(0, filled)
    transfer.src.note_taken(pipe.pending)
    return filled


def drain(transfer: Transfer, pipe: Pipe) -> int:
    """Splice from *pipe*, which is not empty on entry, into the destination, once.

    Returns how many bytes were delivered, or minus the errno (NOT_NOW: the destination takes
    nothing now), never 0. On exit ``pipe.pending`` is what the pipe still holds. If writing may
    have to wait for a disk, :func:`drain_to_disk` does it. Lets out ValueError for a closed file,
    and what is thrown into a greenlet that waits for a thread.
    """
    dst = transfer.dst
    if isinstance(dst, File) and dst.write_may_wait(pipe.pending):
        return drain_to_disk(transfer, pipe) or TOOK_NOTHING
    drained = splice(pipe.read_fd, dst.fileno(), pipe.pending)
    if drained > 0:
        pipe.pending -= drained
        transfer.count_delivered(drained, "bytes_spliced")
    # An error, not 0: the caller would try again, and could get 0 for ever.
    return drained or TOOK_NOTHING


def drain_all(transfer: Transfer, pipe: Pipe) -> bool:
    """Drain *pipe*, which may hold bytes of a stream, until it is empty and all are delivered.

    Returns False if the kernel does not splice into the destination (an append-only file, a
    filesystem without splice), so that the bytes were read out and written. Lets out the
    destination's errors: the bytes still in the pipe, or in an unfinished write, are then lost; and
    the source's, when a thread has met one.
    """
    while pipe.pending > 0:
        drained = drain(transfer, pipe)
        if drained == NOT_NOW and not isinstance(transfer.dst, File):
            transfer.wait(transfer.dst.wait_write)
        elif drained < 0:
            if not transfer.dst.can_write_after(drained):
                transfer.write_failed = True
                raise error(drained)
            write_out(transfer, pipe)
            return False
    return True


def with_callers_pipe(transfer: Transfer) -> str | None:
    """Splice between two ends of which one is the caller's own pipe, without a pipe of the pool.

    EAGAIN does not tell which end is not ready, so this waits for both, one after the other.
    """
    src, dst = transfer.src, transfer.dst
    waited = False
    while (asked := transfer.within_limit(min(PIECE, src.remaining() - src.withheld()))) > 0:
        spliced = _splice_directly(transfer, asked)
        if spliced > 0:
            src.note_taken(spliced)
            transfer.count_delivered(spliced, "bytes_spliced")
            transfer.give_way()
            waited = False
        elif spliced in (0, NOT_NOW):
            if (spliced == 0 or waited) and _has_ended(transfer, asked, spliced):
                break
            transfer.wait(src.wait_read)
            transfer.wait(dst.wait_write)
            waited = True
        elif src.can_read_after(spliced) and dst.can_write_after(spliced):
            return "refused"
        elif spliced == -errno.EPIPE:  # the destination's: a source has no reader to lose
            raise error(spliced)
        else:
            src.raise_read_error(spliced)
    return None


def _splice_directly(transfer: Transfer, asked: int) -> int:
    """Splice at most *asked* bytes from source to destination, once, on a thread if need be.

    Returns how many bytes that was, or minus the errno. 0: the source has ended, or (a socket) is
    at TCP's urgent mark. Lets out what :func:`drain` does.
    """
    src, dst = transfer.src, transfer.dst
    if isinstance(src, CallersPipe) and isinstance(dst, File):
        available = asked = min(asked, src.available())
        if asked and dst.write_may_wait(asked):
            spliced = write_on_thread(
                transfer, asked, (src,), _splice_to_disk, asked, promised=lambda: asked
            )
        else:  # an empty pipe: splice(2) tells whether it has ended
            spliced = splice(src.fileno(), dst.fileno(), asked or 1)
        # There is no waiting for a file that takes nothing now: the ordinary write says so.
        return TOOK_NOTHING if spliced == NOT_NOW and available else spliced
    return splice(src.fileno(), dst.fileno(), asked)


def _splice_to_disk(src_fd: int, dst_fd: int, position: int, asked: int) -> int:
    return os.splice(src_fd, dst_fd, asked, offset_dst=position, flags=SPLICE_FLAGS)


def _has_ended(transfer: Transfer, asked: int, spliced: int) -> bool:
    """Return whether the source has ended, after splice(2) took nothing though it was readable.

    At TCP's urgent mark splice(2) answers 0 or EAGAIN for ever, but recv() reads past it. Bytes
    that recv() gives are delivered. Lets out the errors of recv() and of the ordinary write.
    """
    src = transfer.src
    if isinstance(src, CallersPipe):
        return spliced == 0
    if spliced == NOT_NOW and not src.at_urgent_mark():
        return False
    data = src.receive(min(asked, READ_SIZE))
    if data == NOT_NOW:
        return False
    if isinstance(data, int):
        src.raise_read_error(data)
    write(transfer, data)
    return not data
