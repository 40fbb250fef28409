"""The loops that move bytes between two ends: the only room that calls splice and its relatives.

A loop ends in one of three ways. It returns None: the source has ended, or the limit is reached.
It returns a reason: this way leads no further; everything taken in has been delivered, and the
caller goes on another way. It raises: the ends' own errors (OSError, TimeoutError, ValueError for a
file closed under way), and whatever is thrown into a greenlet that waits (GreenletExit,
gevent.Timeout). In every case ``Transfer.delivered`` says how many bytes have arrived, and no pipe
is lent any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

import gevent
from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent

from . import pipes
from ._linux import SPLICE_FLAGS
from ._stats import counters
from .config import PIECE, SMALL
from .endpoints import Endpoint, File, Pipe, Socket

#: What the kernel, a filesystem or a sandbox answers when it will not move bytes between these two
#: ends in this way. Any other error is the ends' own.
_REFUSALS: Final = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.ESPIPE}
)


class _Refused(Exception):
    """The kernel will not fill a pipe from this source."""


class Transfer:
    """One transfer: how much has been delivered, how much may still be, and whose it is."""

    __slots__ = ("_process", "_since_switch", "delivered", "limit")

    def __init__(self, limit: int | None = None, delivered: int = 0) -> None:
        #: Bytes delivered, and the most that may be; None: until the source ends.
        self.delivered = delivered
        self.limit = limit
        self._since_switch = 0
        self._process = os.getpid()

    def room(self, most: int) -> int:
        """Return how many bytes may be asked for next, *most* at the most; 0 at the limit."""
        return most if self.limit is None else min(most, self.limit - self.delivered)

    def moved(self, number: int, counter: str) -> None:
        """Note that *number* bytes have been delivered."""
        if self.delivered:
            counters.add(counter, number)
        else:
            counters.add_transfer(counter, number)
        self.delivered += number
        self._since_switch += number

    def wait(self, wait: Callable[[], None]) -> None:
        """Wait for an end to be ready. Lets out what the end's own wait raises."""
        self._since_switch = 0
        wait()
        self.check_process()

    def give_way(self) -> None:
        """Let other greenlets run when PIECE bytes have moved since they last could."""
        if self._since_switch >= PIECE:
            self._since_switch = 0
            hub = get_hub_if_exists()
            if hub is not None and hub is not getcurrent():
                gevent.sleep(0)
                self.check_process()

    def leave(self, src: Endpoint, dst: Endpoint) -> None:
        """Make both objects stand where the delivered bytes left them.

        Not in a forked child, which shares the position of every file with its parent.
        """
        if self._is_ours():
            src.leave_source()
            dst.leave_sink()

    def _is_ours(self) -> bool:
        # Asked for, not noted by a handler after the fork: another handler that runs before ours
        # may switch to this greenlet.
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raise in a forked child: the transfer, its descriptors and its peer are the parent's."""
        if not self._is_ours():
            raise OSError(
                errno.ECANCELED,
                "transfer was under way in the parent process when this one was forked",
            )


def move(transfer: Transfer, src: Endpoint, dst: Endpoint) -> bool:
    """Move from *src* to *dst* the way that suits the two, until *src* ends or the limit.

    On entry neither object is used by anybody else, and they are not the same file. What *src* has
    read ahead and *dst* has not written yet goes first. On exit both objects stand where the
    delivered bytes left them.
    """
    if isinstance(src, File) and (reason := _better_read(transfer, src, dst)):
        counters.fell_back(reason)
        return False
    if isinstance(src, File):
        src.offset = src.obj.tell()
    try:
        ahead = src.read_ahead(transfer.limit)
        dst.flush()
        write(transfer, dst, ahead, src)
        reason = _way(src, dst)(transfer, src, dst)
    finally:
        transfer.leave(src, dst)
    if reason is not None:
        counters.fell_back(reason)
    return reason is None


