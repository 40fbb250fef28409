"""What pywsgi sends with gsplice, and what is seen of it, is what it is without."""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import gevent.ssl
import pytest
from answers import APPS, LARGE, answering, comparable, dated
from conftest import file_of, receive_all
from ends import GUARD, until
from gevent import pywsgi
from geventwebsocket.handler import WebSocketHandler
from unpatched import unpatched
from wsgi import App, Server, file_app, request, split

TCP_INFO, TCP_CLOSE = 11, 7  # linux/tcp.h


def tcp_state(sock: Any) -> int:
    return int(sock.getsockopt(gevent.socket.IPPROTO_TCP, TCP_INFO, 1)[0])


REQUESTS: dict[str, list[str]] = {
    "GET": [request()],
    "HEAD": [request("HEAD")],
    "HTTP/1.0": [request(version="1.0")],
    "HTTP/1.0 kept alive": [
        request("GET", "Connection: keep-alive", version="1.0"),
        request(version="1.0"),
    ],
    "HTTP/0.9": ["GET /\r\n\r\n"],
    "pipelined": [request(close=False), request("HEAD", close=False), request()],
    "100-continue": [
        request("POST", "Content-Length: 5", "Expect: 100-continue", close=False) + "hello",
        request(),
    ],
    "upgrade": [request("GET", "Connection: upgrade", "Upgrade: echo", close=False), request()],
    "bad request": [request(close=False), "nonsense\r\n\r\n"],
    "bad length": [request("POST", "Content-Length: -1")],
    "bad chunks": [request("POST", "Transfer-Encoding: chunked") + "nonsense\r\n"],
    "too long": ["GET /" + "x" * 9000 + " HTTP/1.1\r\n\r\n"],
}


@pytest.fixture(autouse=True)
def _quiet(quiet: None) -> None:
    """The errors of these applications need not fill the log."""


@pytest.mark.few
@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("kind", [kind for kind in APPS if kind != "file"])
def test_the_bytes_and_the_log_are_those_of_pywsgi(serve: Any, kind: str, asked: str) -> None:
    def all_that_is_seen() -> tuple[bytes, list[list[str]], int]:
        noted: list[Any] = []

        class Handler(pywsgi.WSGIHandler):
            def log_request(self) -> None:
                noted.append((self.status, self.code, self.response_length, self.close_connection))
                super().log_request()

        server = serve(APPS[kind], Handler)
        with gevent.Timeout(GUARD):
            answer = server.ask(*REQUESTS[asked])
        # Dates have one length.
        return comparable(answer), noted, len(server.errors.getvalue().splitlines())

    ours = all_that_is_seen()
    with unpatched():
        assert ours == all_that_is_seen()


SENDERS = ["_sendall", "_write", "write", "_write_with_headers"]


