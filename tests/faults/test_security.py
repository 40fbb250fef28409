"""What a stranger could do: get the bytes of others, get out of the root, wear the server out."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import open_descriptors
from ends import GUARD, threads_done, until
from example_file_server import BIG, SECRET, TEXT, Server, serving
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mixed import Mixed

import gsplice
from gsplice.config import settings as gsplice_settings

Record = Callable[[str, object], None]

# ---- no byte of one connection reaches another


def many(directory: Path, transfers: int, at_once: int, record: Record) -> None:
    mixed = Mixed(directory, seed=transfers)
    before = open_descriptors() - 2 * gsplice.stats().pipes_idle
    numbers = iter(range(transfers))

    def work() -> None:
        for number in numbers:
            mixed.run(number)

    try:
        working = [gevent.spawn(work) for _ in range(at_once)]
        for greenlet in working:
            greenlet.get()
    finally:
        gsplice_settings.offload = "auto"
    threads_done()
    assert not mixed.strays
    assert sum(mixed.ended.values()) == transfers
    assert mixed.ended["told"] > transfers // 10
    until(lambda: gsplice.stats().pipes_in_use == 0)
    until(lambda: open_descriptors() - 2 * gsplice.stats().pipes_idle <= before)
    record("cases", transfers)
    for name, number in mixed.ended.items():
        record(name, number)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "transfers",
    [300, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],
)
def test_no_byte_of_one_connection_reaches_another(
    tmp_path: Path, transfers: int, record_property: Record
) -> None:
    many(tmp_path, transfers, 20, record_property)


# ---- the file server, and whoever asks it for what it should not give


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    # A line for each malformed request would fill a pipe that nobody reads, and the server wait.
    prefix = ("sh", "-c", 'exec "$@" 2>/dev/null', "sh")
    with serving(root, "--header-timeout", "5", prefix=prefix) as server:
        yield server
        assert server.stop()[0] == 0


#: Ways to say "one up", and to say "/".
UP = [b"..", b"%2e%2e", b".%2e", b"%252e%252e", b"..;", b"%c0%ae%c0%ae", b"..%00", b"..%5c", b"..."]
SLASH = [b"/", b"%2f", b"%5c", b"\\", b"//", b"%252f", b"%c0%af", b"/./"]


def may_be_seen(body: bytes) -> bool:
    return SECRET not in body and b"root:x:0:" not in body


@pytest.mark.few(2)
@pytest.mark.parametrize("start", [b"/", b"/sub/", b"//", b"/%2f", b"/sub/deeper/../../"])
def test_no_way_up_leads_out(server: Server, root: Path, start: bytes) -> None:
    for up in UP:
        for slash in SLASH:
            for times in (1, 2, 8):
                for last in (b"secret.txt", b"etc/passwd"):
                    target = start + (up + slash) * times + last
                    answer = ask_raw(server, b"GET " + target + b" HTTP/1.0\r\n\r\n")
                    assert may_be_seen(answer), target
                    assert re.match(rb"HTTP/1\.[01] 40[04]", answer), (target, answer[:20])


GOOD = b"GET /text.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"

#: Requests that are not as they should be.
MALFORMED = {
    "no version": b"GET /text.txt\r\n\r\n",
    "a version from the future": b"GET /text.txt HTTP/9.9\r\nHost: x\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "only newlines": b"\r\n" * 50,
    "zeros": bytes(1000),
    "binary": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": GOOD + b"".join(b"X-%d: x\r\n" % n for n in range(5000)) + b"\r\n",
    "a long header": GOOD + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    "a header without a colon": GOOD + b"nothing\r\n\r\n",
    "a header with a space": GOOD + b"Range : bytes=0-1\r\n\r\n",
    "a folded header": GOOD + b"X: a\r\n b\r\n\r\n",
    "a zero in a header": GOOD + b"X: a\0b\r\n\r\n",
    "two lengths": GOOD + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "a length and chunks": GOOD
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    "a negative length": GOOD + b"Content-Length: -1\r\n\r\n",
    "a length that is none": GOOD + b"Content-Length: ten\r\n\r\n",
    "a header twice": GOOD + b"Range: bytes=0-1\r\nRange: bytes=5-6\r\n\r\n",
    "a bare newline": GOOD.replace(b"\r\n", b"\n") + b"\n",
    "an answer in the path": b"GET /%0d%0aSet-Cookie:%20a=b HTTP/1.1\r\nHost: x\r\n\r\n",
    "an answer in the query": b"GET /sub?%0d%0aSet-Cookie:a=b HTTP/1.1\r\nHost: x\r\n\r\n",
    "an answer in the host": b"GET /sub HTTP/1.1\r\nHost: x\rSet-Cookie: a=b\r\n\r\n",
    "an absolute path elsewhere": b"GET http://evil.example/../secret.txt HTTP/1.1\r\n\r\n",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


def ask_raw(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), GUARD) as sock:
        with contextlib.suppress(OSError):  # it may have had enough before the end
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(1 << 16):
                answer += data
        return answer


@pytest.mark.few(6)
@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_request_gets_nothing_and_harms_nobody(
    server: Server, root: Path, what: str
) -> None:
    answer = ask_raw(server, MALFORMED[what])
    assert may_be_seen(answer)
    head = answer.partition(b"\r\n\r\n")[0]
    assert b"\r\nSet-Cookie" not in head
    assert b"evil.example" not in head
    assert re.match(rb"HTTP/1\.[01] [1-5]\d\d |$", answer)
    assert not re.match(rb"HTTP/1\.[01] 500", answer)
    assert server.get("/text.txt").body == TEXT


def reference(header: str, size: int) -> tuple[int, int] | None:
    """Return the one range that *header* asks for, by RFC 9110; None: there is no single one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if found is None or found[1] == found[2] == "":
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    start, stop = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (start, stop) if not found[2] or int(found[2]) >= start else None


