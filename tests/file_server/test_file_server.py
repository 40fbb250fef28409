"""The example file server, as its users meet it: a process of its own, spoken to over TCP."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest
from example_file_server import (
    BIG,
    HOSTILE,
    SCRIPT,
    SECRET,
    TEXT,
    TIMEOUT,
    Answer,
    Server,
    ask,
    serving,
)
from paths import PROJECT

from gsplice.file_server import make_app
from gsplice.file_server.pages import moment

#: Root may read everything; without these two capabilities it may what its files' modes say.
ORDINARY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


@pytest.fixture(scope="module", params=["patched", "plain"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Server]:
    """A server in each of the two ways: whatever is not about counters holds for both."""
    with serving(root, *(["--no-patch"] if request.param == "plain" else [])) as server:
        yield server
        code, errors = server.stop()
    assert (code, errors) == (0, "")


# The start and the end of the process.


def test_start_prints_the_address_and_what_is_patched(root: Path) -> None:
    with serving(root, "--no-patch") as server:
        expected = f"Serving {root} at http://127.0.0.1:{server.port}/ (Ctrl-C to stop)\n"
        assert server.lines[0] == expected
        assert server.lines[1] == "gsplice patched: nothing (--no-patch)\n"
    with serving(root) as server:
        assert "sendfile" in server.lines[1]
        assert "copyfileobj" in server.lines[1]


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A directory with a file of more than any socket's buffers hold."""
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 30)
    return tmp_path


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


# Ranges and conditions.


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99999", 0, 100_000),
        ("bytes=1000001-2000000", 1_000_001, 2_000_001),
        ("bytes=3000000-", 3_000_000, len(BIG)),
        ("bytes=-100000", len(BIG) - 100_000, len(BIG)),
        ("bytes=-99999999", 0, len(BIG)),
        ("bytes=3199999-99999999", len(BIG) - 1, len(BIG)),
    ],
)
def test_range(server: Server, wanted: str, start: int, stop: int) -> None:
    answer = server.get("/big.bin", Range=wanted)
    assert answer.status == 206
    assert answer.body == BIG[start:stop]
    assert answer.headers["Content-Length"] == str(stop - start)
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(BIG)}"


@pytest.mark.parametrize(
    "wanted",
    ["bytes=100-", "bytes=100-200", "bytes=99999999999999999999-", "bytes=-0", "Bytes=-00"],
)
def test_range_without_any_byte_is_416(server: Server, wanted: str) -> None:
    answer = server.get("/text.txt", Range=wanted)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == "bytes */100"
    assert TEXT not in answer.body


@pytest.mark.few
@pytest.mark.parametrize(
    "wanted",
    [
        *("bytes=0-1,4-5", "bytes=-0,4-5", "bytes=5-2", "bytes=a-b"),
        *("lines=0-1", "lines=-0", "bytes=-", "bytes=", "x"),
    ],
)
def test_several_or_senseless_ranges_give_the_whole_file(server: Server, wanted: str) -> None:
    answer = server.get("/text.txt", Range=wanted)
    assert (answer.status, answer.body) == (200, TEXT)
    assert "Content-Range" not in answer.headers


def test_range_is_for_get_only(server: Server) -> None:
    answer = server.get("/text.txt", method="HEAD", Range="bytes=0-4")
    assert answer.status == 200
    assert answer.headers["Content-Length"] == "100"


