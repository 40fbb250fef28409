"""Clients that keep the connection, stall, go away, or ask in old ways."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from example_file_server import (
    BIG,
    HOSTILE,
    ORDINARY,
    SECRET,
    TEXT,
    TIMEOUT,
    Listing,
    Server,
    ask,
    open_files,
    serving,
)


def test_keep_alive_after_each_kind_of_answer(server: Server) -> None:
    with contextlib.closing(server.connect()) as connection:
        connection.connect()
        sock = connection.sock
        for method, path, headers, status in [
            ("GET", "/big.bin", {}, 200),
            ("GET", "/big.bin", {"Range": "bytes=5-200000"}, 206),
            ("HEAD", "/big.bin", {}, 200),
            ("GET", "/big.bin", {"If-None-Match": "*"}, 304),
            ("GET", "/big.bin", {"Range": "bytes=99999999-"}, 416),
            ("GET", "/Empty.dat", {}, 200),
            ("GET", "/nope", {}, 404),
            ("POST", "/text.txt", {"Content-Length": "0"}, 405),
            ("GET", "/", {}, 200),
            ("GET", "/text.txt", {}, 200),
        ]:
            answer = ask(connection, path, method, headers)
            assert answer.status == status
            assert connection.sock is sock, "the connection was closed"
        assert answer.body == TEXT


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    request = b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n"
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(request % (b"/big.bin", b"") + request % (b"/text.txt", b""))
        sock.sendall(request % (b"/big.bin", b"Range: bytes=-7\r\nConnection: close\r\n"))
        with sock.makefile("rb") as stream:
            everything = stream.read()
    assert everything.count(b"HTTP/1.1 20") == 3
    first, second, third = (
        everything.index(body + end)
        for body, end in [(BIG, b"HTTP/"), (TEXT, b"HTTP/"), (BIG[-7:], b"")]
    )
    assert first < second
    assert everything.endswith(b"\r\n\r\n" + BIG[-7:])
    assert third


def test_http_1_0(server: Server) -> None:
    answer = server.raw(b"GET /big.bin HTTP/1.0\r\n\r\n")
    assert answer.status == 200
    assert answer.body == BIG


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [[], ["--no-patch"]])
def test_clients_that_stall_or_go_away(huge: Path, options: list[str]) -> None:
    request = b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(huge, *options) as server:
        files = f"/proc/{server.process.pid}/fd"
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as stalled:
            stalled.sendall(request)
            assert stalled.recv(12) == b"HTTP/1.1 200"
            assert server.get("/").status == 200, "a stalled client must not hold up others"
            assert open_files(huge, files) == [str(huge / "huge")]
        deadline = time.monotonic() + TIMEOUT
        while open_files(huge, files) and time.monotonic() < deadline:
            server.get("/")
        assert open_files(huge, files) == []
        assert server.stop() == (0, "")


@pytest.mark.few(2)
@pytest.mark.parametrize("options", [[], ["--no-patch"]])
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_slow_clients_cost_no_thread(root: Path, options: list[str], sent: bytes) -> None:
    with serving(root, *options) as server, contextlib.ExitStack() as stack:
        threads = f"/proc/{server.process.pid}/task"
        server.get("/")
        before = len(os.listdir(threads))
        slow = []
        for _ in range(100):
            sock = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
            slow.append(stack.enter_context(sock))
            sock.sendall(sent)
        for _ in range(3):
            for sock in slow:
                sock.sendall(b"x" if sent else b"")
            assert server.get("/").status == 200
        assert len(os.listdir(threads)) <= before
        assert server.stop() == (0, "")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("sent", "drip", "answer"),
    [
        (b"", b"", b""),
        (b"GET /", b"x", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"x", b"HTTP/1.1 400 Bad Request"),
        (b"HEAD /nope HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"HTTP/1.1 404 NOT FOUND"),
    ],
)
def test_header_timeout(root: Path, sent: bytes, drip: bytes, answer: bytes) -> None:
    with (
        serving(root, "--no-patch", "--header-timeout", "1") as server,
        socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock,
    ):
        sock.sendall(sent)
        sock.settimeout(0.1)
        received = b""
        with contextlib.suppress(ConnectionError):
            while not received.endswith(b"closed"):
                try:
                    received += sock.recv(1000) or b"closed"
                except TimeoutError:
                    sock.sendall(drip)
        received = received.removesuffix(b"closed")
        assert received.partition(b"\r\n")[0] == answer
        assert server.get("/").status == 200
        code, errors = server.stop()
    assert code == 0
    assert errors.count("\n") == (answer == b"HTTP/1.1 400 Bad Request"), errors


def test_header_timeout_does_not_limit_downloads(huge: Path) -> None:
    with (
        serving(huge, "--header-timeout", "1") as server,
        socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock,
    ):
        sock.sendall(b"GET /huge HTTP/1.1\r\nHost: x\r\nRange: bytes=0-99999999\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        time.sleep(1.5)
        assert len(response.read()) == 100_000_000


@pytest.mark.parametrize("options", [[], ["--no-patch"]])
def test_file_that_becomes_shorter_ends_the_connection(huge: Path, options: list[str]) -> None:
    request = b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n"
    with (
        serving(huge, *options) as server,
        socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock,
    ):
        sock.sendall(request)
        response = http.client.HTTPResponse(sock)
        response.begin()
        os.truncate(huge / "huge", 0)
        with pytest.raises(http.client.IncompleteRead):  # a time-out, had it been kept open
            response.read()
        assert server.stop() == (0, "")


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (b"http://x/text.txt", TEXT),
        (b"HTTPS://user@[::1]:8000/text.txt?x=http://y/z", TEXT),
        (b"http://elsewhere.example/sub/inner.txt", b"inner"),
        (b"http://x/data:,x.html", b"colon"),
        (b"http://x/" + quote(HOSTILE).encode(), b"hostile"),
    ],
)
def test_absolute_form(server: Server, target: bytes, body: bytes) -> None:
    answer = server.raw_get(target)
    assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize("target", [b"http://x", b"http://x/", b"http://x?sort=size"])
def test_absolute_form_of_the_root(server: Server, target: bytes) -> None:
    assert "big.bin" in Listing(server.raw_get(target)).names


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "FOO"])
def test_other_methods_are_refused(server: Server, root: Path, method: str) -> None:
    answer = server.get("/text.txt", method=method)
    assert answer.status == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    assert (root / "text.txt").read_bytes() == TEXT


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["locked.txt", "locked/", "locked/inside.txt"])
def test_unreadable_is_403(tmp_path: Path, name: str) -> None:
    (tmp_path / "locked.txt").write_bytes(SECRET)
    (tmp_path / "locked.txt").chmod(0)
    (tmp_path / "locked").mkdir(mode=0)
    with serving(tmp_path, "--no-patch", prefix=ORDINARY) as server:
        answer = server.get("/" + name)
    (tmp_path / "locked").chmod(0o700)
    assert answer.status == 403
    assert b"403 Forbidden" in answer.body


def test_missing_is_404_with_a_readable_page(server: Server) -> None:
    for path in ("/nope", "/sub/nope", "/text.txt/", "/text.txt/below", "/" + "n" * 300):
        answer = server.get(path)
        assert answer.status == 404, path
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert b"404 Not Found" in answer.body