numbers = st.one_of(st.integers(0, 130), st.sampled_from([2**31, 2**63, 2**64, 10**30])).map(str)
RANGES = st.one_of(
    st.tuples(numbers | st.just(""), numbers | st.just("")).map("bytes={0[0]}-{0[1]}".format),
    st.lists(st.tuples(numbers, numbers).map("{0[0]}-{0[1]}".format), max_size=50).map(
        lambda parts: "bytes=" + ",".join(parts)
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
    st.text("bytes=-,0123456789 \t;", max_size=40),
)

FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
EXAMPLES = [100, pytest.param(5000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_range(server: Server, examples: int) -> None:
    """Exactly the bytes that it asks for, or the whole file, or that there are none."""

    @settings(max_examples=examples, **FUZZ)
    @given(RANGES)
    @example("bytes=-0")
    @example("bytes=0-")
    @example("bytes=99-99")
    def check(header: str) -> None:
        with contextlib.suppress(UnicodeEncodeError):
            answer = server.get("/text.txt", Range=header)
            wanted = reference(header.strip(" \t"), len(TEXT))
            if answer.status == 206:
                found = re.fullmatch(r"bytes (\d+)-(\d+)/100", answer.headers["Content-Range"])
                assert found
                start, stop = map(int, found.groups())
                assert answer.body == TEXT[start : stop + 1]
                if wanted is not None:
                    assert (start, stop + 1) == wanted
            elif answer.status == 416:
                assert wanted is None or wanted[0] >= len(TEXT)
            else:
                assert (answer.status, answer.body) == (200, TEXT)
                assert wanted is None

    check()


PIECES = [*UP, *SLASH, b"sub", b"text.txt", b"secret.txt", b"root", b"?", b"%", b"sort="]
PATHS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.lists(st.binary(max_size=8), max_size=8),
).map(lambda parts: b"/" + b"".join(parts))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_path(server: Server, root: Path, examples: int) -> None:
    """What is in the root, a page that says no, or a redirect within the server."""
    inside = {path.read_bytes() for path in root.rglob("*") if path.is_file()} - {SECRET}

    @settings(max_examples=examples, **FUZZ)
    @given(PATHS)
    def check(path: bytes) -> None:
        answer = ask_raw(server, b"GET " + path + b" HTTP/1.0\r\n\r\n")
        assert may_be_seen(answer)
        status = int(answer[9:12] or 400)
        assert status in (200, 308, 400, 403, 404, 414), answer[:200]
        if status == 308:
            location = re.search(rb"\r\nLocation: (.*?)\r\n", answer)
            assert location
            assert location[1].startswith(b"/")
            assert not location[1].startswith(b"//")
        if status == 200 and b"text/html" not in answer.partition(b"\r\n\r\n")[0]:
            assert answer.partition(b"\r\n\r\n")[2] in inside

    check()


def test_slow_clients_and_no_descriptors_do_not_take_it_down(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More clients than it may have descriptors, who say a byte now and then, or read nothing."""
    # Under libuv gevent may not accept any more after that, without gsplice, too.
    monkeypatch.setenv("GEVENT_LOOP", "libev-cext")
    limit = 100
    prefix = ("prlimit", f"--nofile={limit}:{limit}")

    def connect(stack: contextlib.ExitStack, more: bytes) -> socket.socket:
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), GUARD))
        sock.sendall(b"GET /big.bin HTTP/1.1\r\nHost: x" + more)
        return sock

    with serving(root, "--header-timeout", "0.5", prefix=prefix) as server:
        with contextlib.ExitStack() as stack:
            clients = [connect(stack, b"\r\nX: ") for _ in range(limit + 20)]
            for sock in clients[:20]:
                sock.send(b"x")
            # those that never end their headers are sent away, so that others get in
            assert server.get("/text.txt").body == TEXT
        with contextlib.ExitStack() as stack:
            for _ in range(limit + 20):
                connect(stack, b"\r\n\r\n")
        answer = server.get("/big.bin")
        assert hashlib.sha256(answer.body).digest() == hashlib.sha256(BIG).digest()
        assert server.get("/text.txt").body == TEXT
        assert server.stop()[0] == 0
