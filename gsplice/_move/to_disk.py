"""Into a file on a disk: a thread writes, and waits for the disk and for nothing else.

If the source is a socket, the thread does both steps, drain and fill, for as long as the socket has
bytes, or has more within a millisecond: handing a job to a thread and getting it back takes 0.3 ms
of CPU time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from select import POLLIN
from typing import Any, Final

from gevent.monkey import get_original

from .._ends.end import End
from .._ends.file import File
from .._ends.socket import Socket
from .._ends.stream import unread
from .._os.results import NOT_NOW, splice
from .._pool.pipe import UNKNOWN, Pipe
from .._threads.job import Resource
from .._threads.threads import threads
from ..config import KiB, MiB
from .account import PIECE
from .lent_socket import LentSocket
from .transfer import Transfer

#: Most bytes that one job moves from a socket to a file: moving this much takes 6 ms, and handing
#: the job to the thread and back 0.3 (benchmarks/download.py).
DISK_PIECE: Final = 16 * MiB

#: Milliseconds for which a thread waits for more of a brisk sender's bytes, instead of handing the
#: job back: a sender on the same machine is seldom silent for that long. Brisk is who has sent so
#: many bytes for each such wait; a slow one would keep the thread from others.
PATIENCE: Final = 1
BRISK: Final = 64 * KiB

_new_poll: Callable[[], Any] = get_original("select", "poll")
_get_ident: Callable[[], int] = get_original("_thread", "get_ident")


def write_on_thread(
    transfer: Transfer,
    size: int,
    sources: tuple[End, ...],
    job: Callable[..., int],
    *args: Any,
    resources: tuple[Resource, ...] = (),
    promised: Callable[[], int] | None = None,
) -> int:
    """Have a thread write at most *size* bytes at the position of the destination, a file.

    Calls ``job(*descriptors of sources, that of the file, position, *args)``, which returns how
    many bytes it wrote; returns that, or minus the errno. On exit the file's position is after
    them. If interrupted while the thread is running, it is after ``promised()`` bytes, because the
    thread will still write those; they are more than *size* if the job has moved the position on
    itself. Without *promised* the source can be read again, so the position is the old one,
    although the thread may still write there. Lets out what :meth:`Transfer.on_thread` does.
    """
    dst = transfer.dst
    done: list[int] = []

    def write(*args: Any) -> int:
        done.append(job(*args))
        return done[0]

    pool = threads()
    lock = None
    if pool is not None:  # with two claims at once, neither could move the position back
        lock = pool.write_lock((dst.status.st_dev, dst.status.st_ino))
        resources = (*resources, lock)
    try:
        transfer.check_process()
        position = dst.claim(size)
        written = 0
        try:
            result: int = transfer.on_thread(
                (*sources, dst), write, position, *args, resources=resources
            )
            written = max(0, result)
            return result
        except BaseException:
            if promised is not None:
                is_running = lock is not None and lock.left_to_thread
                written = promised() if is_running else sum(done)
            raise
        finally:
            if transfer.began_here():
                claimed = size if promised is None else promised()
                dst.settle_claim(position, claimed, written)
    finally:
        if lock is not None and not lock.left_to_thread:
            lock.release()


def drain_to_disk(transfer: Transfer, pipe: Pipe) -> int:
    """Have a thread drain *pipe*, not empty on entry, and what the socket, the source, has then.

    While the thread is at work, the file's position is after all that it has taken, and the source
    counts as taken what it may take. Returns how many bytes were delivered, or minus the errno if
    none were. On exit ``pipe.pending`` is what the pipe still holds; if that is not 0, the next
    drain meets the error. Lets out the source's own error, with the pipe empty. If the wait is
    interrupted, the thread takes nothing more from the socket, but still writes what it has taken;
    the file's position is after that, and the pipe is left to the thread.
    """
    src = transfer.src
    pending, pipe.pending = pipe.pending, UNKNOWN
    most = max(0, transfer.within_limit(DISK_PIECE) - pending)
    sock = _RevocableSocket(src, transfer.dst, min(most, src.remaining() - src.withheld()))
    src.note_taken(sock.remaining)  # another reader must not count on these bytes
    try:
        written = write_on_thread(
            transfer,
            pending,
            (),
            _drain_and_fill,
            pending,
            pipe,
            sock,
            resources=(pipe, sock),
            promised=lambda: pending + sock.taken,
        )
    finally:
        src.note_taken(-sock.remaining)
    pipe.pending = pending + sock.taken - max(0, written)
    if written > 0:
        transfer.count_delivered(written, "bytes_spliced")
    if sock.failure and not pipe.pending and not src.can_read_after(sock.failure):
        src.raise_read_error(sock.failure)
    return written


def _available(src: Socket) -> int:
    """Return how many bytes can be read now; 0 too if somebody has closed the socket.

    The next fill reports that, when what is in the pipe already has been written.
    """
    try:
        return unread(Socket.fileno(src))
    except (OSError, ValueError):
        return 0


def _drain_and_fill(
    dst_fd: int, position: int, pending: int, pipe: Pipe, sock: _RevocableSocket
) -> int:
    """Drain *pending* bytes, then fill and drain until *sock* gives no more. Runs on a thread.

    On entry the position of the file has been moved from *position* past the *pending* bytes.
    Returns how many bytes it wrote. Lets out an error of the drain only if it wrote none; after
    that, the error is dropped, since the next drain will meet it again.
    """
    written = 0
    while pending:
        try:
            drained = os.splice(pipe.read_fd, dst_fd, pending, offset_dst=position)
        except OSError:
            if not written:
                raise
            break
        if not drained:
            break
        written += drained
        position += drained
        pending -= drained
        if not pending:
            pending = sock.fill(pipe, dst_fd, written)
            if pending:
                position = sock.position
    return written


class _RevocableSocket(LentSocket):
    """A socket from which a thread may take bytes for as long as its greenlet waits."""

    __slots__ = ("_dst", "_hub", "_there", "_waits", "failure", "position", "remaining", "taken")

    def __init__(self, src: Socket, dst: File, most: int) -> None:
        super().__init__(src)
        self._dst = dst
        #: How many bytes are there already: they are written even if the file is closed meanwhile.
        self._there = _available(src) if most else 0
        #: How many bytes may still be taken, and how many have been.
        self.remaining, self.taken = most, 0
        self._waits = 0
        #: The thread that must not wait. It does the job where no other can be started.
        self._hub = _get_ident()
        #: The socket's error (minus its errno), or 0.
        self.failure = 0
        #: Where in the file the bytes taken last belong.
        self.position = 0

    def fill(self, pipe: Pipe, dst_fd: int, written: int) -> int:
        """Splice from the socket into *pipe*, which is empty; return how many bytes.

        On exit the position of the file *dst_fd* has been moved past them, from :attr:`position`.
        Waits for PATIENCE, but not on the hub, if the sender is brisk, of whom *written* bytes have
        been written so far.
        Returns 0 if no bytes are ready then, the limit is reached, the greenlet stopped waiting, an
        end is closed, or splice(2) failed (see :attr:`failure`). Raises nothing.
        """
        if self.taken >= self._there and self._dst.raw.closed:
            return 0
        filled = self._fill_now(pipe, dst_fd)
        is_brisk = written > (self._waits + 1) * BRISK
        if filled == NOT_NOW and is_brisk and _get_ident() != self._hub and self._wait():
            filled = self._fill_now(pipe, dst_fd)
        return max(0, filled)

    def _wait(self) -> bool:
        """Wait for the socket to be readable, without the lock; return whether it is.

        If it is closed meanwhile, its peer learns of that when this has ended.
        """
        self._waits += 1
        poll = _new_poll()
        try:
            poll.register(Socket.fileno(self._end), POLLIN)
            return bool(poll.poll(PATIENCE))
        except (OSError, ValueError):  # closed
            return False

    def _fill_now(self, pipe: Pipe, dst_fd: int) -> int:
        """Do one splice(2) of :meth:`fill`; return as that does, or NOT_NOW."""
        if not self.remaining:
            return 0
        with self.descriptor() as fd:
            if fd < 0:
                return 0
            filled = splice(fd, pipe.write_fd, min(self.remaining, PIECE))
            if filled == NOT_NOW:
                return NOT_NOW
            if filled < 0:
                self.failure = filled
                return 0
            # lseek(2) and write(2) lock the position: whoever else writes does so before or after.
            self.position = os.lseek(dst_fd, filled, os.SEEK_CUR) - filled
            self.remaining -= filled
            self.taken += filled
            return filled
