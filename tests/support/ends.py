"""Both ends of a transfer, with somebody behind each of them who feeds it or drains it."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket as stdlib_socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
from conftest import receiver
from gevent.fileobject import FileObjectPosix

import gsplice

KiB = 1024
MiB = 1024 * KiB

#: Seconds after which a wait counts as a hang: a guard, never a measure.
GUARD = 30

FILES = {"file"}
SOCKETS = {"tcp", "unix", "bare_tcp", "bare_unix"}  # bare: the socket itself, not its makefile()
PIPES = {"pipe", "popen", "stdlib_popen"}
KINDS = sorted(FILES | SOCKETS | PIPES)

#: Called through the patched name, so that it is what a program would get.
MOVERS: dict[str, Callable[..., Any]] = {
    "copyfileobj": lambda src, dst: shutil.copyfileobj(src, dst),
    "copy": lambda src, dst: gsplice.copy(src, dst),
}


def until(condition: Callable[[], Any]) -> None:
    """Let the other greenlets run until *condition* holds."""
    with gevent.Timeout(GUARD):
        while not condition():
            gevent.sleep(0.001)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have no file grow beyond *size*, as if the disk were full then, but with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def threads_done() -> None:
    """Wait until the threads of this hub have nothing left to do."""
    threads = gevent.get_hub().__dict__.get("_gsplice_threads")
    if threads is not None:
        until(lambda: not len(threads._workers))


def is_waited_for(sock: Any, event: str = "write") -> bool:
    """Say whether a greenlet waits until *sock* can be written (or read)."""
    return getattr(sock, f"_{event}_event").callback is not None


def connection(kind: str = "tcp", buffers: int | None = None) -> tuple[Any, Any]:
    """Return two connected gevent sockets, with *buffers* bytes of room each if it is given."""
    if kind == "unix":
        pair = gevent.socket.socketpair()
    else:
        with gevent.socket.socket() as listener:
            if buffers:
                listener.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, buffers)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client = gevent.socket.create_connection(listener.getsockname())
            pair = client, listener.accept()[0]
    if buffers:
        for sock in pair:
            for option in (stdlib_socket.SO_SNDBUF, stdlib_socket.SO_RCVBUF):
                sock.setsockopt(stdlib_socket.SOL_SOCKET, option, buffers)
    return pair


@contextlib.contextmanager
def mounted(place: Path, *arguments: str | Path) -> Iterator[None]:
    """Mount something at *place*: needs root, as CI is."""
    subprocess.run(["mount", *arguments, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


class Ends(contextlib.ExitStack):
    """Makes ends, and cleans up behind them on exit."""

    def __init__(self, directory: Path, buffers: int | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.buffers = buffers
        self._number = 0

    def path(self) -> Path:
        """Return a new path."""
        self._number += 1
        return self.directory / f"end{self._number}"

    def connect(self, kind: str = "tcp") -> tuple[Any, Any]:
        """Return two connected sockets."""
        pair = connection(kind.removeprefix("bare_"), self.buffers)
        for sock in pair:
            self.callback(sock.close)
        return pair

    def pipe(self, buffering: int = -1) -> tuple[Any, Any]:
        """Return both ends of a pipe as gevent file objects."""
        read_fd, write_fd = os.pipe()
        reader = FileObjectPosix(read_fd, "rb", buffering=buffering)
        writer = FileObjectPosix(write_fd, "wb", buffering=buffering)
        self.callback(_close, reader)
        self.callback(_close, writer)
        return reader, writer

    def spawn(self, function: Callable[..., Any], *args: Any) -> gevent.Greenlet:
        """Start a greenlet that does not outlive this."""
        greenlet = gevent.spawn(function, *args)
        self.callback(greenlet.kill)
        return greenlet

    def source(self, kind: str, data: bytes) -> Any:
        """Return an object to read *data*, and then end of file, from."""
        if kind == "file":
            path = self.path()
            path.write_bytes(data)
            return self.enter_context(path.open("rb"))
        if kind in SOCKETS:
            ours, theirs = self.connect(kind)
            self.spawn(_send, theirs, data)
            return ours if kind.startswith("bare") else self._makefile(ours, "rb")
        if kind == "pipe":
            reader, writer = self.pipe()
            self.spawn(_write, writer, data)
            return reader
        path = self.path()
        path.write_bytes(data)
        module = gevent.subprocess if kind == "popen" else subprocess
        return self.enter_context(module.Popen(["cat", path], stdout=subprocess.PIPE)).stdout

    def sink(
        self, kind: str, request: bytes = b"", half_closed: bool = False
    ) -> tuple[Any, Callable[[], bytes]]:
        """Return an object to write to, and what finishes it and tells what has arrived.

        Behind a socket somebody sends *request* first, and perhaps no more than that.
        """
        if kind == "file":
            path = self.path()
            file = self.enter_context(path.open("wb"))
            return file, lambda: (file.close(), path.read_bytes())[1]
        if kind in SOCKETS:
            ours, theirs = self.connect(kind)
            theirs.sendall(request)
            if half_closed:
                theirs.shutdown(stdlib_socket.SHUT_WR)
            arrived = receiver(theirs)
            self.callback(arrived.kill)
            obj = ours if kind.startswith("bare") else self._makefile(ours, "wb")
            return obj, lambda: (obj.close(), ours.close(), arrived.get(timeout=GUARD))[2]
        if kind == "pipe":
            reader, writer = self.pipe()
            arrived = self.spawn(reader.read)
            return writer, lambda: (writer.close(), arrived.get(timeout=GUARD))[1]
        path = self.path()
        command = ["sh", "-c", 'exec cat >"$0"', path]
        module = gevent.subprocess if kind == "popen" else subprocess
        child = self.enter_context(module.Popen(command, stdin=subprocess.PIPE))
        return child.stdin, lambda: (child.stdin.close(), child.wait(), path.read_bytes())[2]

    def _makefile(self, sock: Any, mode: str) -> Any:
        file = sock.makefile(mode)
        self.callback(_close, file)
        return file


def _close(file: Any) -> None:
    with contextlib.suppress(OSError):  # unsent bytes, after a test that broke the connection
        file.close()


def _send(sock: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the other side may have had enough
        sock.sendall(data)
        sock.shutdown(stdlib_socket.SHUT_WR)


def _write(file: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):
        file.write(data)
        file.close()
