"""Objects of every kind that a program may copy from or to, and what must become of each.

Which kinds are taken is stated here by hand, kind by kind: it is not asked of the code under test.
"""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import io
import lzma
import os
import socket as stdlib_socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
from bench import (
    CHANGED,
    FITS,
    Bench,
    FlippingFileIO,
    FlippingSocket,
    ForeignRaw,
    PlainSubclass,
    as_class,
    own_read,
    own_readinto,
    own_write,
)
from conftest import receive_all
from gevent.fileobject import FileObjectBlock, FileObjectPosix, FileObjectThread

#: What a kind is that gsplice takes. Any other role is the reason why it is not taken.
FILE, SOCKET, PIPE = "file", "socket", "pipe"


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of object to read from."""

    name: str
    #: FILE, SOCKET or PIPE if it is taken, else the reason why not.
    role: str
    make: Callable[[Bench, bytes], Any]
    #: The most bytes to make one of: more is slow, or does not come at once.
    most: int = 1 << 40

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Sink:
    """A kind of object to write to; ``make`` also says how to get its bytes once it is closed."""

    name: str
    role: str
    make: Callable[[Bench], tuple[Any, Callable[[], bytes]]]
    #: Whether one write() may take less than it is given, which copyfileobj does not look at.
    short_writes: bool = False
    most: int = 1 << 40

    def __repr__(self) -> str:
        return self.name


#: What a file to write to contains already.
OLD = b"old content, " * 1000


def _nonblocking(fd: int) -> int:
    os.set_blocking(fd, False)
    return fd


def _named(bench: Bench, data: bytes) -> Any:
    file = tempfile.NamedTemporaryFile(dir=bench.path().parent)
    file.write(data)
    file.seek(0)
    return file


def _named_fresh(bench: Bench, data: bytes) -> Any:
    """A wrapper whose methods nobody has asked for yet."""
    path = bench.path(data)
    return tempfile._TemporaryFileWrapper(open(path, "r+b"), str(path), delete=False)


def _temporary(bench: Bench, data: bytes, **kwargs: Any) -> Any:
    file = tempfile.TemporaryFile(dir=bench.path().parent, **kwargs)
    file.write(data)
    file.seek(0)
    return file


def _spooled(data: bytes, max_size: int) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size=max_size)
    file.write(data)
    file.seek(0)
    return file


def _compressed(module: Any, bench: Bench, data: bytes) -> Any:
    return module.open(bench.path(module.compress(data)))


def _closed(obj: Any) -> Any:
    obj.close()
    return obj


def _detached(bench: Bench, obj: Any) -> Any:
    bench.keep(obj.detach())
    return obj


def _socket_file(bench: Bench, sock: Any, mode: str = "rb", buffering: int = -1) -> Any:
    file = sock.makefile(mode, buffering)
    sock.close()  # the file keeps the connection
    return bench.keep(file)


def _later(obj: Any, set_timeout: float) -> Any:
    obj.settimeout(set_timeout)
    return obj


def _stdlib(sock: Any) -> Any:
    other = stdlib_socket.socket(sock.family, sock.type, fileno=os.dup(sock.fileno()))
    os.set_blocking(other.fileno(), True)
    sock.close()
    return other


_SOURCES = (
    Source("buffered", FILE, lambda b, d: open(b.path(d), "rb")),
    Source("raw", FILE, lambda b, d: open(b.path(d), "rb", 0)),
    Source("random", FILE, lambda b, d: open(b.path(d), "r+b")),
    Source("tiny buffer", FILE, lambda b, d: open(b.path(d), "rb", 16)),
    Source("big buffer", FILE, lambda b, d: open(b.path(d), "rb", 1 << 18)),
    Source("memfd", FILE, lambda b, d: open(b.memory_file(d), "rb")),
    Source("named temporary", FILE, _named),
    Source("named temporary, fresh", FILE, _named_fresh),
    Source("temporary", FILE, _temporary),
    Source("temporary, raw", FILE, lambda b, d: _temporary(b, d, buffering=0)),
    Source("spooled", "source_type", lambda b, d: _spooled(d, 1 << 40)),
    Source("spooled, on disk", "source_type", lambda b, d: _spooled(d, 1)),
    Source(
        "gzip",
        "source_type",
        lambda b, d: gzip.open(b.path(gzip.compress(d, 1))),
        2 << 20,
    ),
    Source("bz2", "source_type", lambda b, d: _compressed(bz2, b, d), 1 << 17),
    Source("lzma", "source_type", lambda b, d: _compressed(lzma, b, d), 1 << 17),
    Source("FileIO subclass", "source_type", lambda b, d: FlippingFileIO(b.path(d))),
    Source(
        "buffer on FileIO subclass",
        "source_type",
        lambda b, d: io.BufferedReader(FlippingFileIO(b.path(d))),
    ),
    Source(
        "buffer on foreign raw",
        "source_type",
        lambda b, d: io.BufferedReader(ForeignRaw(io.FileIO(b.path(d)))),
    ),
    Source("own read, buffer", "source_type", lambda b, d: own_read(open(b.path(d), "rb"))),
    Source("own read, raw", "source_type", lambda b, d: own_read(open(b.path(d), "rb", 0))),
    Source(
        "own readinto, raw of a buffer",
        "source_type",
        lambda b, d: io.BufferedReader(own_readinto(io.FileIO(b.path(d)))),
    ),
    Source("own read, wrapper", "source_type", lambda b, d: own_read(_named(b, d))),
    Source(
        "FileObjectPosix, own read",
        "source_type",
        lambda b, d: own_read(FileObjectPosix(b.path(d), "rb")),
    ),
    Source("BytesIO", "source_type", lambda b, d: io.BytesIO(d)),
    Source("text", "source_type", lambda b, d: open(b.path(d), encoding="latin-1")),
    Source("codecs", "source_type", lambda b, d: codecs.open(b.path(d), encoding="latin-1")),
    Source("write-only", "source_type", lambda b, d: open(b.path(d), "wb")),
    Source(
        "writer on a file that could be read",
        "source_type",
        lambda b, d: io.BufferedWriter(io.FileIO(b.path(d), "r+")),
    ),
    Source("nothing", "source_type", lambda b, d: None),
    Source("closed", "closed", lambda b, d: _closed(open(b.path(d), "rb"))),
    Source("closed, raw", "closed", lambda b, d: _closed(open(b.path(d), "rb", 0))),
    Source("closed wrapper", "closed", lambda b, d: _closed(_named(b, d))),
    Source("detached", "source_type", lambda b, d: _detached(b, open(b.path(d), "rb"))),
    Source("FileObjectPosix", FILE, lambda b, d: FileObjectPosix(b.path(d), "rb")),
    Source("FileObjectPosix, raw", FILE, lambda b, d: FileObjectPosix(b.path(d), "rb", 0)),
    Source("FileObjectBlock", FILE, lambda b, d: FileObjectBlock(b.path(d), "rb")),
    Source("FileObjectBlock, raw", FILE, lambda b, d: FileObjectBlock(b.path(d), "rb", 0)),
    Source(
        "FileObjectBlock on a file object",
        FILE,
        lambda b, d: FileObjectBlock(open(b.path(d), "rb"), "rb"),
    ),
    Source(
        "FileObjectThread",
        "source_type",
        lambda b, d: FileObjectThread(b.path(d), "rb"),
        2 << 20,
    ),
    Source(
        "FileObjectThread, raw",
        "source_type",
        lambda b, d: FileObjectThread(b.path(d), "rb", 0),
        2 << 20,
    ),
    Source(
        "FileObjectPosix, closed",
        "source_type",
        lambda b, d: _closed(FileObjectPosix(b.path(d), "rb")),
    ),
    Source("pipe", PIPE, lambda b, d: open(b.pipe_from(d), "rb")),
    Source("pipe, raw", PIPE, lambda b, d: open(b.pipe_from(d), "rb", 0)),
    Source(
        "pipe, non-blocking",
        "nonblocking",
        lambda b, d: open(_nonblocking(b.pipe_from(d)), "rb"),
        FITS,
    ),
    Source(
        "pipe, non-blocking, raw",
        "nonblocking",
        lambda b, d: open(_nonblocking(b.pipe_from(d)), "rb", 0),
        FITS,
    ),
    Source("pipe, FileObjectPosix", PIPE, lambda b, d: FileObjectPosix(b.pipe_from(d), "rb")),
    Source(
        "pipe, FileObjectPosix, raw", PIPE, lambda b, d: FileObjectPosix(b.pipe_from(d), "rb", 0)
    ),
    Source("pipe, FileObjectBlock", PIPE, lambda b, d: FileObjectBlock(b.pipe_from(d), "rb")),
    Source(
        "pipe, FileObjectThread",
        "source_type",
        lambda b, d: FileObjectThread(b.pipe_from(d), "rb"),
        2 << 20,
    ),
    Source("socket", SOCKET, lambda b, d: _socket_file(b, b.socket_from(d))),
    Source("socket, raw", SOCKET, lambda b, d: _socket_file(b, b.socket_from(d), buffering=0)),
    Source(
        "socket, read and write, raw",
        SOCKET,
        lambda b, d: _socket_file(b, b.socket_from(d), "rwb", 0),
    ),
    Source(
        "socket, read and write",
        "source_type",
        lambda b, d: _socket_file(b, b.socket_from(d), "rwb"),
    ),
    Source(
        "socket, non-blocking",
        "nonblocking",
        lambda b, d: _socket_file(b, _later(b.socket_from(d), 0)),
        FITS,
    ),
    Source(
        "socket, plain subclass",
        SOCKET,
        lambda b, d: _socket_file(b, as_class(b, PlainSubclass, b.socket_from(d))),
    ),
    Source(
        "socket, subclass with its own recv_into",
        "socket_type",
        lambda b, d: _socket_file(b, as_class(b, FlippingSocket, b.socket_from(d))),
        FITS,
    ),
    Source(
        "socket, own recv_into",
        "socket_type",
        lambda b, d: _socket_file(
            b,
            own_recv_into(as_class(b, PlainSubclass, b.socket_from(d))),
        ),
        FITS,
    ),
    Source(
        "socket file, own readinto",
        "source_type",
        lambda b, d: own_readinto(_socket_file(b, b.socket_from(d), buffering=0)),
    ),
    Source(
        "socket of the standard library",
        "socket_type",
        lambda b, d: _socket_file(b, _stdlib(b.socket_from(d))),
        FITS,
    ),
    Source("socket, closed", "closed", lambda b, d: _closed(_socket_file(b, b.socket_from(d)))),
)


def own_recv_into(sock: Any) -> Any:
    """Give the instance *sock* a recv_into of its own."""
    recv_into = sock.recv_into

    def flipping(buffer: Any, *args: Any) -> int:
        size = recv_into(buffer, *args)
        buffer[:size] = bytes(buffer[:size]).translate(CHANGED)
        return size

    sock.recv_into = flipping
    return sock


def _to_path(
    opener: Callable[[Path], Any], old: bytes = OLD
) -> Callable[[Bench], tuple[Any, Callable[[], bytes]]]:
    def make(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
        path = bench.path(old)
        return opener(path), path.read_bytes

    return make


def _to_memory(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    fd = bench.memory_file(OLD)
    other = bench.keep(open(os.dup(fd), "rb"))

    def collect() -> bytes:
        other.seek(0)
        return other.read()

    return open(fd, "wb"), collect


def _to_named(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    file = _named(bench, OLD)
    other = bench.keep(open(file.name, "rb"))  # the name goes when the file is closed
    return file, other.read


def _to_spooled(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    file = bench.keep(_spooled(OLD, 1 << 40))

    def collect() -> bytes:
        assert not file._rolled
        return file._file.getvalue()

    file.close = file.flush  # it would lose its content
    return file, collect


def _to_bytesio(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    class Kept(io.BytesIO):
        def close(self) -> None:
            """Keep the content."""

    file = Kept()
    return file, file.getvalue


def _to_gzip(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    path = bench.path()
    return gzip.open(path, "wb", 1), lambda: gzip.decompress(path.read_bytes())


def _to_pipe(
    opener: Callable[[int], Any],
) -> Callable[[Bench], tuple[Any, Callable[[], bytes]]]:
    def make(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
        fd, collect = bench.pipe_to()
        return bench.keep(opener(fd)), collect

    return make


def _to_stuck_pipe(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
    """A non-blocking pipe that nobody reads until the end."""
    read_end, write_end = os.pipe()
    reader = bench.keep(open(read_end, "rb"))
    return bench.keep(open(_nonblocking(write_end), "wb")), reader.read


def _to_socket(
    change: Callable[[Bench, Any], Any] = lambda bench, sock: sock,
    mode: str = "wb",
    buffering: int = -1,
) -> Callable[[Bench], tuple[Any, Callable[[], bytes]]]:
    def make(bench: Bench) -> tuple[Any, Callable[[], bytes]]:
        ours, theirs = bench.pair()
        received = bench.spawn(receive_all, theirs)
        return _socket_file(bench, change(bench, ours), mode, buffering), received.get

    return make


_SINKS = (
    Sink("buffered", FILE, _to_path(lambda p: open(p, "wb"))),
    Sink("raw", FILE, _to_path(lambda p: open(p, "wb", 0))),
    Sink("random", FILE, _to_path(lambda p: open(p, "r+b"))),
    Sink("memfd", FILE, _to_memory),
    Sink("named temporary", FILE, _to_named),
    Sink("FileObjectPosix", FILE, _to_path(lambda p: FileObjectPosix(p, "wb"))),
    Sink("FileObjectPosix, raw", FILE, _to_path(lambda p: FileObjectPosix(p, "wb", 0))),
    Sink("FileObjectPosix, random", FILE, _to_path(lambda p: FileObjectPosix(p, "r+b"))),
    Sink("FileObjectBlock", FILE, _to_path(lambda p: FileObjectBlock(p, "wb"))),
    Sink("FileObjectBlock, raw", FILE, _to_path(lambda p: FileObjectBlock(p, "wb", 0))),
    Sink(
        "FileObjectThread",
        "destination_type",
        _to_path(lambda p: FileObjectThread(p, "wb")),
        most=2 << 20,
    ),
    Sink("append", "append", _to_path(lambda p: open(p, "ab"))),
    Sink("append and read", "append", _to_path(lambda p: open(p, "a+b"))),
    Sink("spooled", "destination_type", _to_spooled),
    Sink("BytesIO", "destination_type", _to_bytesio),
    Sink("gzip", "destination_type", _to_gzip, most=1 << 20),
    Sink("text", "destination_type", _to_path(lambda p: open(p, "w", encoding="latin-1"), old=b"")),
    Sink("FileIO subclass", "destination_type", _to_path(lambda p: FlippingFileIO(p, "r+"))),
    Sink(
        "buffer on FileIO subclass",
        "destination_type",
        _to_path(lambda p: io.BufferedWriter(FlippingFileIO(p, "r+"))),
    ),
    Sink(
        "buffer on foreign raw",
        "destination_type",
        _to_path(lambda p: io.BufferedWriter(ForeignRaw(io.FileIO(p, "r+")))),
    ),
    Sink("own write", "destination_type", _to_path(lambda p: own_write(open(p, "wb")))),
    Sink("own write, raw", "destination_type", _to_path(lambda p: own_write(open(p, "wb", 0)))),
    Sink(
        "own write, raw of a buffer",
        "destination_type",
        _to_path(lambda p: io.BufferedWriter(own_write(io.FileIO(p, "wb")))),
    ),
    Sink(
        "own write, FileObjectBlock",
        "destination_type",
        _to_path(lambda p: own_write(FileObjectBlock(p, "wb"))),
    ),
    Sink("read-only", "destination_type", _to_path(lambda p: open(p, "rb"))),
    Sink(
        "reader on a file that could be written",
        "destination_type",
        _to_path(lambda p: io.BufferedReader(io.FileIO(p, "r+"))),
    ),
    Sink("nothing", "destination_type", _to_path(lambda p: None)),
    Sink("closed", "closed", _to_path(lambda p: _closed(open(p, "wb")))),
    Sink("pipe", PIPE, _to_pipe(lambda fd: open(fd, "wb"))),
    Sink("pipe, raw", PIPE, _to_pipe(lambda fd: open(fd, "wb", 0))),
    Sink("pipe, non-blocking", "nonblocking", _to_stuck_pipe, most=FITS - (8 << 10)),
    Sink("pipe, FileObjectPosix", PIPE, _to_pipe(lambda fd: FileObjectPosix(fd, "wb"))),
    Sink(
        "pipe, FileObjectPosix, raw",
        PIPE,
        _to_pipe(lambda fd: FileObjectPosix(fd, "wb", 0)),
        short_writes=True,
    ),
    Sink("pipe, FileObjectBlock", PIPE, _to_pipe(lambda fd: FileObjectBlock(fd, "wb"))),
    Sink(
        "pipe, FileObjectThread",
        "destination_type",
        _to_pipe(lambda fd: FileObjectThread(fd, "wb")),
        most=1 << 20,
    ),
    Sink("socket", SOCKET, _to_socket()),
    Sink("socket, raw", SOCKET, _to_socket(buffering=0), short_writes=True),
    Sink("socket, read and write", "destination_type", _to_socket(mode="rwb")),
    Sink(
        "socket, plain subclass",
        SOCKET,
        _to_socket(lambda bench, sock: as_class(bench, PlainSubclass, sock)),
    ),
    Sink(
        "socket, subclass with its own send",
        "socket_type",
        _to_socket(lambda bench, sock: as_class(bench, FlippingSocket, sock)),
    ),
    Sink(
        "socket, non-blocking",
        "nonblocking",
        _to_socket(lambda bench, sock: _later(sock, 0)),
        most=FITS,
    ),
)


def _can_be_made(kind: Source | Sink) -> bool:
    """libuv does not watch regular files, so gevent makes no FileObjectPosix of one there."""
    return "libuv" not in gevent.config.loop.__module__ or not kind.name.startswith(
        "FileObjectPosix"
    )


SOURCES = tuple(filter(_can_be_made, _SOURCES))
SINKS = tuple(filter(_can_be_made, _SINKS))
