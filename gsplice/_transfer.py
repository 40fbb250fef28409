"""One transfer, and the ordinary ways to read and write in its course."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Any, Final

import gevent

from . import offload, pipes, residency
from ._stats import counters
from .config import PIECE
from .endpoints import Endpoint, File, Pipe, Socket

#: What the kernel or a sandbox answers when it will not move bytes from a socket in this way.
_REFUSALS: Final = frozenset(
    {
        errno.EINVAL,
        errno.ENOMEM,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.ESPIPE,
        errno.EXDEV,
    }
)

#: What the kernel says of a connection, or of a pipe that nobody reads, when bytes are to go there.
_NO_WAY_THERE: Final = frozenset(
    {
        errno.EBADF,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.EPROTO,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
    }
)


def is_refusal(err: OSError, src: Endpoint | None, dst: Endpoint | None) -> bool:
    """Say whether reading and writing may go on after *err*, of a call that moves bytes.

    *src* and *dst* are the ends of the call; None: a pipe of the pool. True: if anything is wrong
    with an end, the read or the write says so, and says what. False: *err* has to be raised, as a
    connection says what is wrong with it only once. recv(2) would find an end of file then, so any
    error of a socket that is read counts, unless it is known to be none.
    """
    if isinstance(src, Socket):
        return err.errno in _REFUSALS
    return not (isinstance(dst, Socket | Pipe) and err.errno in _NO_WAY_THERE)


class Transfer:
    """One transfer: how much has been delivered, how much may still be, and whose it is."""

    __slots__ = ("_owned", "_process", "_since_switch", "delivered", "limit", "read_failed")

    def __init__(self, limit: int | None = None, delivered: int = 0) -> None:
        #: Bytes delivered, and the most that may be; None: until the source ends.
        self.delivered = delivered
        self.limit = limit
        #: Whether the error that ended it came from reading a file.
        self.read_failed = False
        self._since_switch = 0
        self._process = os.getpid()
        #: What threads use in place of the descriptors of the ends; most transfers have no threads.
        self._owned: dict[Endpoint, offload.Descriptor] | None = None

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

    def passed(self, number: int) -> None:
        """Note that somebody else's methods have delivered *number* bytes, which are not counted.

        Lets other greenlets run, as :meth:`give_way` does.
        """
        self.delivered += number
        self._since_switch += number
        self.give_way()

    def wait(self, wait: Callable[[], None]) -> None:
        """Wait for an end to be ready. Lets out what the end's own wait raises."""
        self._since_switch = 0
        wait()
        self.check_process()

    def on_thread(
        self,
        ends: tuple[Endpoint, ...],
        job: Callable[..., Any],
        *args: Any,
        loans: tuple[offload.Loan, ...] = (),
    ) -> Any:
        """Do ``job(*descriptors of ends, *args)`` on a thread; return its result, or its OSError.

        Lets out ValueError for a file that has been closed, and what is thrown into the greenlet
        while it waits: the job may go on then, and *loans* are the thread's.
        """
        devices = tuple(end.status.st_dev if isinstance(end, File) else None for end in ends)
        learning = functools.partial(residency.learning, devices, job)
        fds = [end.fileno() for end in ends]
        threads = offload.threads()
        owned = self._own(ends, fds) if threads is not None else None
        if threads is None or owned is None:
            result = offload.here(learning, fds, args)
        else:
            known = [device for device in devices if device is not None]
            result = threads.run(
                known, learning, [each.fd for each in owned], args, [*owned, *loans]
            )
        self._since_switch = 0
        self.check_process()
        return result

    def _own(self, ends: tuple[Endpoint, ...], fds: list[int]) -> list[offload.Descriptor] | None:
        """Return duplicates of *fds*, made once for each of the *ends*; None if none are left."""
        owned = self._owned = self._owned or {}
        try:
            for end, fd in zip(ends, fds, strict=True):
                if end not in owned:
                    owned[end] = offload.duplicate(fd)
        except OSError:
            return None
        return [owned[end] for end in ends]

    def close(self) -> None:
        """Close what threads have used, but not what one is still using. Raises nothing."""
        owned, self._owned = self._owned, None
        for end, descriptor in (owned or {}).items():
            if descriptor.lent or not self.is_ours():
                continue
            threads = offload.threads() if isinstance(end, File) and end.close_waits() else None
            if threads is None:
                descriptor.close()
            else:
                gevent.spawn(threads.run, (), descriptor.close, (), (), (descriptor,))

    def give_way(self) -> None:
        """Let other greenlets run when PIECE bytes have moved since they last could."""
        if self._since_switch >= PIECE:
            self._since_switch = 0
            hub = offload.hub_to_serve()
            if hub is not None:
                # Not sleep(0): gevent runs that dozens of times between two looks for events.
                with hub.loop.timer(0.0) as timer:
                    hub.wait(timer)
                self.check_process()

    def leave(self, src: Endpoint, dst: Endpoint) -> None:
        """Make both objects stand where the delivered bytes left them, and close the transfer.

        Not in a forked child, which shares the position of every file with its parent.
        """
        try:
            if self.is_ours():
                src.leave_source()
                dst.leave_sink()
        finally:
            self.close()

    def is_ours(self) -> bool:
        """Say whether this process started the transfer."""
        # Asked for, not noted by a handler after the fork: another handler that runs before ours
        # may switch to this greenlet.
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raise in a forked child: the transfer, its descriptors and its peer are the parent's."""
        if not self.is_ours():
            raise offload.forked()


