"""The example file server, as its users meet it: a process of its own, spoken to over TCP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from example_file_server import (
    BIG,
    SCRIPT,
    TIMEOUT,
    Answer,
    Server,
    ask,
    serving,
)
from paths import PROJECT

# The start and the end of the process.


def test_start_prints_the_address_and_what_is_patched(root: Path) -> None:
    with serving(root, "--no-patch") as server:
        expected = f"Serving {root} at http://127.0.0.1:{server.port}/ (Ctrl-C to stop)\n"
        assert server.lines[0] == expected
        assert server.lines[1] == "gsplice patched: nothing (--no-patch)\n"
    with serving(root) as server:
        assert "sendfile" in server.lines[1]
        assert "copyfileobj" in server.lines[1]


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [[], ["--no-patch"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_cleanly_in_the_middle_of_a_download(
    huge: Path, number: int, options: list[str]
) -> None:
    with (
        serving(huge, *options) as server,
        socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as idle,
        socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as busy,
    ):
        idle.sendall(b"GET / HT")
        busy.sendall(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        assert busy.recv(12) == b"HTTP/1.1 200"
        assert server.stop(number) == (0, "")


def test_access_log_is_off_unless_asked_for(root: Path) -> None:
    with serving(root, "--no-patch", "--access-log") as server:
        server.get("/text.txt")
        code, errors = server.stop()
    assert code == 0
    assert '"GET /text.txt HTTP/1.1" 200' in errors  # without it: see the fixture's last line


def test_a_port_that_is_taken_is_said_in_one_line(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--no-patch", "--port", str(port), str(root)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert result.stderr.count("\n") == 1


# Files.


def test_big_file(server: Server, root: Path) -> None:
    answer = server.get("/big.bin")
    assert answer.status == 200
    assert answer.body == BIG
    assert answer.headers["Content-Length"] == str(len(BIG))
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Transfer-Encoding" not in answer.headers
    assert "Content-Range" not in answer.headers


def test_empty_file(server: Server) -> None:
    for headers in ({}, {"Range": "bytes=0-5"}, {"Range": "bytes=-0"}):
        answer = server.get("/Empty.dat", **headers)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["Content-Length"] == "0"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/text.txt", "text/plain; charset=utf-8"),
        ("/page.html", "text/html; charset=utf-8"),
        ("/unknown.qqq", "application/octet-stream"),
        ("/archive.tar.gz", "application/gzip"),
        ("/data:,x.html", "text/html; charset=utf-8"),
    ],
)
def test_content_type(server: Server, path: str, expected: str) -> None:
    answer = server.get(path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == expected
    assert "Content-Encoding" not in answer.headers


@pytest.mark.parametrize("path", ["/big.bin", "/text.txt", "/Empty.dat", "/", "/sub", "/nope"])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    with contextlib.closing(server.connect()) as connection:
        head = ask(connection, path, "HEAD", {})
        get = ask(connection, path, "GET", {})
    assert head.body == b""
    assert head.status == get.status
    assert head.headers["Content-Length"] == str(len(get.body))
    assert without_date(head) == without_date(get)


def without_date(answer: Answer) -> list[tuple[str, str]]:
    return sorted(item for item in answer.headers.items() if item[0] != "Date")


def test_both_servers_send_the_same(root: Path) -> None:
    requests = [
        ("/big.bin", {}),
        ("/big.bin", {"Range": "bytes=100000-300000"}),
        ("/big.bin", {"Range": "bytes=99999999-"}),
        ("/Empty.dat", {}),
        ("/text.txt", {"If-None-Match": "*"}),
        ("/", {}),
        ("/sub", {}),
        ("/nope", {}),
    ]
    with serving(root) as patched, serving(root, "--no-patch") as plain:
        for path, headers in requests:
            answers = []
            for server in (patched, plain):
                with contextlib.closing(server.connect()) as connection:
                    answers.append(ask(connection, path, "GET", headers))
            first, second = answers
            assert first.status == second.status, path
            assert first.body == second.body, path
            assert without_date(first) == without_date(second), path
