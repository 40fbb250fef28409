"""From a file on a disk to a socket: a thread waits for the disk and for nothing else.

It does both steps, fill and drain, for as long as the disk is quick and the socket takes all. That
is for files of which nobody can say whether they are in the page cache (FUSE, NFS): handing a job
to a thread and getting it back takes as long as splicing 300 KiB that are.
"""

from __future__ import annotations

import os
import time
from typing import Final

from .._ends.page_cache import refuse_uncached
from .._ends.socket import Socket
from .._os.results import TOOK_NOTHING, answer, splice
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN, Pipe
from ..config import MiB
from .lent_socket import LentSocket
from .transfer import Transfer

#: Most bytes of a file that a thread puts into a pipe at once; as many more are read ahead. If this
#: were more, the first byte and the next job for the thread would wait longer.
COLD_PIECE: Final = 1 * MiB

#: A job takes no further piece when so many seconds are over: others wait for the thread.
LONG: Final = 0.005


def send_from_disk(transfer: Transfer) -> tuple[int, int] | None:
    """Have a thread fill a pipe of the pool and drain it, in turn; return two answers.

    The first is how many bytes the thread has taken from the file (0: it ends there), or minus the
    errno. The other is above 0, or what the socket answered when it took no more. Returns None if
    the pool has no pipe. Lets out ValueError for a closed file, and what is thrown into the
    greenlet while it waits. The thread sends nothing more then, and what it has sent counts as
    delivered. On exit the pool has its pipe back, unless the thread still works on it.
    """
    src = transfer.src
    asked = transfer.within_limit(src.remaining())
    device = None if src.may_be_cached else src.status.st_dev
    outlet = _Outlet(transfer.dst)
    try:
        try:
            filled: int = transfer.on_thread(
                (src,),
                _fill_and_drain,
                src.offset,
                asked,
                outlet,
                device,
                resources=(outlet,),
                begin=outlet.borrow,
            )
        finally:
            if outlet.sent and transfer.began_here():
                transfer.count_delivered(outlet.sent, "bytes_spliced")
        pipe = outlet.pipe
        if pipe is None:
            return None
        if filled >= 0:
            src.may_be_cached = True
            pipe.pending = outlet.pending
        if outlet.pending and outlet.answer > 0:  # the thread could not use the socket
            outlet.answer = splice(pipe.read_fd, transfer.dst.fileno(), pipe.pending)
            pipe.pending -= max(0, outlet.answer)
            transfer.count_delivered(max(0, outlet.answer), "bytes_spliced")
        pipe.discard()
    finally:
        if outlet.pipe is not None:
            release(outlet.pipe)
    return filled, outlet.answer or TOOK_NOTHING


def _fill_and_drain(fd: int, offset: int, asked: int, outlet: _Outlet, device: int | None) -> int:
    """Fill the pipe of *outlet* and drain it; return how many bytes were taken from the file.

    *device*: the file's, if it is yet to be asked whether the page cache may be used. Lets out the
    errors of the file only if nothing was taken: the next job meets them again. Runs on a thread.
    """
    pipe = outlet.pipe
    if pipe is None:
        return 0
    if device is not None:
        refuse_uncached(fd, device)
    end = time.monotonic() + LONG
    taken = 0
    while True:
        try:
            filled = os.splice(fd, pipe.write_fd, min(asked - taken, COLD_PIECE), offset + taken)
        except OSError:
            if not taken:
                raise
            return taken
        taken += filled
        ahead = min(asked - taken, COLD_PIECE)
        if filled and ahead:
            answer(os.posix_fadvise, fd, offset + taken, ahead, os.POSIX_FADV_WILLNEED)  # or not
        outlet.drain(pipe, filled)
        if not filled or outlet.pending or taken == asked or time.monotonic() > end:
            return taken


class _Outlet(LentSocket):
    """The socket, and the pipe of the pool that a thread drains into it."""

    __slots__ = ("answer", "pending", "pipe", "sent")

    def __init__(self, dst: Socket) -> None:
        super().__init__(dst)
        #: The pipe, from when there is a thread to use it. Others would go without meanwhile.
        self.pipe: Pipe | None = None
        #: How many bytes the socket has taken, and how many are still in the pipe.
        self.sent = self.pending = 0
        #: What it answered last, if that was not how many bytes it took: minus the errno.
        self.answer = 1

    def borrow(self) -> None:
        """Borrow the pipe, if the pool has one."""
        self.pipe = acquire()
        if self.pipe is not None:
            self.pipe.pending = UNKNOWN

    def drain(self, pipe: Pipe, pending: int) -> None:
        """Splice *pending* bytes from *pipe*, or as many as the socket takes. Raises nothing."""
        self.pending = pending
        with self.descriptor() as fd:
            while self.pending and fd >= 0:
                drained = splice(pipe.read_fd, fd, self.pending)
                if drained <= 0:
                    self.answer = drained or TOOK_NOTHING
                    return
                self.sent += drained
                self.pending -= drained

    def leave_to_thread(self) -> None:
        """Let the thread send no more, and have it close the pipe when the job ends."""
        if self.pipe is not None:
            self.pipe.leave_to_thread()
        super().leave_to_thread()

    def close(self) -> None:
        """Close the pipe that was left to the thread."""
        if self.pipe is not None:
            self.pipe.close()
