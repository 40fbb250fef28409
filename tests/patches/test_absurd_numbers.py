"""Numbers that make no sense: the patched names do with them what the unpatched ones do."""

from __future__ import annotations

import contextlib
import http.client
import socket as stdlib_socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from bench import Bench
from conftest import counting, digest, file_of, receive_all, some_bytes
from ends import Ends, MiB, connection
from gevent.monkey import get_original
from kinds import SINKS, SOURCES
from processes import Server, request, serving
from sameness import KiB, Outcome, Send, copy_of, kind_named

import gsplice
from gsplice._patches import socket_sendfile as _socket
from gsplice.config import Settings


class Index:
    """What can stand for a whole number, and is none."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"Index({self.number})"


class Subclass(int):
    """A whole number of somebody's own."""


WHOLE = [
    sign * number
    for number in (0, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 2000)
    for sign in (1, -1)
    if number or sign > 0
]
ODD: list[Any] = [
    None,
    True,
    False,
    0.0,
    2.5,
    -1.0,
    float(1 << 63),
    float("inf"),
    float("nan"),
    1j,
    "1",
    b"1",
    Index(5),
    Index(-1),
    Index(1 << 63),
    Subclass(5),
    Subclass(-1),
    Subclass(1 << 63),
]
SIZES = [1000, 200 * KiB]

numbers = pytest.mark.parametrize("number", [*WHOLE, *ODD], ids=repr)
sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(params=["disk", "memory"])
def bench(request: Any, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Open a fresh bench. Which positions are too far, the filesystem says."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        directory = tmp_path if request.param == "disk" else Path(memory)

        @contextlib.contextmanager
        def open_bench() -> Iterator[Bench]:
            with gevent.Timeout(60), Bench(directory) as fresh:
                yield fresh

        yield open_bench


@pytest.mark.few
@numbers
@sizes
@pytest.mark.parametrize("kind", ["buffered", "raw"])
@pytest.mark.parametrize("argument", ["offset", "count"])
def test_sendfile(bench: Any, argument: str, kind: str, size: int, number: Any) -> None:
    Send(kind_named(SOURCES, kind), size, **{argument: number}).check(bench)


@pytest.mark.few
@numbers
@pytest.mark.parametrize("size", [0, 1000, 70 * KiB])
@pytest.mark.parametrize("argument", ["offset", "count"])
def test_sendfile_use_sendfile(bench: Any, argument: str, size: int, number: Any) -> None:
    """As CPython's method, where a file could have that; else as gevent's, which never sends.

    CPython's raises several errors then, some after it has sent something.
    """

    def run(function: Callable[..., Any], argument: str, number: Any) -> Outcome:
        outcome = Outcome()
        with bench() as fresh:
            source = fresh.keep(kind_named(SOURCES, "buffered").make(fresh, some_bytes(size)))
            ours, theirs = fresh.pair(False)
            received = fresh.spawn(receive_all, theirs)
            outcome.call(lambda: function(ours, source, **{argument: number}))
            outcome.source_at = source.tell()
            ours.close()
            outcome.arrived = received.get()
        return outcome

    got = run(_socket._sendfile_use_sendfile, argument, number)
    original = stdlib_socket.socket._sendfile_use_sendfile  # type: ignore[attr-defined]
    if argument == "count":
        if isinstance(number, int) and number >= 1 << 63:
            number = None  # either is more than there is
    elif not number:
        number = 0
    elif size and not (isinstance(number, int) and 0 <= number < (1 << 63) - 1):
        original = get_original("gevent._socket3.socket", "_sendfile_use_sendfile")
    assert got == run(original, argument, number)


@pytest.mark.few
@numbers
@sizes
@pytest.mark.parametrize("source", ["buffered", "raw", "socket", "pipe"])
@pytest.mark.parametrize("sink", ["buffered", "socket"])
def test_copyfileobj(bench: Any, source: str, sink: str, size: int, number: Any) -> None:
    source, sink = kind_named(SOURCES, source), kind_named(SINKS, sink)
    copy_of(source, sink, size, length=number).check(bench)


@pytest.mark.few
@numbers
@sizes
@pytest.mark.parametrize("source", ["file", "bare_tcp", "pipe"])
def test_copy(tmp_path: Path, source: str, size: int, number: Any) -> None:
    """It has no original: the number counts, or is refused before anything moves."""
    data = some_bytes(size)
    with Ends(tmp_path) as ends, gevent.Timeout(60):
        src = ends.source(source, data)
        dst, finish = ends.sink("unix")
        if number is not None and not isinstance(number, int):
            with pytest.raises(TypeError):
                gsplice.copy(src, dst, number)
            number = 0
        elif number is not None and number < 0:
            with pytest.raises(ValueError, match="below 0"):
                gsplice.copy(src, dst, number)
            number = 0
        else:
            assert gsplice.copy(src, dst, number) == len(data[:number])
        assert finish() == data[:number]
        rest = receive_all(src) if source == "bare_tcp" else src.read()
        assert rest == (b"" if number is None else data[number:])


@numbers
def test_idle_timeout(number: Any) -> None:
    pairs = [connection("unix"), connection("unix")]
    (ours, client), (server, theirs) = pairs
    with contextlib.ExitStack() as stack:
        for sock in (*pairs[0], *pairs[1]):
            stack.callback(sock.close)
        client.sendall(b"there")
        theirs.sendall(b"and back")
        for sock in (client, theirs):
            sock.shutdown(stdlib_socket.SHUT_WR)
        with gevent.Timeout(60):
            try:
                means_something = number is None or number > 0
            except TypeError:
                with pytest.raises(TypeError):
                    gsplice.relay(ours, server, idle_timeout=number)
                return
            if means_something:
                assert gsplice.relay(ours, server, idle_timeout=number) == (5, 8)
            else:
                with pytest.raises(ValueError, match="idle_timeout"):
                    gsplice.relay(ours, server, idle_timeout=number)


@pytest.mark.few
@numbers
@pytest.mark.parametrize(
    "name", [n for n in Settings._checks if n not in ("offload", "patch_all", "report")]
)
def test_settings(name: str, number: Any) -> None:
    settings = Settings({})
    whole = isinstance(number, int) and not isinstance(number, bool)
    if whole and (name == "threads") <= number <= 1 << 30:
        setattr(settings, name, number)
        assert getattr(settings, name) == number
    elif number not in ("1",):
        with pytest.raises(ValueError, match=name):
            setattr(settings, name, number)


@numbers
def test_seconds_between_reports(number: Any) -> None:
    settings = Settings({})
    real = isinstance(number, int | float) and not isinstance(number, bool)
    if (real and 0 <= number <= 1 << 30) or number == "1":
        settings.report = number
        assert settings.report == float(number)
    else:
        with pytest.raises(ValueError, match="report"):
            settings.report = number


# ---- Content-Length


@pytest.mark.parametrize("length", [*WHOLE, "1.5", "x", "", "1_000", "+5"], ids=repr)
def test_a_response_that_declares_it(length: object, tmp_path: Path) -> None:
    data = some_bytes(2 * MiB)

    def run(copyfileobj: Callable[..., Any]) -> tuple[Outcome, object]:
        ours, theirs = connection("unix")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()
        feeder = gevent.spawn(feed, theirs, head + data)
        outcome = Outcome()
        with ours, tempfile.TemporaryFile(dir=tmp_path) as file, gevent.Timeout(60):
            response = http.client.HTTPResponse(ours)
            response.begin()
            outcome.call(copyfileobj, response, file)
            file.seek(0)
            outcome.arrived = file.read()
            left = response.length
        feeder.kill()
        return outcome, left

    with counting() as grown:
        got = run(gsplice.copyfileobj)
    assert got == run(get_original("shutil", "copyfileobj"))
    if isinstance(length, int) and length > MiB:
        assert grown.bytes_spliced > 0


def feed(sock: Any, data: bytes) -> None:
    with contextlib.suppress(OSError), sock:
        sock.sendall(data)


FILE_SIZE = 300_007


@pytest.fixture(scope="module")
def both(tmp_path_factory: Any) -> Iterator[Callable[[str], tuple[Server, Server]]]:
    """Start a server of a kind, without gsplice and with it, when it is first asked for."""
    root = tmp_path_factory.mktemp("served")
    file_of(root / "file.bin", FILE_SIZE)
    started: dict[str, tuple[Server, Server]] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: str) -> tuple[Server, Server]:
            if kind not in started:
                plain, patched = (
                    stack.enter_context(serving(kind, root, patched)) for patched in (False, True)
                )
                started[kind] = plain, patched
            return started[kind]

        yield get


