"""From a socket to a disk: both legs on a thread, which waits for the disk and for nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gevent.monkey import get_original

from . import pipes
from ._linux import SPLICE_FLAGS
from ._transfer import Transfer, into_file, is_refusal, write_out
from .config import PIECE, PUMP
from .endpoints import File, Socket
from .offload import Descriptor

_new_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")


def pump(transfer: Transfer, pipe: pipes.Pipe, src: Socket, dst: File) -> bool:
    """Have a thread drain *pipe*, not empty on entry, into *dst*, and what *src* holds by then.

    Meanwhile *dst* stands behind all of that, and *src* counts it as taken. On exit the pipe is
    empty and its bytes are delivered. False: the kernel splices no further; what had been taken was
    written the ordinary way. Lets out what the ordinary write says of *dst*, with what it did not
    take lost, and what *src* makes of its own errors. If the wait is interrupted,
    nothing more is taken, *dst* stands behind what had been, and the thread, which may have the
    pipe then, still writes that.
    """
    most = max(0, transfer.room(PUMP) - pipe.pending)
    while pipe.pending:
        tap = _Tap(src, min(most, src.left() - src.kept(), src.holds()) if most else 0)
        most = 0  # what is left in the pipe is there because of an error, which comes again
        result = _on_thread(transfer, pipe, src, dst, tap)
        if isinstance(result, OSError):
            write_out(transfer, pipe, dst)  # which says what is wrong with the file
            return False
        transfer.moved(result, "bytes_spliced")
        if tap.error is not None:
            if is_refusal(tap.error, src, None):
                return False
            error, tap.error = tap.error, None
            try:
                src.failed(error)
            finally:
                del error
    return True


def _on_thread(
    transfer: Transfer, pipe: pipes.Pipe, src: Socket, dst: File, tap: _Tap
) -> int | OSError:
    """Have a thread do :func:`_pump`; return how many bytes it did, or its error.

    Entry, and what an interruption leaves, are those of :func:`pump`. Raises as
    :meth:`Transfer.on_thread` does.
    """
    pending, pipe.pending = pipe.pending, pipes.UNKNOWN
    size = pending + tap.left
    src.took(tap.left)  # another reader must not count it, too
    try:
        return into_file(
            transfer,
            dst,
            size,
            (),
            _pump,
            pending,
            pipe,
            tap,
            loans=(pipe, tap),
            promised=lambda: pending + tap.taken,
        )
    finally:
        src.took(-tap.left)


def _pump(dst_fd: int, position: int, pending: int, pipe: pipes.Pipe, tap: _Tap) -> int:
    """Drain *pending* bytes, and fill and drain until the tap gives no more; say how many.

    On exit ``pipe.pending`` is what it holds. Lets out the errors of the drain, unless it had moved
    something: they come again then.
    """
    written = 0
    try:
        while pending:
            drained = os.splice(pipe.read_fd, dst_fd, pending, offset_dst=position + written)
            pending -= drained
            written += drained
            if not pending:
                pending = tap.fill(pipe)
    except OSError:
        if not written:
            raise
    finally:
        pipe.pending = pending
    return written


class _Tap:
    """The right of a thread to take bytes from a socket, until its greenlet ends."""

    __slots__ = ("_inode", "_lock", "_process", "_src", "error", "left", "lent", "taken")

    def __init__(self, src: Socket, left: int) -> None:
        self._src = src
        #: How many bytes may still be taken, how many have been, and the socket's error.
        self.left = left
        self.taken = 0
        self.error: OSError | None = None
        #: Whether the greenlet has gone.
        self.lent = False
        self._inode = os.fstat(src.fileno()).st_ino if left else 0
        self._lock = _new_lock()
        self._process = os.getpid()

    def fill(self, pipe: pipes.Pipe) -> int:
        """Splice from the socket into *pipe*, which is empty; return how much. Raises nothing.

        0: there is nothing now, or no more, or the greenlet has gone, or the socket.
        """
        with self._lock:
            if self.lent or not self.left:
                return 0
            try:
                # Held no longer than this takes: else a close would not reach the peer meanwhile.
                # Not what a body makes of its errors: that is its greenlet's business.
                own = Descriptor(Socket.fileno(self._src))
            except (OSError, ValueError):  # closed
                return 0
            try:
                if os.fstat(own.fd).st_ino != self._inode:
                    return 0  # closed, and its number is another's
                filled = os.splice(own.fd, pipe.write_fd, min(self.left, PIECE), flags=SPLICE_FLAGS)
            except BlockingIOError:
                return 0
            except OSError as err:
                self.error = err.with_traceback(None)  # whose frames hold on to the pipe
                return 0
            finally:
                own.drop()
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
