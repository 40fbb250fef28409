"""Servers as people run them, in processes of their own, and what a client can ask them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, ended_with, file_of, receive_all
from paths import APPS

SIZE = 1_000_003

WSGI = ["pywsgi", "gunicorn-gevent", "gunicorn-gevent_pywsgi"]


def command(kind: str, fd: int, module: str = "apps") -> list[str]:
    if not kind.startswith("gunicorn"):
        return [sys.executable, str(APPS / f"{module}.py"), kind, str(fd)]
    conf = str(APPS / "gunicorn.conf.py")
    worker, *options = kind.removeprefix("gunicorn-").split()
    where = ["-b", f"fd://{fd}", "--chdir", str(APPS), f"{module}:app"]
    return [sys.executable, "-m", "gunicorn", "-c", conf, "-k", worker, *options, *where]


class Server:
    """A server in a process of its own, and what a client can ask it."""

    def __init__(self, address: Any) -> None:
        self.address = address

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def ask(self, asked: bytes) -> bytes:
        """Send *asked* on one connection and return all that comes until it is closed."""
        with self.connect() as sock:
            sock.sendall(asked)
            return receive_all(sock)

    def seen(self) -> Any:
        answer = self.ask(request("/stats"))
        return json.loads(answer[answer.index(b"{") :])


@contextlib.contextmanager
def serving(kind: str, root: Path, patched: bool, module: str = "apps") -> Iterator[Server]:
    environ = os.environ | {"APPS_ROOT": str(root), "APPS_GSPLICE": str(int(patched))}
    environ["PYTHONHASHSEED"] = "0"  # werkzeug lists methods in the order of a set
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        fd = listener.fileno()
        options = {"env": environ, "pass_fds": [fd], "start_new_session": True}
        with ended_with(command(kind, fd, module), **options) as process:
            try:
                yield Server(listener.getsockname())
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # gunicorn's workers as well


@pytest.fixture(scope="session")
def served(tmp_path_factory: Any) -> Path:
    directory: Path = tmp_path_factory.mktemp("served")
    file_of(directory / "file.bin", SIZE)
    return directory


@pytest.fixture(scope="session")
def servers(served: Path) -> Iterator[Callable[[str, bool], Server]]:
    """Start a server when it is first asked for."""
    started: dict[tuple[str, bool], Server] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: str, patched: bool) -> Server:
            if (kind, patched) not in started:
                started[kind, patched] = stack.enter_context(serving(kind, served, patched))
            return started[kind, patched]

        yield get


def request(
    path: str, *headers: str, method: str = "GET", version: str = "1.1", close: bool = True
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    if close and version == "1.1":
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


MIDDLE = "Range: bytes=200001-700000"


#: What is sent on one connection for a path whose ETag and Last-Modified are known.
EXCHANGES: dict[str, Callable[[str, str, str], list[bytes]]] = {
    "whole": lambda path, etag, date: [request(path)],
    "middle": lambda path, etag, date: [request(path, MIDDLE)],
    "suffix": lambda path, etag, date: [request(path, "Range: bytes=-300000")],
    "from": lambda path, etag, date: [request(path, "Range: bytes=400000-")],
    "beginning": lambda path, etag, date: [request(path, "Range: bytes=0-499999")],
    "everything": lambda path, etag, date: [request(path, f"Range: bytes=0-{SIZE - 1}")],
    "beyond": lambda path, etag, date: [request(path, "Range: bytes=900000-2000000")],
    "few": lambda path, etag, date: [request(path, "Range: bytes=5-104")],
    "last": lambda path, etag, date: [request(path, "Range: bytes=-1")],
    "unsatisfiable": lambda path, etag, date: [request(path, "Range: bytes=2000000-")],
    "several": lambda path, etag, date: [request(path, "Range: bytes=0-9,20-29")],
    "If-None-Match": lambda path, etag, date: [request(path, f"If-None-Match: {etag}")],
    "If-Modified-Since": lambda path, etag, date: [request(path, f"If-Modified-Since: {date}")],
    "If-Range": lambda path, etag, date: [request(path, MIDDLE, f"If-Range: {etag or date}")],
    "stale": lambda path, etag, date: [request(path, MIDDLE, 'If-Range: "other"')],
    "HEAD": lambda path, etag, date: [request(path, method="HEAD")],
    "HEAD of a range": lambda path, etag, date: [request(path, MIDDLE, method="HEAD")],
    "HEAD kept alive": lambda path, etag, date: [
        request(path, method="HEAD", close=False),
        request(path, MIDDLE),
    ],
    "POST": lambda path, etag, date: [request(path, "Content-Length: 0", method="POST")],
    "HTTP/1.0": lambda path, etag, date: [request(path, version="1.0")],
    "HTTP/1.0 kept alive": lambda path, etag, date: [
        request(path, MIDDLE, "Connection: keep-alive", version="1.0"),
        request(path, version="1.0"),
    ],
    "pipelined": lambda path, etag, date: [
        request(path, MIDDLE, close=False),
        request(path, close=False),
        request(path, "Range: bytes=5-104", close=False),
        request(path, f"If-None-Match: {etag}", close=False),
        request(path, MIDDLE),
    ],
}


def comparable(answer: bytes) -> tuple[list[str], str]:
    """Return the heads in *answer*, and a short name for all of it, but for what never is equal."""
    answer = re.sub(rb"\r\n(?:Date|Server): [^\r]*", b"", answer)
    heads = re.findall(rb"HTTP/1\.[01] [0-9]{3} .*?\r\n\r\n", answer, re.DOTALL)
    return [head.decode("latin-1") for head in heads], digest(answer)


def header(name: str, answer: bytes) -> str:
    found = re.search(rf"\r\n{name}: ([^\r]*)".encode(), answer.partition(b"\r\n\r\n")[0])
    return found[1].decode() if found else ""


def sendfile_grown(server: Server, asked: bytes) -> tuple[bytes, int]:
    """Return the answer, and how many of its bytes went by sendfile."""
    before = server.seen()["bytes_spliced"]
    answer = server.ask(asked)
    return answer, server.seen()["bytes_spliced"] - before
