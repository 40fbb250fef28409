"""Into a file on a disk: a thread writes, and waits for the disk and for nothing else.

From a socket, both steps are done there: a trip to a thread takes 0.3 ms of CPU time, so it goes on
filling and draining for as long as the socket has something.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from gevent.monkey import get_original

from .._ends.end import End
from .._ends.socket import Socket
from .._os.linux import SPLICE_FLAGS
from .._os.results import NOT_NOW, answer
from .._pool.pipe import UNKNOWN, Pipe
from .._threads.descriptor import Duplicate
from .._threads.job import Loan
from .._threads.threads import threads
from ..config import MiB
from .account import PIECE
from .transfer import Transfer

#: Most bytes that a thread moves from a socket to a file before it comes back: moving this much
#: takes 3 ms, and the way there and back 0.3 (benchmarks/download.py).
DISK_PIECE: Final = 8 * MiB

_new_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")


def into_file(
    transfer: Transfer,
    size: int,
    sources: tuple[End, ...],
    job: Callable[..., int],
    *args: Any,
    loans: tuple[Loan, ...] = (),
    promised: Callable[[], int] | None = None,
) -> int:
    """Have a thread write at most *size* bytes where the destination, a file, stands.

    Calls ``job(*descriptors of sources, that of the file, where to write, *args)``, and returns how
    many bytes it says it wrote, or minus the errno. On exit the file is left to stand after them.
    If interrupted while the thread is running, it is left to stand after ``promised()`` bytes,
    because the thread will still write those. Without *promised* the source can be read again, so
    it stands where it stood, although the thread may still write there. Lets out what
    :meth:`Transfer.on_thread` does.
    """
    dst = transfer.dst
    done: list[int] = []

    def write(*args: Any) -> int:
        done.append(job(*args))
        return done[0]

    pool = threads()
    turn = None
    if pool is not None:  # two that reserve at the same time could not both go back
        turn = pool.turn_to_write((dst.status.st_dev, dst.status.st_ino))
        loans = (*loans, turn)
    try:
        transfer.check_process()
        position = dst.reserve(size)
        written = 0
        try:
            result: int = transfer.on_thread((*sources, dst), write, position, *args, loans=loans)
            written = max(0, result)
            return result
        except BaseException:
            if promised is not None:
                at_work = turn is not None and turn.lent
                written = promised() if at_work else sum(done)
            raise
        finally:
            if transfer.is_ours():
                dst.settle(position, size, written)
    finally:
        if turn is not None and not turn.lent:
            turn.end()


def drain_to_disk(transfer: Transfer, pipe: Pipe) -> int:
    """Have a thread drain *pipe*, not empty on entry, and what the source holds by then.

    The source is a socket. Meanwhile the file stands behind all of that, and the source counts it
    as taken. Returns how many bytes were delivered, or minus the errno if none were; on exit
    ``pipe.pending`` is what the pipe still holds, because of an error that comes again. Lets out
    what the source makes of its own errors, with the pipe empty. If the wait is interrupted,
    nothing more is taken, the file stands behind what had been, and the thread, which may have the
    pipe then, still writes that.
    """
    src = transfer.src
    pending, pipe.pending = pipe.pending, UNKNOWN
    most = max(0, transfer.room(DISK_PIECE) - pending)
    tap = _Tap(src, min(most, src.left() - src.kept(), src.holds()) if most else 0)
    src.took(tap.left)  # another reader must not count it, too
    try:
        written = into_file(
            transfer,
            pending + tap.left,
            (),
            _drain_and_fill,
            pending,
            pipe,
            tap,
            loans=(pipe, tap),
            promised=lambda: pending + tap.taken,
        )
    finally:
        src.took(-tap.left)
    pipe.pending = pending + tap.taken - max(0, written)
    if written > 0:
        transfer.moved(written, "bytes_spliced")
    if tap.failure and not pipe.pending and not src.may_be_read(tap.failure):
        src.raise_own(tap.failure)
    return written


def _drain_and_fill(dst_fd: int, position: int, pending: int, pipe: Pipe, tap: _Tap) -> int:
    """Drain *pending* bytes, and fill and drain until the tap gives no more. Runs on a thread.

    Returns how many bytes it wrote. Lets out the errors of the drain if it wrote none: else they
    come again.
    """
    written = 0
    while pending:
        try:
            drained = os.splice(pipe.read_fd, dst_fd, pending, offset_dst=position + written)
        except OSError:
            if not written:
                raise
            break
        if not drained:
            break
        written += drained
        pending = pending - drained or tap.fill(pipe)
    return written


class _Tap:
    """The right of a thread to take bytes from a socket, until its greenlet ends."""

    __slots__ = ("_inode", "_lock", "_process", "_src", "failure", "left", "lent", "taken")

    def __init__(self, src: Socket, left: int) -> None:
        self._src = src
        #: How many bytes may still be taken, how many have been, and the socket's error (minus its
        #: errno), or 0.
        self.left = left
        self.taken = 0
        self.failure = 0
        #: Whether the greenlet has gone.
        self.lent = False
        self._inode = os.fstat(src.fileno()).st_ino if left else 0
        self._lock = _new_lock()
        self._process = os.getpid()

    def fill(self, pipe: Pipe) -> int:
        """Splice from the socket into *pipe*, which is empty; return how much. Raises nothing.

        Returns 0 if no bytes are ready, the limit is reached, the greenlet stopped waiting, the
        socket is closed, or splice(2) failed (see :attr:`failure`).
        """
        with self._lock:
            if self.lent or not self.left:
                return 0
            try:
                # Socket's own fileno(), so that a body translates its errors in its greenlet, not
                # on this thread. The duplicate is closed right after the call: while it is open,
                # closing the socket sends no FIN.
                own = Duplicate(Socket.fileno(self._src))
            except (OSError, ValueError):  # closed
                return 0
            try:
                if os.fstat(own.fd).st_ino != self._inode:
                    return 0  # closed, and its number is another's
                most = min(self.left, PIECE)
                filled: int = answer(os.splice, own.fd, pipe.write_fd, most, flags=SPLICE_FLAGS)
            finally:
                own.drop()
            if filled < 0:
                self.failure = 0 if filled == NOT_NOW else filled
                return 0
            self.left -= filled
            self.taken += filled
            return filled

    def lend(self) -> None:
        """Have nothing more taken. Waits for a splice(2) that does not wait itself."""
        if os.getpid() != self._process:  # forked: who had the lock may be gone
            self.lent = True
            return
        with self._lock:
            self.lent = True

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""
