"""Behind what watches applications in production: the same answers, and it sees the same."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import file_of, receive_all
from processes import EXCHANGES, MIDDLE, SIZE, Server, comparable, header, request, serving
from slowfs import SlowFS

KINDS = ["pywsgi", "gunicorn-gevent", "gunicorn-gevent_pywsgi"]

#: Each wrapper by itself around an application without one, Sentry's own integrations, and pairs.
PATHS = [
    "/sentry/falcon/file.bin",
    "/newrelic/falcon/file.bin",
    "/opentelemetry/falcon/file.bin",
    "/validate/falcon/file.bin",
    "/closing/plain/",
    "/none/flask/send_file",
    "/none/django/file.bin",
    "/opentelemetry+sentry/whitenoise/file.bin",
    "/validate+opentelemetry/webob/",
    "/closing+sentry/pyramid/file.bin",
    "/newrelic+validate/flask/file.bin",
    "/sentry+newrelic/pyramid/FileIter",
    "/newrelic+closing+opentelemetry/django/File",
]

#: These know no ranges.
WHOLE_ONLY = [path for path in PATHS if "plain" in path or "django" in path]

#: Most that is sent as the first piece, Pyramid's.
FIRST = 256 * 1024

#: More than the buffers of two sockets hold.
BIG = 32 * 1024 * 1024

RESET = struct.pack("ii", 1, 0)


def events(server: Server) -> Any:
    """Return what has been recorded since the last time."""
    return json.loads(server.ask(request("/events")).partition(b"\r\n\r\n")[2])


def recorded(server: Server, number: int) -> Any:
    """Wait until *number* events have been recorded."""
    found: list[Any] = []
    while len(found) < number:
        found += events(server)
    return found


@pytest.fixture(scope="module")
def traced(served: Path) -> Iterator[Callable[[str, bool], Server]]:
    """Start a server when it is first asked for."""
    started: dict[tuple[str, bool], Server] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: str, patched: bool) -> Server:
            if (kind, patched) not in started:
                serves = serving(kind, served, patched, "traced")
                started[kind, patched] = stack.enter_context(serves)
            return started[kind, patched]

        yield get


@pytest.mark.few(4)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_and_the_events_are_the_same(traced: Any, kind: str, path: str) -> None:
    ours, theirs = traced(kind, True), traced(kind, False)
    first = theirs.ask(request(path))
    etag, date = header("ETag", first), header("Last-Modified", first)
    events(theirs)
    events(ours)
    for name, exchange in EXCHANGES.items():
        asked = b"".join(exchange(path, etag, date))
        assert comparable(ours.ask(asked)) == comparable(theirs.ask(asked)), name
        assert events(ours) == events(theirs), name
    assert ours.seen()["open_files"] == theirs.seen()["open_files"] == 0
    assert theirs.seen()["transfers"] == 0


@pytest.mark.few
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_way(traced: Any, served: Path, kind: str, path: str) -> None:
    content = (served / "file.bin").read_bytes()
    server = traced(kind, True)
    ranges: list[list[str]] = [[]] if path in WHOLE_ONLY else [[], [MIDDLE]]
    for headers in ranges:
        expected = content[200_001:700_001] if headers else content
        before = server.seen()
        answer = server.ask(request(path, *headers))
        after = server.seen()
        assert answer.partition(b"\r\n\r\n")[2] == expected
        spliced = after["bytes_spliced"] - before["bytes_spliced"]
        assert len(expected) - FIRST <= spliced < len(expected)
        assert after["fallbacks"] == before["fallbacks"]


@pytest.mark.few
@pytest.mark.parametrize("path", ["/unknown/flask/send_file", "/sentry+unknown/plain/"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_wrapper_is_counted(traced: Any, kind: str, path: str) -> None:
    server = traced(kind, True)
    before = server.seen()
    for asked in (request(path), request(path, method="HEAD"), request("/sentry/plain/nothing")):
        server.ask(asked)
    after = server.seen()
    assert after["fallbacks"]["result_type"] == before["fallbacks"].get("result_type", 0) + 1


@pytest.fixture
def big(tmp_path: Path) -> Path:
    with (tmp_path / "file.bin").open("wb") as file:
        file.truncate(BIG)
    return tmp_path


@pytest.mark.few
@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/newrelic/plain/", 1),
        ("/opentelemetry/plain/", 1),
        ("/closing/plain/", 1),
        ("/opentelemetry+closing+newrelic+sentry/plain/", 4),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("goes", [False, True])
def test_it_ends_when_the_body_has_been_sent_or_the_client_is_gone(
    big: Path, kind: str, path: str, number: int, goes: bool
) -> None:
    seen = []
    for patched in (True, False):
        with serving(kind, big, patched, "traced") as server, server.connect() as sock:
            sock.sendall(request(path))
            answer = sock.recv(1)
            # Sentry's transaction ends when the application returns, with or without gsplice.
            begun = recorded(server, int("sentry" in path))
            assert [event[0] for event in begun + events(server)] == ["sentry"] * len(begun)
            if goes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()
            else:
                answer += receive_all(sock)
                assert answer.partition(b"\r\n\r\n")[2] == bytes(BIG)
            ended = recorded(server, number - ("sentry" in path))
            for event in ended:
                if goes and event[0] == "newrelic":
                    sent = event[2]["bytes"]
                    assert 0 < sent < BIG
                    assert event[2]["calls.yield"] == -(-sent // 8192)
                    event[2] = None
            seen.append((begun, ended))
            while server.seen()["open_files"]:
                pass
    assert seen[0] == seen[1]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "path",
    [
        "/sentry/plain/",
        "/none/flask/send_file",
        "/none/django/file.bin",
        "/newrelic/plain/",
        "/opentelemetry+closing/plain/",
        "/validate+sentry/falcon/file.bin",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_byte", [0, 500_000])
def test_an_error_of_reading_is_seen_by_all(
    tmp_path: Path, kind: str, path: str, from_byte: int
) -> None:
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(SlowFS(tmp_path, "--direct-io"))
        content = file_of(slow.directory / "file.bin", SIZE).read_bytes()
        slow.fail("EIO", "file.bin", beyond=from_byte)
        seen = []
        for patched in (True, False):
            serves = serving(kind, slow.mount, patched, "traced")
            server = stack.enter_context(serves)
            answer = server.ask(request(path))
            head, _, body = answer.partition(b"\r\n\r\n")
            assert not from_byte or (content.startswith(body) and len(body) > 300_000)
            seen.append((head.partition(b"\r\n")[0], events(server)))
    assert seen[0] == seen[1]
    assert "Input/output error" in str(seen[0]) or "opentelemetry" in path


@pytest.mark.few(2)
@pytest.mark.parametrize("headers", [[], [MIDDLE]])
@pytest.mark.parametrize("kind", KINDS)
def test_others_are_served_while_a_disk_is_waited_for(
    tmp_path: Path, kind: str, headers: list[str]
) -> None:
    with SlowFS(tmp_path) as slow:
        content = file_of(slow.directory / "file.bin", SIZE).read_bytes()
        with serving(kind, slow.mount, True, "traced") as server:
            server.ask(request("/none/flask/send_file", method="HEAD"))  # imports Flask
            slow.hold("file.bin")
            with server.connect() as sock:
                sock.sendall(request("/none/flask/send_file", *headers))
                while not slow.begun("file.bin"):
                    pass
                assert server.seen()["transfers"] == 0
                slow.release("file.bin")
                body = receive_all(sock).partition(b"\r\n\r\n")[2]
    assert body == (content[200_001:700_001] if headers else content)