@pytest.mark.few
@pytest.mark.parametrize("where", ["class", "instance", "while it answers"])
@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize("kind", ["list", "several pieces", "chunked", "write, several", "file"])
def test_who_overrides_a_method_that_sends_sees_what_it_saw(
    serve: Any, kind: str, name: str, where: str
) -> None:
    """Byte by byte, and call by call."""

    def all_that_is_seen() -> tuple[list[bytes], bytes]:
        calls: list[bytes] = []

        class Handler(pywsgi.WSGIHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                if where == "instance":
                    self.replace()

            def replace(self) -> None:
                original = getattr(self, name)
                setattr(self, name, lambda data: (calls.append(bytes(data)), original(data))[1])

            def run_application(self) -> None:
                if where == "while it answers":
                    self.replace()
                super().run_application()

        def method(self: Any, data: bytes) -> None:
            calls.append(bytes(data))
            getattr(pywsgi.WSGIHandler, name)(self, data)

        if where == "class":
            setattr(Handler, name, method)
        answer = serve(dated(APPS[kind]), Handler).ask(request())
        return calls, answer

    ours = all_that_is_seen()
    with unpatched():
        assert ours == all_that_is_seen()
    assert ours[0]


class Shouting:
    """A connection that changes what it sends, as TLS does."""

    def __init__(self, sock: Any) -> None:
        self._behind = sock

    def sendall(self, data: bytes) -> None:
        self._behind.sendall(bytes(data).upper())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


@pytest.mark.parametrize("kind", ["list", "several pieces", "chunked", "write, several", "file"])
def test_a_handler_that_changes_its_connection_under_way(serve: Any, kind: str) -> None:
    class Handler(pywsgi.WSGIHandler):
        def run_application(self) -> None:
            self.socket = Shouting(self.socket)
            super().run_application()

    def answer() -> bytes:
        return serve(dated(APPS[kind]), Handler).ask(request())

    ours = answer()
    assert b"CONTENT-LENGTH" in ours or b"CHUNKED" in ours
    with unpatched():
        assert ours == answer()


@pytest.mark.parametrize("kind", ["list", "several pieces", "chunked", "write, several"])
def test_a_client_that_has_gone_is_noted_as_before(serve: Any, kind: str) -> None:
    def all_that_is_noted() -> list[Any]:
        noted: list[Any] = []

        class Handler(pywsgi.WSGIHandler):
            def log_request(self) -> None:
                noted.append((self.status, self.code, self.response_length, self.close_connection))

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            theirs = environ["wsgi.input"].rfile.raw._sock
            sock.setsockopt(
                gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER, b"\1\0\0\0" + bytes(4)
            )
            sock.close()
            until(
                lambda: theirs.getsockopt(gevent.socket.IPPROTO_TCP, TCP_INFO, 1) == b"\7"
            )  # TCP_CLOSE
            return APPS[kind](environ, start_response)

        server = serve(app, Handler)
        sock = server.connect()
        sock.sendall(request().encode())
        until(lambda: noted)
        assert server.errors.getvalue() == ""
        return noted

    ours = all_that_is_noted()
    assert ours[0][0].startswith("socket error: [Errno ")
    with unpatched():
        assert ours == all_that_is_noted()


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", ["list", "chunked"])
def test_a_response_that_leaves_in_parts_is_counted_as_before(
    serve: Any, kind: str, reads: bool
) -> None:
    """A send takes a part of it only; the client reads the rest, or never does."""

    def all_that_is_seen() -> tuple[list[Any], bytes]:
        noted: list[Any] = []

        class Handler(pywsgi.WSGIHandler):
            def log_request(self) -> None:
                noted.append((self.status, self.code, self.response_length, self.close_connection))

            def __init__(self, sock: Any, *args: Any) -> None:
                sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_SNDBUF, 1)
                sock.settimeout(GUARD if reads else 0.1)
                super().__init__(sock, *args)

        make = (lambda: [LARGE[:60_000]]) if kind == "list" else (lambda: iter([LARGE[:60_000]]))
        server = serve(answering(make), Handler)
        with gevent.socket.socket() as sock, gevent.Timeout(GUARD):
            sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, 1)
            sock.connect(server.server.address)
            sock.sendall(request().encode())
            if not reads:
                until(lambda: noted)
            answer = comparable(receive_all(sock))
        assert LARGE[:60_000].startswith(split(answer)[2]) or kind == "chunked"
        return noted, answer if reads else b""

    ours = all_that_is_seen()
    assert (ours[0][0][0] == b"200 OK") == reads
    with unpatched():
        assert ours == all_that_is_seen()


@contextlib.contextmanager
def listening_elsewhere(kind: str, directory: Path, app: App) -> Iterator[Callable[[], Any]]:
    """Serve on a Unix socket or over TLS; give what connects to it."""
    if kind == "unix":
        listener = gevent.socket.socket(gevent.socket.AF_UNIX)
        listener.bind(os.fspath(directory / "sock"))
        listener.listen()
        server = pywsgi.WSGIServer(listener, app, log=None)
    else:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"]
        key, cert = os.fspath(directory / "key"), os.fspath(directory / "cert")
        command += ["-keyout", key, "-out", cert]
        subprocess.run(command, check=True, capture_output=True)
        theirs = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(cert, key)
        server = pywsgi.WSGIServer(("127.0.0.1", 0), app, log=None, ssl_context=theirs)

    def connect() -> Any:
        if kind == "unix":
            sock = gevent.socket.socket(gevent.socket.AF_UNIX)
            sock.connect(os.fspath(directory / "sock"))
            return sock
        context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(gevent.socket.create_connection(server.address))

    server.start()
    try:
        yield connect
    finally:
        server.stop()
        if kind == "unix":
            listener.close()
            os.unlink(directory / "sock")


