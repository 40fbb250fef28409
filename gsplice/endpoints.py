"""The three kinds of end a transfer can have: a regular file, a stream socket, a pipe.

An endpoint answers four questions: which descriptor (asked for again after every wait, since
another greenlet may have closed it and its number may be someone else's now), how to wait for it,
what the object has buffered, and how to leave the object when the kernel has moved bytes behind
its back. What an object really is, :mod:`gsplice.recognise` finds out.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from gevent import get_hub
from gevent import socket as gsocket
from gevent.monkey import get_original

from . import pipes
from ._linux import F_GETPIPE_SZ, FIONREAD, LINUX, RWF_NOWAIT, SPLICE_FLAGS, fcntl, ioctl
from .residency import Residency

_SIOCATMARK = 0x8905

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")
# gevent's would let other greenlets run.
_poll: Callable[[], Any] = get_original("select", "poll")
_close: Callable[[int], None] = get_original("os", "close")
_epoll: Any = get_original("select", "epoll") if LINUX else None


class File:
    """A regular file. It is read at :attr:`offset`, and written where the descriptor stands."""

    __slots__ = ("cache", "is_sink", "obj", "offset", "raw", "status")

    def __init__(self, obj: Any, raw: Any, status: os.stat_result) -> None:
        self.obj = obj
        self.raw = raw
        self.offset = 0
        #: Whether it is written, not read: closed files have words for each.
        self.is_sink = False
        #: What fstat(2) said when the file was handed in.
        self.status = status
        self.cache = Residency(status)

    def fileno(self) -> int:
        """Return the descriptor. Raises what the object does when the file has been closed."""
        _check_open(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def left(self) -> int:
        """Return how many bytes come after the offset, by what fstat(2) said at first.

        Asked again, it may have the hub wait for a server. The end is where a read says it is.
        """
        return self.status.st_size - self.offset

    def ready(self, most: int) -> int:
        """Return how many bytes at the offset, *most* at the most, need no disk.

        Raises ValueError when the file has been closed.
        """
        return self.cache.ready(self.fileno(), self.offset, most)

    def is_same_file(self, other: File) -> bool:
        """Say whether *other* is the same file on disk."""
        return os.path.samestat(self.status, other.status)

    def ahead(self) -> int:
        """Return how many bytes the object has read ahead of where it stands: they go first."""
        if self.obj is self.raw:
            return 0
        if type(self.obj) is io.BufferedRandom:
            self.obj.flush()  # it may hold writes as well; then it stands where its descriptor does
            return 0
        return os.lseek(self.fileno(), 0, os.SEEK_CUR) - self.obj.tell()  # type: ignore[no-any-return]

    def read_ahead(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it."""
        ahead = self.ahead()
        if not ahead:
            return b""
        return self.obj.read(ahead if most is None else min(ahead, most))  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Write out what the object has buffered, so that the descriptor stands where it stands."""
        if self.obj is not self.raw:
            self.obj.flush()

    def leave_source(self) -> None:
        """Make the object stand after the last byte delivered."""
        if not self.obj.closed:
            self.obj.seek(self.offset)

    def leave_sink(self) -> None:
        """Make the object stand where the descriptor stands, after what it may still hold."""
        if not self.obj.closed:
            self.flush()
            self.obj.seek(os.lseek(self.fileno(), 0, os.SEEK_CUR))

    def write_some(self, data: memoryview) -> int:
        """Write part of *data* the ordinary way, where the descriptor stands; say how much.

        Raises BlockingIOError where the filesystem says EAGAIN, as a BufferedWriter would.
        """
        self.fileno()  # it may have been closed since
        written: int | None = self.raw.write(data)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the file takes no more bytes now")
        return written

    def write_waits(self, size: int) -> bool:
        """Say whether writing *size* bytes may have the hub wait for a disk."""
        return self.cache.write_waits(size)

    def close_waits(self) -> bool:
        """Say whether closing a descriptor of the file may have the hub wait for a server."""
        return self.cache.close_waits()

    def reserve(self, size: int) -> int:
        """Have the descriptor stand *size* bytes further on; return where it stood.

        A thread writes these bytes, while others may write to the same file behind them.
        """
        position = os.lseek(self.fileno(), 0, os.SEEK_CUR)
        os.lseek(self.fileno(), position + size, os.SEEK_SET)
        return position

    def settle(self, position: int, reserved: int, written: int) -> None:
        """Have the descriptor stand after what has been *written* of what was *reserved*.

        Unless somebody else has moved it since, or the file has been closed.
        """
        if written == reserved or self.raw.closed:
            return
        if os.lseek(self.fileno(), 0, os.SEEK_CUR) == position + reserved:
            os.lseek(self.fileno(), position + written, os.SEEK_SET)

    def wait_read(self) -> None:
        """Do nothing: a regular file is always ready."""

    wait_write = wait_read


class _Stream:
    """What a socket and a pipe have in common: there is no position to keep."""

    __slots__ = ("is_sink", "obj", "raw")

    #: Whether only a read of the object's own, after all has been moved, finds its end.
    must_read_on: ClassVar[bool] = False

    def __init__(self, obj: Any, raw: Any) -> None:
        self.obj = obj
        self.raw = raw
        #: Whether it is written, not read: closed files have words for each.
        self.is_sink = False

    def fileno(self) -> int:
        """Return the descriptor, as it is now."""
        raise NotImplementedError

    def left(self) -> int:
        """Return how many bytes may be taken: all that come."""
        return sys.maxsize

    def kept(self) -> int:
        """Return how many of the last bytes only the object's own read() may take."""
        return 0

    def read_kept(self) -> bytes:
        """Have the object read these: nothing else is left. Lets out what its read() raises."""
        return b""

    def holds(self) -> int:
        """Return how many bytes there are to read (pipe(7), tcp(7), unix(7): FIONREAD)."""
        return int.from_bytes(ioctl(self.fileno(), FIONREAD, bytes(4)), sys.byteorder)

    def took(self, number: int) -> None:
        """Note that *number* bytes have been taken from the descriptor, not yet delivered.

        Below 0: that so many have not been taken after all.
        """

    def failed(self, err: OSError) -> NoReturn:
        """Raise *err*, which the descriptor has given to whoever read from it."""
        try:
            raise err
        finally:
            del err

    def read_ahead(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it. Neither reads nor waits."""
        if self.obj is self.raw:
            return b""
        # An empty buffer would read, and wait, to answer; nothing but this asks it what it has.
        read, ours = self.raw.readinto, _get_ident()

        def nothing_yet(buffer: Any) -> Any:
            # Answers as a raw file that is non-blocking and has nothing to read.
            return None if _get_ident() == ours else read(buffer)

        self.raw.readinto = nothing_yet
        try:
            data: bytes = self.obj.peek(1)
        finally:
            del self.raw.readinto
        if most is not None:
            data = data[:most]
        return self.obj.read(len(data))  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Write out what the object has buffered."""
        if self.obj is not self.raw:
            self.obj.flush()

    def leave_source(self) -> None:
        """Do nothing: a stream has no position."""

    leave_sink = leave_source


class Socket(_Stream):
    """A connected stream socket: bare, or behind the raw file that ``makefile()`` made for it."""

    __slots__ = ("sock",)

    def __init__(self, obj: Any, raw: Any, sock: Any) -> None:
        super().__init__(obj, raw)
        self.sock = sock

    def fileno(self) -> int:
        """Return the descriptor; -1 if the socket was closed, and the system call says EBADF.

        Raises what the socket's file does when that was closed.
        """
        if self.raw is not None:
            _check_open(self)
        return self.sock.fileno()  # type: ignore[no-any-return]

    def write_some(self, data: memoryview) -> int:
        """Send part of *data*; say how much. Raises BlockingIOError when there is no room.

        Raises as :meth:`fileno` does when the socket's file was closed.
        """
        self.fileno()  # the socket's file may have been closed since
        return self.sock._sock.send(data)  # type: ignore[no-any-return]

    def receive(self, most: int) -> bytes:
        """Receive what is there, without waiting. Raises BlockingIOError if nothing is."""
        return self.sock._sock.recv(most)  # type: ignore[no-any-return]

    def at_urgent_mark(self) -> bool:
        """Say whether the next byte is at TCP's urgent mark (tcp(7), SIOCATMARK)."""
        try:
            mark = ioctl(self.fileno(), _SIOCATMARK, bytes(4))
        except OSError:  # a Unix socket without urgent data
            return False
        return mark != bytes(4)

    def wait_read(self) -> None:
        """Wait as recv() would, with the socket's own watcher and timeout."""
        try:
            self._wait("_read_event")
        except TimeoutError:
            if self.raw is not None:
                self.raw._timeout_occurred = True  # as SocketIO.readinto does: no further reads
            raise

    def wait_write(self) -> None:
        """Wait as send() would, with the socket's own watcher and timeout."""
        self._wait("_write_event")

    def _wait(self, name: str) -> None:
        """Wait for the watcher of that *name*. A closed socket is an error as it is to a call."""
        Socket.fileno(self)  # raises ValueError: it may have been closed since the last call
        watcher = getattr(self.sock, name)
        if watcher is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.sock._wait(watcher)


class Pipe(_Stream):
    """One end of a pipe that is the caller's own, never one of the pool's."""

    __slots__ = ()

    def fileno(self) -> int:
        """Return the descriptor. Raises what the object does when the file has been closed."""
        _check_open(self)
        return self.raw.fileno()  # type: ignore[no-any-return]

    def write_some(self, data: memoryview) -> int:
        """Write part of *data*; say how much. Raises BlockingIOError when there is no room."""
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            return os.write(fd, data)
        # It is blocking: a write(2) of more than there is room for would have the hub wait.
        if RWF_NOWAIT:
            try:
                return os.pwritev(fd, (data,), -1, RWF_NOWAIT)
            except (BlockingIOError, BrokenPipeError):
                raise
            except OSError:  # before Linux 6.4, or a FIFO that has a name
                pass
        poll = _poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "pipe is full")
        return self._splice(fd, data) or os.write(fd, data[: select.PIPE_BUF])

    def _splice(self, fd: int, data: memoryview) -> int:
        """Write part of *data* through a pipe of the pool, from which splice(2) never waits.

        Returns 0 where there is no such pipe, or splice(2) is refused. On entry the caller's pipe
        has room for PIPE_BUF bytes: so much has a slot of its own (pipe(7)). Lets out
        BlockingIOError if others have just filled that, and BrokenPipeError.
        """
        room = (fcntl(fd, F_GETPIPE_SZ) - self.holds()) & -select.PIPE_BUF
        pipe = pipes.acquire()
        if pipe is None:
            return 0
        try:
            pipe.pending = pipes.UNKNOWN
            pipe.pending = os.write(pipe.write_fd, data[: max(room, select.PIPE_BUF)])
            moved = os.splice(pipe.read_fd, fd, pipe.pending, flags=SPLICE_FLAGS)
            pipe.pending -= moved
            return moved
        except (BlockingIOError, BrokenPipeError):
            raise
        except OSError:
            return 0
        finally:
            pipes.release(pipe)  # which closes it if something is left

    def wait_read(self) -> None:
        """Wait until the pipe has bytes, or has lost its last writer."""
        self._wait("_read_watcher", gsocket.wait_read)

    def wait_write(self) -> None:
        """Wait until the pipe has room, or has lost its last reader."""
        self._wait("_write_watcher", gsocket.wait_write)

    def _wait(self, watcher: str, wait: Callable[[int], None]) -> None:
        fd = self.fileno()
        if not isinstance(self.raw, io.FileIO):
            # gevent's own: waiting as its read() does lets a close wake us
            gsocket.wait(getattr(self.raw, watcher), None, None, self.raw.hub)
            return
        try:
            # Closed by another greenlet meanwhile, the first would never wake us, and libev aborts
            # when it finds that out. A forked child keeps it for the same reason.
            own = os.dup(fd)
        except OSError:  # there are none left
            own = fd
        try:
            if "libuv" in get_hub().loop.__class__.__module__:
                _wait_blocking(own, watcher)
            else:
                wait(own)
        finally:
            if own != fd:
                _close(own)


def _wait_blocking(fd: int, watcher: str) -> None:
    """Wait for *fd* and leave it blocking, for others that use it: libuv would not (uv_poll_init).

    An epoll instance is ready when one of what it watches is, and is itself what libuv gets.
    """
    events = select.POLLIN if watcher == "_read_watcher" else select.POLLOUT
    with _epoll(1) as epoll:
        epoll.register(fd, events)  # the numbers are those of poll(2)
        gsocket.wait_read(epoll.fileno())


Endpoint = File | Socket | Pipe


def _check_open(end: Endpoint) -> None:
    """Raise ValueError if the file behind *end* has been closed, in the words of its object."""
    if end.raw.closed:
        if end.is_sink:
            end.obj.write(b"")
        else:
            end.obj.read(1)
        raise ValueError("I/O operation on closed file.")