def finish(transfer: Transfer, src: File, dst: Endpoint) -> None:
    """Read and write what *src* still has, after :func:`move`, until it ends or the limit.

    On exit both objects stand where the delivered bytes left them.
    """
    src.offset = src.obj.tell()
    dst.flush()
    try:
        file_through_memory(transfer, src, dst)
    finally:
        transfer.leave(src, dst)


def _better_read(transfer: Transfer, src: File, dst: Endpoint) -> str | None:
    """Return why reading *src* into memory is the way to go, if it is."""
    if transfer.room(src.status.st_size - src.obj.tell()) <= SMALL:
        return "small"
    if isinstance(dst, Pipe):
        # The pages would wait in the pipe by reference, changing with the file, perhaps for ever.
        return "file_to_pipe"
    return None


def _way(src: Endpoint, dst: Endpoint) -> Callable[[Transfer, Any, Any], str | None]:
    if isinstance(src, File):
        return file_to_socket if isinstance(dst, Socket) else file_to_file
    if isinstance(src, Pipe) or isinstance(dst, Pipe):
        return directly
    return through_pool


def write(transfer: Transfer, dst: Endpoint, data: bytes, src: Endpoint | None = None) -> None:
    """Write all of *data*, read from *src*, to *dst*, whose object has nothing buffered.

    Lets out the errors of the ordinary write(); what had not been written then is lost, unless
    *src* is a file, which is left to stand before it.
    """
    view = memoryview(data)
    while view:
        try:
            written = dst.write_some(view[:PIECE])
        except BlockingIOError:
            transfer.wait(dst.wait_write)
            continue
        view = view[written:]
        if isinstance(src, File):
            src.offset += written
        transfer.moved(written, "bytes_copied")
        transfer.give_way()


def send_file(transfer: Transfer, src: File, dst: Socket) -> None:
    """Send from *src*, whose object stands at its offset, until it ends, or the limit.

    On exit the object stands where sending stopped. Lets out the errors of the two ends.
    """
    try:
        if transfer.room(src.status.st_size - src.offset) > SMALL:
            file_through_memory(transfer, src, dst, src.ahead())
            reason = file_to_socket(transfer, src, dst)
            if reason is not None:
                counters.fell_back(reason)
            src.leave_source()
        file_through_memory(transfer, src, dst)  # all, or what has been added in the meantime
    finally:
        transfer.leave(src, dst)


def file_to_socket(transfer: Transfer, src: File, dst: Socket) -> str | None:
    """Send from *src*, at its offset, with sendfile(2): nothing is taken in that could be lost.

    Never asks for more than the file has: older kernels wait 200 ms for the rest. A file cut short
    under way ends there. Lets out what sendfile(2) says of the socket or the disk.
    """
    while (asked := transfer.room(min(PIECE, src.size() - src.offset))) > 0:
        try:
            sent = os.sendfile(dst.fileno(), src.fileno(), src.offset, asked)
        except BlockingIOError:
            transfer.wait(dst.wait_write)
            continue
        except OSError as err:
            if err.errno in _REFUSALS:
                return "refused"
            raise
        if sent == 0:
            break
        src.offset += sent
        transfer.moved(sent, "bytes_sendfile")
        transfer.give_way()
    return None


def file_through_memory(
    transfer: Transfer, src: File, dst: Endpoint, most: int | None = None
) -> None:
    """Read and write, as the original functions do: *most* bytes, or until *src* ends.

    On entry *src*'s object stands at its offset; on exit by an error it may stand further on than
    the offset, which is where delivery stopped. Lets out the errors of read() and write().
    """
    end = None if most is None else transfer.delivered + most
    while (asked := transfer.room(SMALL if end is None else end - transfer.delivered)) > 0:
        data = src.obj.read(asked)
        if not data:
            break
        write(transfer, dst, data, src)