def _or_raise(result: Any) -> Any:
    """Return *result*, or raise it if it is an error.

    Whoever raises an error from a variable deletes that: the frame would be in a cycle with it, and
    keep both ends open, until the garbage collector comes.
    """
    if not isinstance(result, OSError):
        return result
    try:
        raise result
    finally:
        del result


def read(
    transfer: Transfer, src: File, offset: int, asked: int, buffer: memoryview | None = None
) -> bytes | memoryview:
    """Read at most *asked* bytes of *src* at *offset*, on a thread if a disk has to be waited for.

    No bytes: *src* ends there. They may be part of *buffer*, which has room for as many. Lets out
    the errors of pread(2), and notes that there was one.
    """
    fd = src.fileno()
    try:
        data = src.cache.read(fd, offset, asked, buffer)
    except OSError:
        transfer.read_failed = True
        raise
    if data is None:
        result = transfer.on_thread((src,), os.pread, asked, offset)
        transfer.read_failed = isinstance(result, OSError)
        try:
            data = _or_raise(result)
        finally:
            del result
    return data


def write(
    transfer: Transfer, dst: Endpoint, data: bytes | memoryview, src: Endpoint | None = None
) -> None:
    """Write all of *data*, read from *src*, to *dst*, whose object has nothing buffered.

    Lets out the errors of the ordinary write(); what had not been written then is lost, unless
    *src* is a file, which is left to stand before it.
    """
    view = memoryview(data)
    while view:
        piece = view[:PIECE]
        try:
            if isinstance(dst, File) and dst.write_waits(len(piece)):
                promised = None if isinstance(src, File) else piece.__len__
                written = _or_raise(
                    into_file(transfer, dst, len(piece), (), _write_at, piece, promised=promised)
                )
            else:
                written = dst.write_some(piece)
        except BlockingIOError:
            if isinstance(dst, File):  # there is nothing to wait for
                raise
            transfer.wait(dst.wait_write)
            continue
        view = view[written:]
        if isinstance(src, File):
            src.offset += written
        transfer.moved(written, "bytes_copied")
        transfer.give_way()


def write_out(transfer: Transfer, pipe: pipes.Pipe, dst: Endpoint) -> None:
    """Write all that *pipe* holds to *dst*, whose object has nothing buffered.

    Lets out the errors of the ordinary write(); what had not been written then is lost.
    """
    while pipe.pending:
        data = os.read(pipe.read_fd, pipe.pending)
        pipe.pending -= len(data)
        write(transfer, dst, data)


def into_file(
    transfer: Transfer,
    dst: File,
    size: int,
    sources: tuple[Endpoint, ...],
    job: Callable[..., int],
    *args: Any,
    loans: tuple[offload.Loan, ...] = (),
    promised: Callable[[], int] | None = None,
) -> int | OSError:
    """Have a thread write at most *size* bytes where *dst* stands; return how many, or its error.

    Calls ``job(*descriptors of sources, that of dst, where to write, *args)``. On exit *dst* stands
    after the bytes written. If the wait is interrupted while the thread is at work, it stands after
    as many as are *promised*, which the thread still writes; or where it stood, if the source can
    give the bytes again, and the thread may write them behind that. Raises as
    :meth:`Transfer.on_thread` does.
    """
    done: list[int] = []

    def noted(*args: Any) -> int:
        done.append(job(*args))
        return done[0]

    threads = offload.threads()
    if threads is not None:  # two that reserve at the same time could not both go back
        turn = threads.turn_to_write((dst.status.st_dev, dst.status.st_ino))
        loans = (*loans, turn)
    try:
        transfer.check_process()
        position = dst.reserve(size)
        written = 0
        try:
            result: int | OSError = transfer.on_thread(
                (*sources, dst), noted, position, *args, loans=loans
            )
            if isinstance(result, int):
                written = result
            return result
        except BaseException:
            if promised is not None:
                at_work = threads is not None and turn.lent
                written = promised() if at_work else sum(done)
            raise
        finally:
            if transfer.is_ours():
                dst.settle(position, size, written)
    finally:
        if threads is not None and not turn.lent:
            turn.end()


def _write_at(fd: int, position: int, data: memoryview) -> int:
    return os.pwrite(fd, data, position)
