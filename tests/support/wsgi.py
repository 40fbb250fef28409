"""A WSGI server in this process, what it is asked, and what comes from the wire."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import gevent.socket
import gevent.ssl
import pytest
from conftest import receive_all
from gevent import pywsgi

App = Callable[[dict[str, Any], Callable[..., Any]], Any]


class Server:
    """A WSGI server with one application, and what it was asked and logged."""

    def __init__(self, app: App, handler_class: type = pywsgi.WSGIHandler) -> None:
        self.log = io.StringIO()
        self.errors = io.StringIO()
        self.closed: list[str] = []
        self.server = pywsgi.WSGIServer(
            ("127.0.0.1", 0), app, log=self.log, error_log=self.errors, handler_class=handler_class
        )
        self.server.start()

    def connect(self) -> Any:
        return gevent.socket.create_connection(self.server.address)

    def ask(self, *requests: str) -> bytes:
        """Send the requests on one connection and return all that comes until it is closed."""
        with self.connect() as sock:
            sock.sendall("".join(requests).encode())
            return receive_all(sock)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(app: App, *args: Any) -> Server:
            server = Server(app, *args)
            stack.callback(server.server.stop)
            return server

        yield start


def request(method: str = "GET", *headers: str, version: str = "1.1", close: bool = True) -> str:
    lines = [f"{method} / HTTP/{version}", "Host: x", *headers]
    if close and version == "1.1":
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""])


def split(response: bytes) -> tuple[str, dict[str, str], bytes]:
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return status, headers, body


def file_app(
    path: Path, *headers: tuple[str, str], status: str = "200 OK", start: int = 0, **opening: Any
) -> App:
    """Make an application that answers with the file, wrapped by what the server offers."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response(status, list(headers))
        file = path.open("rb", **opening)
        file.seek(start)
        return environ["wsgi.file_wrapper"](file)

    return app


def unpatched(app: App) -> App:
    """Make the application whose result pywsgi iterates over, as it does without us."""

    def iterating(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        return iter(list(app(environ, start_response)))

    return iterating