def file_to_file(transfer: Transfer, src: File, dst: File) -> str | None:
    """Copy from *src*, at its offset, to where *dst* stands: copy_file_range(2), else sendfile(2).

    Any error of these ends the way, not the transfer: nothing is under way between the calls, so
    the next way meets the same error and, if there is none left, the original function raises it.
    """
    ways = [("bytes_sendfile", _sendfile_to_file)]
    if hasattr(os, "copy_file_range"):  # not where Python was built with glibc < 2.27
        ways.insert(0, ("bytes_copy_file_range", _copy_file_range))
    while (asked := transfer.room(min(PIECE, src.size() - src.offset))) > 0:
        counter, call = ways[0]
        try:
            copied = call(src, dst, asked)
        except OSError:
            del ways[0]
            if not ways:
                return "refused"
            continue
        if copied == 0:
            break
        src.offset += copied
        transfer.moved(copied, counter)
        transfer.give_way()
    return None


def _copy_file_range(src: File, dst: File, asked: int) -> int:
    return os.copy_file_range(src.fileno(), dst.fileno(), asked, offset_src=src.offset)


def _sendfile_to_file(src: File, dst: File, asked: int) -> int:
    return os.sendfile(dst.fileno(), src.fileno(), src.offset, asked)


def directly(transfer: Transfer, src: Socket | Pipe, dst: Endpoint) -> str | None:
    """Splice between two ends of which one is the caller's own pipe; nothing is borrowed.

    EAGAIN does not tell which end is not ready (the caller's pipe may well be full, or stalled), so
    both are waited for, one after the other. Lets out what splice(2) says of the ends.
    """
    waited = False
    while (asked := transfer.room(PIECE)) > 0:
        number: int | None
        try:
            number = os.splice(src.fileno(), dst.fileno(), asked, flags=SPLICE_FLAGS)
        except BlockingIOError:
            number = None
        except OSError as err:
            if err.errno in _REFUSALS:
                return "refused"
            raise
        if number:
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


def through_pool(transfer: Transfer, src: Socket, dst: Endpoint) -> str | None:
    """Splice from *src* to *dst* through a pipe of the pool, lent only while it holds bytes.

    The pipe is empty whenever a fill starts, so EAGAIN means one thing at each leg: *src* has
    nothing, or *dst* has no room. Lets out what splice(2) says of the ends.
    """
    waited = False
    while (asked := transfer.room(PIECE)) > 0:
        pipe = pipes.acquire()
        if pipe is None:
            return "no_pipe"
        try:
            filled = fill(pipe, src, asked)
            if filled and not drain(transfer, pipe, dst):
                return "refused"
        except _Refused:
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
    None: *src* has nothing now, and the pipe is still empty. Lets out _Refused, and what splice(2)
    says of *src*, with the pipe still empty.
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
        if err.errno in _REFUSALS:
            raise _Refused from None
        raise
    return pipe.pending


def drain(transfer: Transfer, pipe: pipes.Pipe, dst: Endpoint) -> bool:
    """Splice all of *pipe*, which is not empty on entry, into *dst*.

    On exit the pipe is empty and its bytes are delivered. False: the kernel does not splice into
    *dst* (an append-only file, a filesystem without splice); they were written the ordinary way.
    Lets out what splice(2), or the ordinary write, says of *dst*: bytes that are still in the pipe,
    or in the ordinary write, are lost then.
    """
    while pipe.pending:
        try:
            drained = os.splice(pipe.read_fd, dst.fileno(), pipe.pending, flags=SPLICE_FLAGS)
        except BlockingIOError:
            transfer.wait(dst.wait_write)
            continue
        except OSError as err:
            if err.errno not in _REFUSALS:
                raise
            while pipe.pending:
                data = os.read(pipe.read_fd, pipe.pending)
                pipe.pending -= len(data)
                write(transfer, dst, data)
            return False
        pipe.pending -= drained
        transfer.moved(drained, "bytes_spliced")
    return True