def test_not_modified(server: Server) -> None:
    first = server.get("/text.txt")
    etag, date = first.headers["ETag"], first.headers["Last-Modified"]
    assert re.fullmatch(r'"[^"]+"', etag)
    assert date == "Fri, 14 Jul 2017 02:40:01 GMT"
    for headers in (
        {"If_None_Match": etag},
        {"If_None_Match": f'"other", W/{etag}'},
        {"If_None_Match": "*"},
        {"If_None_Match": etag, "Range": "bytes=0-4"},
        {"If_Modified_Since": date},
        {"If_Modified_Since": "Fri, 14 Jul 2023 02:40:00 GMT"},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (304, b""), headers
        assert answer.headers["ETag"] == etag
    for headers in (
        {"If_None_Match": '"other"'},
        {"If_None_Match": '"other"', "If_Modified_Since": date},
        {"If_Modified_Since": "Fri, 14 Jul 2017 02:40:00 GMT"},
        {"If_Modified_Since": "no date"},
        {"If_Match": etag},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (200, TEXT), headers


def test_if_match_of_another_version_is_412(server: Server) -> None:
    answer = server.get("/text.txt", If_Match='"other"')
    assert answer.status == 412
    assert TEXT not in answer.body


def test_if_match_of_this_version_changes_nothing(server: Server) -> None:
    etag = server.get("/text.txt").headers["ETag"]
    for match in ("*", etag, f'"other", {etag}'):
        answer = server.get("/text.txt", If_Match=match)
        assert (answer.status, answer.body) == (200, TEXT), match
        answer = server.get("/text.txt", If_Match=match, Range="bytes=1-3", If_Range=etag)
        assert (answer.status, answer.body) == (206, b"123"), match
        answer = server.get("/text.txt", If_Match=match, If_None_Match=etag)
        assert (answer.status, answer.body) == (304, b""), match
    assert server.get("/text.txt", If_Match=f"W/{etag}").status == 412, "weak ones never match"
    assert server.get("/nope", If_Match="*").status == 404


def test_if_unmodified_since(server: Server) -> None:
    first = server.get("/text.txt")
    etag, date = first.headers["ETag"], first.headers["Last-Modified"]
    old = "Fri, 14 Jul 2017 02:40:00 GMT"
    for headers in (
        {"If_Unmodified_Since": date},
        {"If_Unmodified_Since": "Fri, 14 Jul 2023 02:40:00 GMT"},
        {"If_Unmodified_Since": "no date"},
        {"If_Unmodified_Since": old, "If_Match": etag},
        {"If_Unmodified_Since": old, "If_Match": "*"},
    ):
        answer = server.get("/text.txt", **headers)
        assert (answer.status, answer.body) == (200, TEXT), headers
    for headers in (
        {"If_Unmodified_Since": old},
        {"If_Unmodified_Since": old, "If_None_Match": etag},
        {"If_Unmodified_Since": old, "Range": "bytes=1-3"},
        {"If_Unmodified_Since": date, "If_Match": '"other"'},
        {"If_Unmodified_Since": old, "method": "HEAD"},
    ):
        answer = server.get("/text.txt", **headers)
        assert answer.status == 412, headers
        assert TEXT not in answer.body


@pytest.mark.parametrize("name", ["If_Modified_Since", "If_Unmodified_Since", "If_Range"])
def test_dates_no_calendar_has_are_ignored(server: Server, name: str) -> None:
    for date in (
        "Fri, 14 Jul 99999999999999999999 02:40:00 GMT",
        "Fri, 14 Jul 2017 02:40:00 +99999999999999",
    ):
        answer = server.get("/text.txt", Range="bytes=1-3", **{name: date})
        expected = (200, TEXT) if name == "If_Range" else (206, b"123")
        assert (answer.status, answer.body) == expected, date


def test_etag_changes_with_the_content(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1_500_000_000, 1_500_000_000))

    with serving(tmp_path, "--no-patch") as server:
        write("file", b"one")
        before = server.get("/file").headers["ETag"]
        write("new", b"two")
        os.replace(tmp_path / "new", tmp_path / "file")
        assert server.get("/file").headers["ETag"] != before
        assert server.get("/file", If_None_Match=before).body == b"two"


def test_if_range(server: Server) -> None:
    first = server.get("/text.txt")
    for fresh in (first.headers["ETag"], first.headers["Last-Modified"]):
        answer = server.get("/text.txt", Range="bytes=1-3", If_Range=fresh)
        assert (answer.status, answer.body) == (206, b"123")
    for stale in ('"other"', "Fri, 14 Jul 2017 02:40:00 GMT"):
        answer = server.get("/text.txt", Range="bytes=1-3", If_Range=stale)
        assert (answer.status, answer.body) == (200, TEXT)
    assert server.get("/text.txt", Range="bytes=100-", If_Range='"other"').status == 200


# Directories.


class Listing(HTMLParser):
    """What a browser would make of a listing: its links in order, headings, scripts."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        self.links: list[tuple[str, str]] = []
        self.rows: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.sizes: dict[str, str] = {}
        self.times: dict[str, str] = {}
        self.aria: dict[str, str | None] = {}
        self.inside = ""
        self.heading: str | None = None
        self.feed(answer.body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag in ("thead", "tbody", "footer", "nav"):
            self.inside = tag
        if tag == "th":
            self.heading = attributes.get("aria-sort") or ""
        if tag == "a":
            self.links.append((attributes["href"] or "", ""))
        if tag == "td" and "title" in attributes:
            self.sizes[self.links[-1][1]] = attributes["title"] or ""
        if tag == "time":
            self.times[self.links[-1][1]] = attributes["datetime"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self.inside == "tbody":
            self.rows.append(self.links[-1])
        if tag == "a" and self.inside == "thead":
            self.aria[self.links[-1][1]] = self.heading

    def handle_data(self, data: str) -> None:
        if self.links and self.lasttag == "a":
            href, text = self.links[-1]
            if data.strip() or text == "":
                self.links[-1] = (href, text + data)

    @property
    def names(self) -> list[str]:
        return [text for _, text in self.rows]


def test_listing(server: Server) -> None:
    listing = Listing(server.get("/"))
    assert listing.names == [
        "\\evil.example/",
        "inside-directory/",
        "sub/",
        HOSTILE,
        ".hidden",
        "absolute-inside-link",
        "archive.tar.gz",
        "big.bin",
        "data:,x.html",
        "Empty.dat",
        "inside-link",
        "latin\N{REPLACEMENT CHARACTER}.txt",
        "page.html",
        "text.txt",
        "unknown.qqq",
    ]
    assert listing.sizes["big.bin"] == "3,200,000 bytes"
    assert listing.sizes["Empty.dat"] == "0 bytes"
    assert "sub/" not in listing.sizes
    assert listing.times["text.txt"] == "2017-07-14T02:40:01+00:00"
    assert "script" not in listing.tags


def test_every_link_of_a_listing_leads_to_its_file(server: Server, root: Path) -> None:
    for href, text in Listing(server.get("/")).rows:
        assert re.fullmatch(r"[A-Za-z0-9._~%/-]+", href), href
        answer = server.get("/" + href)
        assert answer.status == 200, text
        if not href.endswith("/"):
            path = os.path.join(os.fsencode(root), unquote_to_bytes(href))
            assert answer.body == Path(os.fsdecode(path)).read_bytes(), text


def test_names_are_escaped(server: Server) -> None:
    body = server.get("/").body
    assert b"<script" not in body
    assert b"&lt;script&gt;alert(1)&lt;b&gt;" in body
    assert b"latin%E9.txt" in body
    policy = server.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@pytest.mark.parametrize(
    ("query", "first", "last", "heading", "aria"),
    [
        ("?sort=name&order=desc", "unknown.qqq", HOSTILE, "Name", "descending"),
        ("?sort=size", "big.bin", "Empty.dat", "Size", "descending"),
        ("?sort=size&order=asc", "Empty.dat", "big.bin", "Size", "ascending"),
        ("?sort=time&order=asc", "page.html", None, "Modified", "ascending"),
        ("?sort=nonsense&order=%3Cscript%3E", HOSTILE, "unknown.qqq", "Name", "ascending"),
    ],
)
def test_sorting(
    server: Server, query: str, first: str, last: str | None, heading: str, aria: str
) -> None:
    listing = Listing(server.get("/" + query))
    directories = [name for name in listing.names if name.endswith("/")]
    assert listing.names[: len(directories)] == directories, "directories come first"
    files = listing.names[len(directories) :]
    assert files[0] == first
    assert last is None or files[-1] == last
    assert listing.aria == {"Name": "", "Size": "", "Modified": "", heading: aria}


def test_sort_links_turn_the_order_round(server: Server) -> None:
    hrefs = {text: href for href, text in Listing(server.get("/?sort=time&order=desc")).links}
    assert hrefs["Modified"] == "?sort=time&order=asc"
    assert hrefs["Size"] == "?sort=size&order=desc"
    assert hrefs["Name"] == "?sort=name&order=asc"


def test_breadcrumbs(server: Server) -> None:
    links = Listing(server.get("/sub/deeper/")).links
    assert links[:2] == [("../../", "root"), ("../", "sub")]
    assert ("../", "..") in links
    assert links[-1] == ("../../.stats", "Live figures")
    assert server.get("/sub/deeper/").body.count(b"Nothing here.") == 1


@pytest.mark.parametrize(
    ("zone", "seconds"), [("XXX10", -62_135_596_800), ("YYY-10", 253_402_300_799)]
)
def test_listing_with_a_time_the_zone_does_not_have(
    monkeypatch: pytest.MonkeyPatch, zone: str, seconds: int
) -> None:
    """The first and the last second of the calendar, in UTC: elsewhere, they are outside it."""
    monkeypatch.setenv("TZ", zone)
    # Not every file system can keep such times; that of /dev/shm can.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        for path in (Path(name, "strange"), Path(name, "usual")):
            path.write_bytes(TEXT)
        os.utime(Path(name, "strange"), (seconds, seconds))
        assert Path(name, "strange").stat().st_mtime == seconds
        with serving(Path(name), "--no-patch") as server:
            listing = Listing(server.get("/"))
            assert listing.names == ["strange", "usual"]
            assert list(listing.times) == ["usual"]
            assert server.get("/strange").body == TEXT


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/sub", "/sub/"),
        ("/sub?sort=size&order=asc", "/sub/?sort=size&order=asc"),
        ("/sub?q=%3Cb%3E%0d%0aX:%201", "/sub/?q=%3Cb%3E%0d%0aX:%201"),
        ("/sub%2fdeeper", "/sub/deeper/"),
        ("/inside-directory", "/inside-directory/"),
        ("/%5cevil.example", "/%5Cevil.example/"),
        ("/\\evil.example", "/%5Cevil.example/"),
        ("http://evil.example/sub?sort=size", "/sub/?sort=size"),
    ],
)
def test_directory_without_slash_redirects(server: Server, target: str, location: str) -> None:
    answer = server.raw_get(target.encode())
    assert answer.status in (301, 308)
    assert answer.headers["Location"] == location


@pytest.mark.few
@pytest.mark.parametrize(
    "target",
    [
        *(b"//sub", b"/%2fsub", b"//evil.example/%2e%2e", b"//evil.example/..", b"/sub//deeper"),
        *(b"http://x//sub", b"http://x/%2fsub", b"http:///sub", b"http:%2f%2f%2fsub"),
    ],
)
def test_two_slashes_never_redirect(server: Server, target: bytes) -> None:
    answer = server.raw_get(target)
    assert answer.status == 404
    assert "Location" not in answer.headers


# Nothing outside the root.

ATTACKS = [
    b"/../secret.txt",
    b"/../root-too/secret.txt",
    b"/sub/../../secret.txt",
    b"/sub/deeper/../../../secret.txt",
    b"/%2e%2e/secret.txt",
    b"/%2E%2E%2Fsecret.txt",
    b"/..%2fsecret.txt",
    b"/.%2e/secret.txt",
    b"/sub%2f..%2f..%2fsecret.txt",
    b"/..%5csecret.txt",
    b"/..\\secret.txt",
    b"/%2e%2e%5csecret.txt",
    b"/%252e%252e/secret.txt",
    b"/%c0%ae%c0%ae/secret.txt",
    b"/%00/../secret.txt",
    b"/text.txt%00",
    b"/text.txt%00.html",
    b"/%00",
    b"../secret.txt",
    b"..",
    b"/..",
    b"/../",
    b"/.",
    b"/./text.txt",
    b"secret.txt",
    b"text.txt",
    b"%2e%2e/secret.txt",
    b"file:///etc/passwd",
    b"file://x/text.txt",
    b"http:///etc/passwd",
    b"http://x//etc/passwd",
    b"http://x/../secret.txt",
    b"http://x/%2e%2e/secret.txt",
    b"http://x%2f..%2f../secret.txt",
    b"http://../secret.txt",
    b"http://x/http://x/text.txt",
    b"/http://x/text.txt",
    b"//etc/passwd",
    b"///etc/passwd",
    b"/%2fetc%2fpasswd",
    b"/%2fetc/passwd",
    b"/" + b"../" * 20 + b"etc/passwd",
    b"/" + b"%2e%2e%2f" * 20 + b"etc/passwd",
    b"/" + b"..%2f" * 20 + b"proc/self/environ",
    b"/outside-link",
    b"/relative-outside-link",
    b"/sibling-link",
    b"/sibling-link/",
    b"/sibling-link/secret.txt",
    b"/outside-directory",
    b"/outside-directory/",
    b"/outside-directory/etc/passwd",
    b"/inside-directory/../../secret.txt",
    b"/loop",
    b"/dangling",
    b"/device-link",
]


@pytest.mark.few
@pytest.mark.parametrize("target", ATTACKS)
def test_nothing_outside_the_root(server: Server, target: bytes) -> None:
    answer = server.raw_get(target)
    assert answer.status == 404
    assert SECRET not in answer.body
    assert b"root:" not in answer.body
    assert "Location" not in answer.headers


def test_absolute_path_of_the_secret(server: Server, root: Path) -> None:
    secret = os.fsencode(root.parent / "secret.txt")
    assert secret.startswith(b"/")
    for target in (secret, b"/" + secret, b"/%2f" + secret[1:]):
        answer = server.raw_get(target)
        assert answer.status == 404
        assert SECRET not in answer.body


@pytest.mark.parametrize("path", ["/inside-link", "/inside-directory/inner.txt"])
def test_symlinks_that_stay_inside_work(server: Server, path: str) -> None:
    assert server.get(path).body == b"inner"


def test_outside_symlinks_are_not_listed(server: Server) -> None:
    listing = Listing(server.get("/"))
    assert not {"outside-link", "outside-directory/", "dangling", "loop"} & set(listing.names)
    # outside-link, relative-, sibling-, outside-directory, loop, dangling, device-, 2 fifos, socket
    assert b"10 not shown" in server.get("/").body


@pytest.mark.parametrize("path", ["/link", "/inside"])
def test_outside_symlinks_do_not_tell_what_is_there(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "file").write_bytes(SECRET)
    root.mkdir()
    (root / "link").symlink_to("../locked/file")
    (root / "inside").write_bytes(SECRET)
    (root / "inside").chmod(0)
    (tmp_path / "locked").chmod(0)
    with serving(root, "--no-patch", prefix=ORDINARY) as server:
        status = server.get(path).status
    (tmp_path / "locked").chmod(0o700)
    assert status == {"/link": 404, "/inside": 403}[path]


def test_many_symlinks_need_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    for number in range(300):
        (tmp_path / f"link-{number}").symlink_to("target")
    with serving(tmp_path, "--no-patch") as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert len(Listing(server.get("/")).names) == 301


def test_follow_symlinks(root: Path) -> None:
    with serving(root, "--no-patch", "--follow-symlinks") as server:
        assert server.get("/outside-link").body == SECRET
        assert server.get("/sibling-link/secret.txt").body == SECRET
        assert "outside-link" in Listing(server.get("/")).names
        assert server.raw_get(b"/../secret.txt").status == 404
        assert server.get("/device-link").status == 404


def test_root_that_is_a_symlink(tmp_path: Path, root: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    with serving(tmp_path / "link", "--no-patch") as server:
        assert server.get("/text.txt").body == TEXT
        assert server.get("/outside-link").status == 404


@pytest.mark.parametrize("path", ["/fifo", "/fifo-link", "/socket", "/fifo/"])
def test_special_files_are_neither_served_nor_waited_for(server: Server, path: str) -> None:
    assert server.get(path).status == 404


def test_a_fifo_is_never_opened(server: Server, root: Path) -> None:
    assert server.get("/fifo").status == 404
    # A reader, however short, would have let a writer in; this one finds that there is none.
    with pytest.raises(OSError, match="No such device"):
        os.open(root / "fifo", os.O_WRONLY | os.O_NONBLOCK)


# The application without the server.


class Wrapper:
    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self.file = file


def call(
    app: Callable[..., Any], path: str, **environ: Any
) -> tuple[Any, str, list[tuple[str, str]]]:
    started: list[Any] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        **environ,
    }
    result = app(environ, lambda status, headers, exc_info=None: started.extend((status, headers)))
    return (result, *started)


def test_the_wrapped_file_itself_is_the_result(root: Path) -> None:
    app = make_app(root)
    for headers, start in (({}, 0), ({"HTTP_RANGE": "bytes=70000-80000"}, 70_000)):
        result, _, _ = call(app, "/big.bin", **headers, **{"wsgi.file_wrapper": Wrapper})
        assert type(result) is Wrapper
        assert type(result.file) is io.BufferedReader
        assert type(result.file.raw) is io.FileIO
        assert result.file.tell() == start
        result.file.close()


def open_files(root: Path, descriptors: str = "/proc/self/fd") -> list[str]:
    links = []
    for descriptor in os.listdir(descriptors):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"{descriptors}/{descriptor}"))
    return [link for link in links if link.startswith(str(root))]


@pytest.mark.parametrize(
    ("path", "environ"),
    [
        ("/big.bin", {}),
        ("/big.bin", {"HTTP_RANGE": "bytes=0-9"}),
        ("/big.bin", {"HTTP_RANGE": "bytes=99999999-"}),
        ("/big.bin", {"HTTP_IF_NONE_MATCH": "*"}),
        ("/big.bin", {"HTTP_IF_MATCH": '"other"'}),
        ("/big.bin", {"REQUEST_METHOD": "HEAD"}),
        ("/big.bin/", {}),
        ("/sub", {}),
        ("/", {}),
        ("/outside-link", {}),
        ("/fifo", {}),
    ],
)
def test_no_file_stays_open(root: Path, path: str, environ: dict[str, str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, _, _ = call(make_app(root), path, **environ)
        with contextlib.suppress(AttributeError):
            result.close()  # without having read it: the client went away
    assert open_files(root.parent) == []
    # Nor was it closed only because nobody held it any more.
    assert [str(warning.message) for warning in caught] == []
    assert result is not None


def test_pieces_of_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BIG)
    result, status, _ = call(make_app(tmp_path), "/file")
    assert status == "200 OK"
    os.truncate(tmp_path / "file", 100_000)
    received = 0
    with contextlib.closing(result), pytest.raises(ConnectionResetError):
        for piece in result:
            received += len(piece)
    assert received == 100_000


def test_file_that_grows_is_cut_at_its_announced_length(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    result, _, headers = call(make_app(tmp_path), "/file")
    with open(tmp_path / "file", "ab") as file:
        file.write(BIG)
    with contextlib.closing(result):
        assert b"".join(result) == TEXT
    assert dict(headers)["Content-Length"] == str(len(TEXT))


def test_what_was_checked_is_what_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (root / "file").write_bytes(TEXT)

    def readlink_then_exchange(path: str) -> str:
        real = os_readlink(path)
        (root / "file").unlink()
        (root / "file").symlink_to(tmp_path / "secret")
        return real

    os_readlink = os.readlink
    app = make_app(root)
    monkeypatch.setattr(os, "readlink", readlink_then_exchange)
    result, status, _ = call(app, "/file")
    monkeypatch.undo()
    with contextlib.closing(result):
        assert status == "200 OK"
        assert b"".join(result) == TEXT
    assert call(app, "/file")[1] == "404 NOT FOUND"


def test_a_time_no_calendar_has() -> None:
    assert moment(1e18) is None
    assert moment(-1.5) is not None


# The counters.


def moved(stats: dict[str, Any]) -> int:
    return int(stats["bytes_sendfile"] + stats["bytes_spliced"])


def test_counters_prove_the_fast_path(root: Path) -> None:
    with serving(root) as server:
        before = moved(server.stats())
        assert server.get("/big.bin").body == BIG
        after_file = moved(server.stats())
        assert after_file - before == len(BIG)
        answer = server.get("/big.bin", Range="bytes=1000001-2000000")
        assert answer.body == BIG[1_000_001:2_000_001]
        assert moved(server.stats()) - after_file == 1_000_000
        assert server.get("/big.bin", method="HEAD").status == 200
        assert moved(server.stats()) - after_file == 1_000_000


def test_counters_stay_at_zero_without_the_patch(root: Path) -> None:
    with serving(root, "--no-patch") as server:
        assert server.get("/big.bin").body == BIG
        assert server.get("/big.bin", Range="bytes=0-999999").body == BIG[:1_000_000]
        stats = server.stats()
    assert moved(stats) == 0
    assert stats["bytes_copied"] == 0


def test_stats_pages(server: Server) -> None:
    answer = server.get("/.stats.json")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    stats = json.loads(answer.body)
    assert {"pipes_created", "transfers", "bytes_spliced", "bytes_sendfile"} <= set(stats)
    assert isinstance(stats["fallbacks"], dict)
    page = server.get("/.stats")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b'fetch(".stats.json"' in page.body
    assert not re.search(rb"(src|href)=\"(https?:)?//", page.body), "nothing from elsewhere"


def test_stats_page_says_whether_gsplice_is_at_work(root: Path) -> None:
    with serving(root) as patched, serving(root, "--no-patch") as plain:
        assert b"Not patched" not in patched.get("/.stats").body
        assert b"Not patched" in plain.get("/.stats").body
