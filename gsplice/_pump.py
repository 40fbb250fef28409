"""From a socket to a disk: both legs on a thread, which waits for the disk and for nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gevent.monkey import get_original

from . import pipes
from ._linux import SPLICE_FLAGS
from ._transfer import REFUSALS, Transfer, into_file, write_out
from .config import PIECE, PUMP
from .endpoints import File, Socket

_new_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")


def pump(transfer: Transfer, pipe: pipes.Pipe, src: Socket, dst: File) -> bool:
    """Have a thread drain *pipe*, not empty on entry, into *dst*, and go on while *src* has bytes.

    On exit the pipe is empty and its bytes are delivered. False: the kernel splices no further;
    what had been taken was written the ordinary way. Lets out what splice(2), or the ordinary
    write, says of *dst*, with what it did not take lost, and what *src* makes of its own errors. If
    the wait is interrupted nothing more is taken from *src*; the pipe may be lent to the thread.
    """
    more = transfer.room(PUMP) - pipe.pending
    while pipe.pending:
        pending, pipe.pending = pipe.pending, pipes.UNKNOWN
        tap = _Tap(src, dst, max(0, min(more, src.left())))
        size = pending + tap.left
        try:
            result = into_file(
                transfer, dst, size, (src,), _pump, pending, pipe, tap, loans=(pipe, tap)
            )
        finally:
            src.took(tap.taken)
        if isinstance(result, int):
            transfer.moved(result, "bytes_spliced")
        elif result.errno in REFUSALS:
            write_out(transfer, pipe, dst)
            return False
        else:
            raise result
        if tap.error is not None:
            if tap.error.errno in REFUSALS:
                return False
            src.failed(tap.error)
        more = 0  # what is left in the pipe is there because of an error, which comes again
    return True


def _pump(fd: int, dst_fd: int, position: int, pending: int, pipe: pipes.Pipe, tap: _Tap) -> int:
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
                pending = tap.fill(fd, pipe)
    except OSError:
        if not written:
            raise
    finally:
        pipe.pending = pending
    return written


class _Tap:
    """The right of a thread to take bytes from a socket, until its greenlet wants it back."""

    __slots__ = ("_ends", "_is_lent", "_lock", "_process", "error", "left", "taken")

    def __init__(self, src: Socket, dst: File, left: int) -> None:
        self._ends = src, dst
        #: How many bytes may be taken, how many have been, and the socket's error, if it had one.
        self.left = left
        self.taken = 0
        self.error: OSError | None = None
        self._is_lent = False
        self._lock = _new_lock()
        self._process = os.getpid()

    def fill(self, fd: int, pipe: pipes.Pipe) -> int:
        """Splice from *fd* into *pipe*, which is empty; return how much. Raises nothing.

        0: there is nothing now, or no more, or the greenlet has gone, or another has closed an end.
        """
        with self._lock:
            if self._is_lent or not self.left or any(end.is_closed() for end in self._ends):
                return 0
            try:
                filled = os.splice(fd, pipe.write_fd, min(self.left, PIECE), flags=SPLICE_FLAGS)
            except BlockingIOError:
                return 0
            except OSError as err:
                self.error = err.with_traceback(None)  # whose frames hold on to the pipe
                return 0
            self.left -= filled
            self.taken += filled
            return filled

    @property
    def lent(self) -> bool:
        """Whether the greenlet has gone. Setting it waits for a splice(2) that does not wait."""
        return self._is_lent

    @lent.setter
    def lent(self, value: bool) -> None:
        if os.getpid() != self._process:  # forked: who had the lock may be gone
            self._is_lent = value
            return
        with self._lock:
            self._is_lent = value

    def close(self) -> None:
        """Do nothing: the descriptor is somebody else's."""
