"""Uploads: what a WSGI server gives as ``wsgi.input`` goes to a file by splice.

Each exchange is had with the same server without gsplice, and the answers are compared.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import digest, receive_all, some_bytes
from ends import KiB, MiB
from processes import WSGI, Server, comparable, request

BODY = b"first line\nsecond\n" + some_bytes(3 * MiB)

#: Bytes of a body that may have been read together with the head, and go through memory.
READ_AHEAD = 64 * KiB

PATHS = [
    "/upload/all",
    "/upload/begun",
    "/upload/werkzeug",
    "/upload/werkzeug/begun",
    "/upload/django",
    "/upload/django/begun",
    "/upload/falcon",  # whose readline() counts all that remains as read
]


def post(path: str, body: bytes = BODY, *headers: str, close: bool = True) -> bytes:
    length = f"Content-Length: {len(body)}"
    return request(path, length, *headers, method="POST", close=close) + body


def answers(received: bytes) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(rb"\{.*?\}\}", received)]


def seen_by_client(received: bytes, *keys: str) -> Any:
    """Return the heads and the *keys* of the answers; the counters differ."""
    heads, _ = comparable(re.sub(rb"Content-Length: [0-9]+", b"", received))
    return heads, [[seen[key] for key in keys] for seen in answers(received)]


@pytest.fixture(params=WSGI)
def both(request: Any, servers: Any) -> Callable[..., bytes]:
    """Has an exchange with a server with gsplice, and with one without, and compares."""

    def ask(exchange: Callable[[Server], bytes], *keys: str) -> bytes:
        ours, theirs = (exchange(servers(request.param, patched)) for patched in (True, False))
        keys = keys or ("digest", "error", "rest")
        assert seen_by_client(ours, *keys) == seen_by_client(theirs, *keys)
        assert all(seen["spliced"] == 0 for seen in answers(theirs))
        return ours

    return ask


@pytest.mark.few(3)
@pytest.mark.parametrize("path", PATHS)
def test_a_body(both: Any, path: str) -> None:
    [seen] = answers(both(lambda server: server.ask(post(path))))
    assert seen["error"] is None
    assert seen["digest"] == digest(BODY)
    assert len(BODY) - READ_AHEAD < seen["spliced"] < len(BODY)


def test_a_small_body(both: Any) -> None:
    [seen] = answers(both(lambda server: server.ask(post("/upload/all", BODY[:5000]))))
    assert seen["digest"] == digest(BODY[:5000])
    assert seen["spliced"] == 0


@pytest.mark.few
@pytest.mark.parametrize("path", PATHS)
def test_the_next_request_is_left_alone(both: Any, path: str) -> None:
    asked = post(path, close=False) + post(path, BODY[::-1], close=False) + request("/nothing")
    received = both(lambda server: server.ask(asked))
    first, second = answers(received)
    assert (first["digest"], second["digest"]) == (digest(BODY), digest(BODY[::-1]))
    assert min(first["spliced"], second["spliced"]) > 0
    assert received.count(b"HTTP/1.1 ") == 3


@pytest.mark.few
@pytest.mark.parametrize("number", [1, 2, 1000])
@pytest.mark.parametrize("path", PATHS)
def test_crlf_after_a_body_is_left_to_the_server(both: Any, path: str, number: int) -> None:
    """As old browsers sent it. What a server makes of it, it makes of it here, too."""

    def exchange(server: Server) -> bytes:
        received = b""
        with server.connect() as sock:
            sock.sendall(post(path, close=False) + b"\r\n" * number)
            while b"}}" not in received:
                received += sock.recv(4096)
            kept = b""
            with contextlib.suppress(OSError):  # it may have been closed by now, or reset
                sock.sendall(request("/nothing"))
                kept = receive_all(sock)
        first = received[: received.index(b"}}") + 2]
        return first + (b"HTTP/1.1 404 kept\r\n\r\n" if b" 404 " in received + kept else b"")

    [seen] = answers(both(exchange))
    assert seen["digest"] == digest(BODY)
    assert seen["spliced"] > 0


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_waits_to_be_asked(both: Any, path: str) -> None:
    def exchange(server: Server) -> bytes:
        head, _, _ = post(path, BODY, "Expect: 100-continue").partition(b"\r\n\r\n")
        with server.connect() as sock:
            sock.sendall(head + b"\r\n\r\n")
            first = sock.recv(len(b"HTTP/1.1 100 Continue\r\n\r\n"), socket.MSG_WAITALL)
            sock.sendall(BODY)
            return first + receive_all(sock)

    received = both(exchange)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answers(received)[0]["digest"] == digest(BODY)
    assert answers(received)[0]["spliced"] > 0


@pytest.mark.few
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sent", [2 * MiB, len(BODY) - 1])
def test_a_body_that_ends_too_early(both: Any, path: str, sent: int) -> None:
    """What has arrived is in the file; the original may lose what its last read() had got."""

    def exchange(server: Server) -> bytes:
        whole = post(path)
        with server.connect() as sock:
            sock.sendall(whole[: len(whole) - len(BODY) + sent])
            sock.shutdown(socket.SHUT_WR)
            return receive_all(sock)

    [seen] = answers(both(exchange, "error", "rest"))
    assert seen["digest"] == digest(BODY[:sent])
    assert seen["spliced"] > 0


def test_a_chunked_body(both: Any) -> None:
    pieces = [BODY[at : at + 100_000] for at in range(0, len(BODY), 100_000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = request("/upload/all", "Transfer-Encoding: chunked", method="POST")
    [seen] = answers(both(lambda server: server.ask(head + chunks + b"0\r\n\r\n")))
    assert seen["digest"] == digest(BODY)
    assert seen["spliced"] == 0
    assert seen["fallbacks"]["body"] > 0


@pytest.mark.parametrize("path", ["/upload/all", "/upload/werkzeug"])
def test_a_client_that_resets_the_connection(both: Any, path: str) -> None:
    """The server goes on."""

    def exchange(server: Server) -> bytes:
        whole = post(path)
        with server.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0] + [0] * 4))
            with contextlib.suppress(ConnectionResetError):
                sock.sendall(whole[: len(whole) // 2])
        return server.ask(post("/upload/all", BODY[:100]))

    assert answers(both(exchange))[0]["digest"] == digest(BODY[:100])