@pytest.mark.parametrize("listener", ["unix", "tls"])
def test_unix_sockets_and_tls_are_as_before(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends: list[bytes] = []
    cls: Any = gevent.socket.socket if listener == "unix" else gevent.ssl.SSLSocket
    sendall = cls.sendall

    def noted(self: Any, data: bytes, *args: Any) -> Any:
        sends.append(bytes(data))
        return sendall(self, data, *args)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        kind = environ["PATH_INFO"][1:].replace("_", " ")
        return dated(APPS[kind])(environ, start_response)

    def all_that_is_seen() -> tuple[bytes, list[bytes]]:
        sends.clear()
        answers = b""
        with listening_elsewhere(listener, tmp_path, app) as connect:
            for kind in ("list", "several pieces", "chunked", "write"):
                with gevent.Timeout(GUARD), connect() as sock:
                    asked = request().replace("/", f"/{kind.replace(' ', '_')}", 1)
                    sock.sendall(asked.encode())
                    answers += receive_all(sock)
        return answers, [*sends]

    monkeypatch.setattr(cls, "sendall", noted)
    ours = all_that_is_seen()
    assert len(ours[1]) > 12
    with unpatched():
        assert ours == all_that_is_seen()


def frame(opcode: int, data: bytes) -> bytes:
    """Return what a client sends (RFC 6455), masked with zeros."""
    return bytes([0x80 | opcode, 0x80 | len(data)]) + bytes(4) + data


def test_websockets_of_gevent_websocket(serve: Any) -> None:
    """The handshake, messages both ways, and what is no websocket on the same server."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        websocket = environ.get("wsgi.websocket")
        if websocket is None:
            return APPS["several pieces"](environ, start_response)
        while (message := websocket.receive()) is not None:
            websocket.send(message.upper())
        return []

    def all_that_is_seen(version: str) -> tuple[bytes, bytes]:
        server: Server = serve(app, WebSocketHandler)
        key = base64.b64encode(bytes(16)).decode()
        asked = request(
            "GET",
            "Connection: Upgrade",
            "Upgrade: websocket",
            f"Sec-WebSocket-Key: {key}",
            f"Sec-WebSocket-Version: {version}",
            close=False,
        )
        with gevent.Timeout(GUARD), server.connect() as sock:
            sock.sendall(asked.encode())
            received = b""
            for message in (b"first", b"second"):
                sock.sendall(frame(1, message))
                while version == "13" and message.upper() not in received:
                    received += sock.recv(65536)
            sock.sendall(frame(8, b"\x03\xe8"))
            received += receive_all(sock)
        return received, comparable(server.ask(request(close=False), request()))

    ours = [all_that_is_seen(version) for version in ("13", "99")]
    assert b"101 Switching Protocols" in ours[0][0]
    with unpatched():
        assert ours == [all_that_is_seen(version) for version in ("13", "99")]


def test_a_connection_that_was_open_before_goes_on(serve: Any, tmp_path: Path) -> None:
    """It has begun without gsplice, or with it, and ends otherwise."""
    path = file_of(tmp_path / "f", 100_000)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "POST":
            return file_app(path, ("Date", "never"), ("Content-Length", "100000"))(
                environ | {"wsgi.file_wrapper": environ.get("wsgi.file_wrapper", iter)},
                start_response,
            )
        return answering(lambda: [b"some", b"body"], ("Date", "never"))(environ, start_response)

    asked = (request(close=False).encode(), request("POST", close=False).encode())

    def answers(sock: Any) -> bytes:
        for one in asked:
            sock.sendall(one)
        received = b""
        while not received.endswith(path.read_bytes()):
            received += sock.recv(1 << 20)
        return received

    server = serve(app)
    with gevent.Timeout(GUARD):
        with unpatched():
            before = server.connect()
            first = answers(before)
            after = server.connect()
        assert answers(before) == first
        with server.connect() as sock:
            assert answers(sock) == first
            with unpatched():
                assert answers(sock) == first
        assert answers(after) == first
        before.close()
        after.close()
