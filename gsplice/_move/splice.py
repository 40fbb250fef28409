"""Fill a pipe from the source, drain it into the destination: the two steps and their loops.

A transfer is a loop of the two steps through a pipe that is empty whenever the loop begins, so
EAGAIN means one thing at each of them: the source has nothing, or the destination takes nothing.
What the destination does not take depends on the source alone. The bytes of a stream exist nowhere
else, so they stay in the pipe until they are taken. Those of a file can be read again, so they are
given up, and no pipe is held while a slow reader is waited for.

Each loop ends in one of three ways. It returns None: the source has ended, or the limit is reached.
It returns a reason: this way leads no further; everything taken in has been delivered, and the
caller goes on another way. It raises: the ends' own errors (OSError, TimeoutError, ValueError for a
file closed under way), and whatever is thrown into a greenlet that waits (GreenletExit,
gevent.Timeout). In every case ``transfer.delivered`` says how many bytes have arrived, and no pipe
is lent any more, unless a thread is still at work on it.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from .._ends.file import File
from .._ends.page_cache import refuse_uncached
from .._ends.pipe import CallersPipe
from .._os.linux import SPLICE_FLAGS
from .._os.results import NOT_NOW, TOOK_NOTHING, answer, error
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN, Pipe
from ..config import KiB, MiB
from .account import PIECE
from .memory import READ_SIZE, piece_through_memory, write, write_out
from .to_disk import drain_to_disk, into_file
from .transfer import Transfer

#: Most bytes of a file that a thread puts into a pipe at once, while as many more are read ahead.
#: More makes the first byte, and whoever queues for the thread, wait longer.
COLD_PIECE: Final = 1 * MiB

#: A fill from a file asks for twice what the socket took of the last one, and at least for this.
#: What the socket does not take has been put into the pipe in vain.
LEAST_FILL: Final = 64 * KiB

#: If a splice took fewer bytes than this from a socket, that is probably empty: wait for it. A
#: second splice(2) that fails costs as much as a switch to the hub and back.
LULL: Final = 128 * KiB


def file_to_socket(transfer: Transfer) -> str | None:
    """Send a file through a pipe of the pool; what the socket does not take is given up.

    Never asks for more than the file has: older kernels wait 200 ms for the rest. A file cut short
    under way ends there.
    """
    src, dst = transfer.src, transfer.dst
    most = PIECE
    while (asked := transfer.room(min(most, src.left()))) > 0:
        pipe = acquire()
        if pipe is None:
            return "no_pipe"
        try:
            filled = fill(transfer, pipe, asked)
            drained = taken = 0
            while pipe.pending and drained >= 0:
                drained = drain(transfer, pipe)
                taken += max(0, drained)
            pipe.discard()
        finally:
            release(pipe)
        if filled == 0:
            break
        if filled < 0:
            return "refused"
        most = min(PIECE, max(LEAST_FILL, 2 * taken))
        if drained > 0:
            transfer.give_way()
        elif drained == NOT_NOW:
            transfer.wait(dst.wait_write)
        elif dst.may_be_written(drained):
            return "refused"
        else:
            raise error(drained)
    return None


def file_to_socket_by_sendfile(transfer: Transfer) -> str | None:
    """Send a file where the pool has no pipe to lend: sendfile(2) has one of its own."""
    src, dst = transfer.src, transfer.dst
    while (asked := transfer.room(min(PIECE, src.left()))) > 0:
        ready = src.ready(asked)
        if not ready:
            if not piece_through_memory(transfer):
                break
            continue
        sent = answer(os.sendfile, dst.fileno(), src.fileno(), src.offset, ready)
        if sent == 0:
            break
        if sent == NOT_NOW:
            transfer.wait(dst.wait_write)
        elif sent > 0:
            transfer.moved(sent, "bytes_sendfile")
            transfer.give_way()
        elif dst.may_be_written(sent):
            return "refused"
        else:
            raise error(sent)
    return None


def stream_through_pool(transfer: Transfer) -> str | None:
    """Splice a socket's bytes to anything through a pipe of the pool, which keeps what is in it.

    The pipe is lent only while it holds bytes: an idle transfer has none.
    """
    src = transfer.src
    waited = False
    while (asked := transfer.room(min(PIECE, src.left() - src.kept()))) > 0:
        if waited:
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
            if not transfer.goes_on(filled):
                break
            waited = filled < LULL
        elif filled == 0 or (filled == NOT_NOW and waited):
            if _has_ended(transfer, asked, filled):
                break
            waited = True
        elif filled == NOT_NOW:
            waited = True
        elif src.may_be_read(filled):
            return "refused"
        else:
            src.raise_own(filled)
    return None


def fill(transfer: Transfer, pipe: Pipe, asked: int) -> int:
    """Splice at most *asked* bytes of the source into *pipe*, which is empty on entry.

    On exit ``pipe.pending`` is what it holds, and returned: 0 is the end of the source, and nothing
    else is. Below 0 it is minus the errno (NOT_NOW: a stream has nothing now), and the pipe is
    still empty. What is not in the page cache is spliced on a thread. Lets out ValueError for a
    file that has been closed, and what is thrown into a greenlet that waits for a thread.
    """
    src = transfer.src
    fd = src.fileno()
    pipe.pending = UNKNOWN  # until the call has told: an exception may come in between
    if not isinstance(src, File):
        filled = answer(os.splice, fd, pipe.write_fd, asked, flags=SPLICE_FLAGS)
    elif ready := src.ready(asked):
        filled = answer(os.splice, fd, pipe.write_fd, ready, src.offset, flags=SPLICE_FLAGS)
    else:
        asked = min(asked, COLD_PIECE)
        ahead = min(transfer.room(src.left()) - asked, COLD_PIECE)
        filled = transfer.on_thread(
            (src,), _fill_from_disk, pipe, src.offset, asked, ahead, loans=(pipe,)
        )
    pipe.pending = max(0, filled)  # splice(2) answers with an error only if it moved nothing
    src.took(pipe.pending)
    return filled  # type: ignore[no-any-return]


def _fill_from_disk(fd: int, pipe: Pipe, offset: int, asked: int, ahead: int) -> int:
    """Splice from a file into *pipe*, and have *ahead* bytes more read. Runs on a thread."""
    refuse_uncached(fd)
    filled = os.splice(fd, pipe.write_fd, asked, offset)
    if ahead > 0:
        os.posix_fadvise(fd, offset + filled, ahead, os.POSIX_FADV_WILLNEED)
    return filled


def drain(transfer: Transfer, pipe: Pipe) -> int:
    """Splice from *pipe*, which is not empty on entry, into the destination, once.

    Returns how many bytes that was, or minus the errno (NOT_NOW: the destination takes nothing
    now). On exit they are delivered and ``pipe.pending`` is what the pipe still holds. What may
    have to wait for a disk goes by a thread. Lets out ValueError for a file that has been closed,
    and what is thrown into a greenlet that waits for a thread.
    """
    dst = transfer.dst
    if isinstance(dst, File) and dst.write_waits(pipe.pending):
        return drain_to_disk(transfer, pipe) or TOOK_NOTHING
    drained: int = answer(os.splice, pipe.read_fd, dst.fileno(), pipe.pending, flags=SPLICE_FLAGS)
    if drained > 0:
        pipe.pending -= drained
        transfer.moved(drained, "bytes_spliced")
    # Asked again, what takes 0 bytes of a pipe that holds some could say so for ever.
    return drained or TOOK_NOTHING


def drain_all(transfer: Transfer, pipe: Pipe) -> bool:
    """Drain *pipe*, which holds bytes of a stream, or none, until it is empty and all delivered.

    False: the kernel does not splice into the destination (an append-only file, a filesystem
    without splice); the bytes were written the ordinary way. Lets out the destination's errors: the
    bytes that are still in the pipe, or in the ordinary write, are lost then.
    """
    while pipe.pending:
        drained = drain(transfer, pipe)
        if drained == NOT_NOW:
            transfer.wait(transfer.dst.wait_write)
        elif drained < 0:
            if not transfer.dst.may_be_written(drained):
                raise error(drained)
            write_out(transfer, pipe)
            return False
    return True


def with_callers_pipe(transfer: Transfer) -> str | None:
    """Splice between two ends of which one is the caller's own pipe; nothing is borrowed.

    EAGAIN does not tell which end is not ready (the caller's pipe may well be full, or stalled), so
    both are waited for, one after the other.
    """
    src, dst = transfer.src, transfer.dst
    waited = False
    while (asked := transfer.room(min(PIECE, src.left() - src.kept()))) > 0:
        spliced = _splice_directly(transfer, asked)
        if spliced > 0:
            src.took(spliced)
            transfer.moved(spliced, "bytes_spliced")
            transfer.give_way()
            waited = False
        elif spliced in (0, NOT_NOW):
            if (spliced == 0 or waited) and _has_ended(transfer, asked, spliced):
                break
            transfer.wait(src.wait_read)
            transfer.wait(dst.wait_write)
            waited = True
        elif src.may_be_read(spliced) and dst.may_be_written(spliced):
            return "refused"
        elif spliced == -errno.EPIPE:  # the destination's: a source has no reader to lose
            raise error(spliced)
        else:
            src.raise_own(spliced)
    return None


def _splice_directly(transfer: Transfer, asked: int) -> int:
    """Splice at most *asked* bytes from end to end; return how many, or minus the errno.

    What may have to wait for a disk goes by a thread. Lets out what :func:`drain` does.
    """
    src, dst = transfer.src, transfer.dst
    if isinstance(src, CallersPipe) and isinstance(dst, File):
        asked = min(asked, src.holds())
        if asked and dst.write_waits(asked):
            return into_file(
                transfer, asked, (src,), _splice_to_disk, asked, promised=lambda: asked
            )
        asked = asked or 1  # to learn whether it is at its end
    return answer(os.splice, src.fileno(), dst.fileno(), asked, flags=SPLICE_FLAGS)  # type: ignore[no-any-return]


def _splice_to_disk(src_fd: int, dst_fd: int, position: int, asked: int) -> int:
    return os.splice(src_fd, dst_fd, asked, offset_dst=position, flags=SPLICE_FLAGS)


def _has_ended(transfer: Transfer, asked: int, spliced: int) -> bool:
    """Say whether the source has ended, of which splice(2) took nothing although it is readable.

    At TCP's urgent mark splice(2) answers 0 or EAGAIN for ever; recv() goes on behind it. What it
    gives is delivered. Lets out the errors of recv() and of the ordinary write.
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
        src.raise_own(data)
    write(transfer, data)
    return not data
