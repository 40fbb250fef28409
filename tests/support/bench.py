"""Makes the objects of a test and closes them; classes that read and write in their own way."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
from conftest import Pair

#: As much as fits into a pipe, or the buffer of a Unix socket, with nobody reading.
FITS = 48 << 10

#: What an object that reads or writes in a way of its own makes of the bytes.
CHANGED = bytes(byte ^ 0x55 for byte in range(256))


class Bench:
    """Makes objects, and takes care of all of them at the end."""

    def __init__(self, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._directory = directory
        self._paths: list[Path] = []

    def __enter__(self) -> Bench:
        self._tasks: list[Any] = []
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()
        gevent.sleep(0)  # gevent closes descriptors in the loop
        gevent.joinall(self._tasks)
        for path in self._paths:
            path.unlink()

    def keep(self, obj: Any) -> Any:
        """Close *obj* at the end, as far as that is possible."""

        def close() -> None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                obj.close()

        self._stack.callback(close)
        return obj

    def path(self, data: bytes = b"") -> Path:
        path = self._directory / str(len(self._paths))
        path.write_bytes(data)
        self._paths.append(path)
        return path

    def memory_file(self, data: bytes = b"") -> int:
        """Return the descriptor of a file on tmpfs, at its beginning."""
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def pair(self, tcp: bool = False) -> Pair:
        if not tcp:
            pair = gevent.socket.socketpair()
        else:
            with gevent.socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                client = gevent.socket.create_connection(listener.getsockname())
                pair = client, listener.accept()[0]
        for sock in pair:
            self.keep(sock)
        return pair

    def spawn(self, function: Callable[..., Any], *args: Any) -> gevent.Greenlet:
        task = gevent.spawn(function, *args)
        self._tasks.append(task)
        return task

    def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run *function* in a native thread: the original functions block on some pipes."""
        task = gevent.get_hub().threadpool.spawn(function, *args)
        self._tasks.append(task)
        return task

    def socket_from(self, data: bytes) -> gevent.socket.socket:
        """Return a socket that receives *data* and then the end."""
        ours, theirs = self.pair()

        def feed() -> None:
            with contextlib.suppress(OSError):
                theirs.sendall(data)
                theirs.shutdown(gevent.socket.SHUT_WR)

        if len(data) <= FITS:
            feed()
        else:
            self.spawn(feed)
        return ours

    def pipe_from(self, data: bytes) -> int:
        """Return the read end of a pipe that gives *data* and then the end."""
        read_end, write_end = os.pipe()

        def feed() -> None:
            with open(write_end, "wb", 0) as pipe, contextlib.suppress(OSError):
                view = memoryview(data)
                while view:
                    view = view[pipe.write(view) :]

        if len(data) <= FITS:
            feed()
        else:
            self.in_thread(feed)
        return read_end

    def pipe_to(self) -> tuple[int, Callable[[], bytes]]:
        """Return the write end of a pipe, and how to get what came out of it."""
        read_end, write_end = os.pipe()

        def drain() -> bytes:
            with open(read_end, "rb") as pipe:
                return pipe.read()

        return write_end, self.in_thread(drain).get


class FlippingFileIO(io.FileIO):
    """A subclass with its own read and write."""

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        buffer[:size] = bytes(buffer[:size]).translate(CHANGED)
        return size

    def read(self, size: int = -1) -> bytes:
        return super().read(size).translate(CHANGED)

    def write(self, data: Any) -> int:
        return super().write(bytes(data).translate(CHANGED))


class ForeignRaw(io.RawIOBase):
    """A raw object of somebody else's, whose fileno() leads to other bytes."""

    def __init__(self, behind: io.FileIO) -> None:
        self._behind = behind

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._behind.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._behind.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        size = self._behind.readinto(buffer)
        buffer[:size] = bytes(buffer[:size]).translate(CHANGED)
        return size

    def write(self, data: Any) -> int:
        return self._behind.write(bytes(data).translate(CHANGED))

    def close(self) -> None:
        self._behind.close()
        super().close()


class PlainSubclass(gevent.socket.socket):
    """A socket that sends and receives like gevent's."""


class FlippingSocket(gevent.socket.socket):
    """A socket with its own send and receive."""

    def recv_into(self, buffer: Any, *args: Any) -> int:
        size = super().recv_into(buffer, *args)
        buffer[:size] = bytes(buffer[:size]).translate(CHANGED)
        return size

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(bytes(data).translate(CHANGED), flags)


def as_class(bench: Bench, cls: Any, sock: Any) -> Any:
    """Return *sock* as an object of *cls*."""
    other = cls(sock.family, sock.type, fileno=os.dup(sock.fileno()))
    sock.close()
    return bench.keep(other)


def own_read(obj: Any) -> Any:
    """Give the instance *obj* a read of its own."""
    read = obj.read
    obj.read = lambda size=-1: read(size).translate(CHANGED)
    return obj


def own_readinto(obj: Any) -> Any:
    """Give the instance *obj* a readinto of its own."""
    readinto = obj.readinto

    def flipping(buffer: Any) -> int:
        size = readinto(buffer)
        buffer[:size] = bytes(buffer[:size]).translate(CHANGED)
        return size

    obj.readinto = flipping
    return obj


def own_write(obj: Any) -> Any:
    """Give the instance *obj* a write of its own."""
    write = obj.write
    obj.write = lambda data: write(bytes(data).translate(CHANGED))
    return obj