def ask_both(servers: tuple[Server, Server], query: str, length: object = "") -> list[Any]:
    """Return status and body of both answers, cut to *length* if that is a length."""
    most = length if type(length) is int and length >= 0 else None
    answers = []
    for server in servers:
        head, _, body = server.ask(request(f"/part/?{query}")).partition(b"\r\n\r\n")
        answers.append((head.partition(b"\r\n")[0], digest(body[:most])))
    return answers


SERVERS = ["pywsgi", "gunicorn-gevent", "gunicorn-gevent_pywsgi"]
RANGES = ["_RangeWrapper", "AppIterRange"]
FAR = [FILE_SIZE - 1, FILE_SIZE, FILE_SIZE + 1, *WHOLE]


@pytest.mark.few
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("length", ["", 100_000])
@pytest.mark.parametrize("end", ["", 100_000])
@pytest.mark.parametrize("begin", FAR)
def test_a_range_that_begins_there(
    both: Any, server: str, kind: str, begin: int, end: object, length: object
) -> None:
    plain, patched = ask_both(both(server), f"{kind},{begin},{end},{length}", length)
    assert patched == plain


@pytest.mark.few
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("length", ["", 300_000])
@pytest.mark.parametrize("end", FAR)
def test_a_range_that_ends_there(
    both: Any, server: str, kind: str, end: int, length: object
) -> None:
    plain, patched = ask_both(both(server), f"{kind},7,{end},{length}", length)
    assert patched == plain


@pytest.mark.few
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["whole", *RANGES])
@pytest.mark.parametrize("length", [*FAR, "1.5", "x", "+5", "1_0"], ids=repr)
def test_a_file_that_declares_it(both: Any, server: str, kind: str, length: object) -> None:
    """pywsgi itself sends more than that."""
    plain, patched = ask_both(both(server), f"{kind},7,,{length}", length)
    assert patched == plain
