"""Downloads: what an HTTP response gives goes by splice, and leaves it as its own read() would.

Each case is run through the original function as well, against a server that follows the same
script, and all that can be seen afterwards is compared: the response, the connection, and what a
second request on it gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gzip
import http.client
import io
import os
import shutil
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest
import urllib3
from conftest import counting, receive_all, run_program, some_bytes
from ends import GUARD, Ends, KiB, MiB, connection, until
from gevent.monkey import get_original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gsplice
from gsplice._ends import recognise
from gsplice._ends.small import SMALL_BODY
from gsplice._move import splice

SOL_SOCKET, SO_LINGER = gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER

CONTENT = some_bytes(4 * MiB)

#: What the second response on a connection is.
SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond"

SIZES = sorted({size + more for size in (8 * KiB, 64 * KiB, 1 * MiB) for more in (-1, 0, 1)})


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bodies go the fast way as well, but for the tests that say so."""
    monkeypatch.setattr(recognise, "SMALL_BODY", 0)


def original(*args: Any) -> None:
    get_original("shutil", "copyfileobj")(*args)


def patched(*args: Any) -> None:
    shutil.copyfileobj(*args)


def head(size: int | None, *more: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    lines = [f"HTTP/{version} {status}", *more]
    if size is not None:
        lines.append(f"Content-Length: {size}")
    return "\r\n".join([*lines, "", ""]).encode()


def chunked(data: bytes) -> bytes:
    pieces = (data[at : at + 30_000] for at in range(0, len(data), 30_000))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Script:
    """What the server does: each request gets the pieces of one answer."""

    answers: tuple[tuple[bytes, ...], ...]
    #: What it does then: "close", "reset", or "stall" for ever.
    finally_: str = "close"
    #: Whether each piece is sent when the client has received the one before.
    one_by_one: bool = False

    def serve(self, sock: Any) -> None:
        with contextlib.suppress(OSError):
            for answer in self.answers:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    received = sock.recv(4096)
                    if not received:
                        return
                    request += received
                for piece in answer:
                    if self.one_by_one:
                        until(lambda: not unacknowledged(sock))
                    sock.sendall(piece)
                    gevent.sleep(0.005)  # so that the client may have to wait in between
            if self.finally_ == "stall":
                gevent.sleep(GUARD)
            elif self.finally_ == "reset":
                until(lambda: not unacknowledged(sock))  # which a reset would take back
                sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def unacknowledged(sock: Any) -> int:
    """Return how many bytes the peer has not got yet (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class Client(contextlib.ExitStack):
    """A connection to a server that follows a script, and files to copy to."""

    def __init__(self, directory: Path, script: Script, timeout: float | None = None) -> None:
        super().__init__()
        self.path = directory / "copy"
        ours, theirs = connection()
        server = gevent.spawn(script.serve, theirs)
        self.sock = ours
        ours.settimeout(timeout)
        self.connection = http.client.HTTPConnection("test")
        self.connection.auto_open = 0  # no second try by a connection of its own
        self.connection.sock = ours
        self.callback(theirs.close)
        self.callback(seen, self.connection.close)
        self.callback(server.kill)

    def get(self, method: str = "GET") -> http.client.HTTPResponse:
        self.connection.request(method, "/")
        return self.connection.getresponse()

    def sink(self) -> Any:
        return self.enter_context(open(self.path, "wb"))


def seen(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call, or the class and the number of what it raised."""
    try:
        return function(*args)
    except Exception as err:  # noqa: BLE001 - whatever it is, the other must raise it too
        return type(err), getattr(err, "errno", None)


def state(response: http.client.HTTPResponse) -> dict[str, Any]:
    return {
        "length": response.length,
        "closed": response.closed,
        "isclosed": response.isclosed(),
        "fp": response.fp is None,
        "then": response.read() if response.isclosed() else None,
    }


def download(
    copy: Callable[..., None],
    directory: Path,
    script: Script,
    method: str = "GET",
    before: Callable[[Any], Any] = lambda response: None,
    length: int = 0,
) -> dict[str, Any]:
    """Copy the response to a file, and tell all that can be seen then."""
    with gevent.Timeout(GUARD), Client(directory, script) as client:
        response = client.get(method)
        result: dict[str, Any] = {"before": before(response)}
        sink = client.sink()
        result["error"] = seen(copy, response, sink, length)
        result |= state(response)
        sink.close()
        result["arrived"] = client.path.read_bytes()

        def second() -> tuple[int, bytes]:
            response = client.get()
            return response.status, response.read()

        result["second"] = seen(second)
        return result


def compare(
    directory: Path, script: Script, *, fast: int | None, reason: str = "body", **options: Any
) -> dict[str, Any]:
    """Check that both copies leave the same; *fast*: the bytes moved by gsplice, None: all."""
    wanted = download(original, directory, script, **options)
    with counting() as grown:
        got = download(patched, directory, script, **options)
    assert got == wanted
    if fast is None:
        fast = len(wanted["arrived"])
    assert grown.bytes_spliced + grown.bytes_copied == fast
    assert grown.fallbacks == ({} if fast else {reason: 1})
    return wanted


def answers(*first: bytes) -> tuple[tuple[bytes, ...], ...]:
    return first, (SECOND,)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("size", [1, 100, 5000, *SIZES, 3 * MiB + 7])
def test_a_body_of_each_size(tmp_path, size, apart):
    body = CONTENT[:size]
    first = (head(size), body) if apart else (head(size) + body,)
    wanted = compare(tmp_path, Script(answers(*first)), fast=None)
    assert wanted["arrived"] == body
    assert wanted["second"] == (200, b"second")


@pytest.mark.parametrize("read", [0, 1])
@pytest.mark.parametrize("size", [1, 1 * MiB, 1 * MiB + 1])
def test_a_small_body_is_read(tmp_path, monkeypatch, size, read):
    monkeypatch.setattr(recognise, "SMALL_BODY", SMALL_BODY)
    small = size - read <= 1 * MiB
    compare(
        tmp_path,
        Script(answers(head(size) + CONTENT[:size])),
        fast=0 if small else None,
        reason="body" if size == read else "small",
        before=lambda response: response.read(read) if read else None,
    )


def test_bulk_is_spliced(tmp_path):
    with counting() as grown:
        download(patched, tmp_path, Script(answers(head(3 * MiB), CONTENT[: 3 * MiB])))
    assert grown.bytes_spliced >= 3 * MiB - 8 * KiB
    assert grown.bytes_copied <= 8 * KiB


@pytest.mark.few
@pytest.mark.parametrize("size", [1, 5000, 64 * KiB, 1 * MiB])
@pytest.mark.parametrize("already", [1, 4000, 10_000, 1 * MiB])
@pytest.mark.parametrize("way", ["read", "readinto", "read1", "readline", "peek"])
def test_a_body_of_which_a_part_was_read(tmp_path, way, already, size):
    def before(response: Any) -> Any:
        if way == "readinto":
            return response.readinto(bytearray(already))
        if way == "peek":
            return len(response.peek(1)) > 0
        data = response.read(already) if way == "read" else getattr(response, way)(already)
        if way == "read1":  # how much is there is left to chance
            data += response.read(min(already, 10_000) - len(data))
            return data[:1]
        return data

    script = Script(answers(head(size) + CONTENT[:size]))
    read = min(already, size) if way == "read" else None
    fast = size - read if read is not None else None
    wanted = download(original, tmp_path, script, before=before)
    with counting() as grown:
        got = download(patched, tmp_path, script, before=before)
    if way in ("readinto", "read1", "readline"):  # one call of these may give less
        assert CONTENT[:size].endswith(got["arrived"])
        wanted["arrived"] = got["arrived"]
        wanted["before"] = got["before"]
    assert got == wanted
    assert fast in (None, grown.bytes_spliced + grown.bytes_copied)
    assert got["second"] == (200, b"second")


@pytest.mark.parametrize("length", [1, 1000, 64 * KiB, 1 << 30])
def test_with_every_size_of_a_piece(tmp_path, length):
    size = 20_000 if length == 1 else 200_000
    compare(tmp_path, Script(answers(head(size), CONTENT[:size])), fast=None, length=length)


def test_without_a_size_of_a_piece_read_has_no_end(tmp_path):
    """read(-1) gives what comes after the body as well: that is left to it."""
    script = Script(answers(head(1000), CONTENT[:1000]))
    assert script.finally_ == "close"
    script = Script(((head(1000), CONTENT[:1000]),))
    compare(tmp_path, script, fast=0, reason="arguments", length=-1)


@pytest.mark.parametrize("size", [0, 1000, 300 * KiB])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("more", ["Connection: close", "Connection: keep-alive", "X: y"])
def test_until_the_connection_is_closed(tmp_path, more, version, size):
    """Without a length, the body ends with the connection."""
    script = Script(((head(None, more, version=version), CONTENT[:size]),))
    wanted = compare(tmp_path, script, fast=None) if size else download(patched, tmp_path, script)
    assert wanted["arrived"] == CONTENT[:size]
    assert wanted["isclosed"]


@pytest.mark.parametrize("more", ["Connection: close", "Keep-Alive: yes"])
@pytest.mark.parametrize("size", [1000, 300 * KiB])
def test_a_length_and_old_ways_to_keep_a_connection(tmp_path, size, more):
    script = Script(answers(head(size, more, version="1.0"), CONTENT[:size]))
    compare(tmp_path, script, fast=None)


@pytest.mark.parametrize("sent", [0, 1, 5000, 64 * KiB, 200 * KiB])
def test_a_body_that_ends_early(tmp_path, sent):
    """Nothing is raised, as read(n) raises nothing; the length says what is missing."""
    script = Script(((head(300 * KiB), CONTENT[:sent]),))
    wanted = download(original, tmp_path, script)
    with counting() as grown:
        assert download(patched, tmp_path, script) == wanted
    assert wanted["error"] is None
    assert wanted["length"] == 300 * KiB - sent
    assert wanted["isclosed"]
    assert grown.bytes_spliced + grown.bytes_copied == sent
    assert grown.fallbacks == {}


@pytest.mark.parametrize(
    "status", ["204 No Content", "304 Not Modified", "200 OK"], ids=["204", "304", "empty"]
)
def test_no_body(tmp_path, status):
    size = None if status.startswith("204") else 0 if status.startswith("200") else 1000
    script = Script(answers(head(size, status=status)))
    wanted = compare(tmp_path, script, fast=0)
    assert wanted["second"] == (200, b"second")


def test_head(tmp_path):
    script = Script(answers(head(1000)))
    wanted = compare(tmp_path, script, fast=0, method="HEAD")
    assert wanted["second"] == (200, b"second")


def test_chunks(tmp_path):
    first = head(None, "Transfer-Encoding: chunked") + chunked(CONTENT[:200_000])
    wanted = compare(tmp_path, Script(answers(first)), fast=0)
    assert wanted["arrived"] == CONTENT[:200_000]
    assert wanted["second"] == (200, b"second")


def test_a_content_encoding_makes_no_difference(tmp_path):
    packed = gzip.compress(CONTENT[:200_000])
    first = head(len(packed), "Content-Encoding: gzip") + packed
    assert compare(tmp_path, Script(answers(first)), fast=None)["arrived"] == packed


def test_no_more_is_read_ahead_than_a_buffer(tmp_path):
    """A server may send more before it is asked: what was not buffered stays in the socket."""
    body, more = CONTENT[: 300 * KiB], CONTENT[-3 * io.DEFAULT_BUFFER_SIZE :]

    def attempt(copy: Callable[..., None]) -> None:
        script = Script(((head(len(body)), body + more),))
        with gevent.Timeout(GUARD), Client(tmp_path, script) as client:
            response = client.get()
            response.read(1)
            with client.sink() as sink:
                copy(response, sink)
            assert client.path.read_bytes() == body[1:]
            left = receive_all(client.sock)
            assert more.endswith(left)
            assert len(more) - len(left) < io.DEFAULT_BUFFER_SIZE

    attempt(original)
    with counting() as grown:
        attempt(patched)
    assert grown.bytes_spliced > 0
    assert grown.fallbacks == {}


CRLF = b"\r\n"

#: Bodies that end on a multiple of every size in which they are read, and near one.
AROUND = sorted({size + more for size in (64 * KiB, 2 * MiB, 3 * MiB) for more in (-1, 0, 1, 77)})


def and_more(size: int, more: bytes, *before: bytes, tail: int = 100) -> Script:
    """Send *more* after a body, together with its *tail*, which comes late."""
    body = CONTENT[:size]
    pieces = (*before, head(size), body[:-tail], body[-tail:] + more)
    return Script(answers(*pieces), one_by_one=True)


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_crlf_after_a_body_is_read_ahead_and_dropped(tmp_path, number):
    """As old servers send it. What a response has read ahead ends with it."""
    script = and_more(5000, CRLF * number, tail=5000)
    wanted = compare(tmp_path, script, fast=None)
    assert wanted["arrived"] == CONTENT[:5000]
    assert wanted["second"] == (200, b"second")


@pytest.mark.few
@pytest.mark.parametrize("tail", [1, 100, 8 * KiB])
@pytest.mark.parametrize("number", [1, 2, 1000])
@pytest.mark.parametrize("size", AROUND)
def test_crlf_after_a_body_of_each_size(tmp_path, size, number, tail):
    """The original may leave some of it unread, where the body ends near the end of its buffer."""
    script = and_more(size, CRLF * number, tail=tail)
    wanted, got = (download(copy, tmp_path, script) for copy in (original, patched))
    assert wanted["second"] in ((200, b"second"), (http.client.BadStatusLine, None))
    assert got == wanted | {"second": (200, b"second")}


def test_crlf_after_a_body_and_100_continue(tmp_path):
    script = and_more(5000, CRLF, b"HTTP/1.1 100 Continue\r\n\r\n", tail=5000)
    assert compare(tmp_path, script, fast=None)["second"] == (200, b"second")


@pytest.mark.parametrize("read", [1, 8 * KiB, 1 * MiB])
def test_crlf_after_a_body_of_which_a_part_was_read(tmp_path, read):
    script = and_more(2 * MiB, CRLF)
    got = download(patched, tmp_path, script, before=lambda response: len(response.read(read)))
    assert got["second"] == (200, b"second")


def test_as_much_is_read_ahead_as_unpatched(tmp_path):
    """More than the buffer takes is left for the next response to choke on."""
    wanted = compare(tmp_path, and_more(2 * MiB, bytes(io.DEFAULT_BUFFER_SIZE)), fast=None)
    assert wanted["second"][0] is http.client.BadStatusLine


@pytest.mark.parametrize("kind", ["file", "unix", "pipe"])
def test_crlf_after_a_body_to_each_destination(tmp_path, kind):
    script = and_more(2 * MiB, CRLF)
    with gevent.Timeout(GUARD), Client(tmp_path, script) as client, Ends(tmp_path) as ends:
        response = client.get()
        sink, arrived = ends.sink(kind)
        with counting() as grown:
            shutil.copyfileobj(response, sink)
        assert arrived() == CONTENT[: 2 * MiB]
        assert client.get().read() == b"second"
    assert grown.bytes_spliced >= 2 * MiB - 100
    assert (grown.bytes_spliced + grown.bytes_copied, grown.fallbacks) == (2 * MiB, {})


@pytest.mark.parametrize("count", [2 * MiB - 1, 2 * MiB, 2 * MiB + 1])
def test_crlf_after_a_body_and_copy_with_a_count(tmp_path, count):
    with gevent.Timeout(GUARD), Client(tmp_path, and_more(2 * MiB, CRLF)) as client:
        response = client.get()
        with client.sink() as sink:
            assert gsplice.copy(response, sink, count) == min(count, 2 * MiB)
        assert response.read() == CONTENT[count : 2 * MiB]
        assert client.get().read() == b"second"


def test_the_last_byte_is_waited_for(tmp_path):
    """It may come late, too late, or never; and the next try goes on with it."""
    body = CONTENT[: 2 * MiB]
    script = Script(((head(len(body)), body[:-1]),), "stall")

    def attempt(copy: Callable[..., None]) -> tuple[Any, ...]:
        with gevent.Timeout(GUARD), Client(tmp_path, script, timeout=0.1) as client:
            response = client.get()
            with client.sink() as sink:
                errors = seen(copy, response, sink), seen(copy, response, sink)
            return errors, response.isclosed(), client.path.read_bytes()[: 1 * MiB]

    with counting() as grown:
        assert attempt(patched) == attempt(original)
    assert grown.bytes_spliced + grown.bytes_copied == len(body) - 1


@pytest.mark.parametrize("ending", ["reset", "stall"])
@pytest.mark.parametrize("sent", [0, 5000, 200 * KiB])
def test_a_body_that_breaks_off(tmp_path, sent, ending):
    """The errors are the same; the length is true, where the original has lost what it had read."""
    script = Script(((head(300 * KiB), CONTENT[:sent]),), ending)

    def attempt(copy: Callable[..., None]) -> SimpleNamespace:
        with gevent.Timeout(GUARD), Client(tmp_path, script, timeout=0.1) as client:
            response = client.get()
            sink = client.sink()
            error = seen(copy, response, sink)
            again = seen(copy, response, sink)
            sink.close()
            return SimpleNamespace(
                error=error,
                again=again,
                isclosed=response.isclosed(),
                length=response.length,
                arrived=client.path.read_bytes(),
            )

    wanted = attempt(original)
    with counting() as grown:
        got = attempt(patched)
    assert got.error == wanted.error
    assert got.error[0] is (ConnectionResetError if ending == "reset" else TimeoutError)
    assert (got.again, got.isclosed) == (wanted.again, wanted.isclosed)
    assert got.arrived == CONTENT[:sent]
    assert got.length == 300 * KiB - sent
    assert grown.bytes_spliced + grown.bytes_copied == sent


def test_a_killed_download_can_be_resumed(tmp_path):
    script = Script(((head(300 * KiB), CONTENT[: 100 * KiB]),), "stall")
    with gevent.Timeout(GUARD), Client(tmp_path, script) as client:
        response = client.get()
        sink = client.sink()
        task = gevent.spawn(patched, response, sink)
        until(lambda: client.path.stat().st_size == 100 * KiB)
        task.kill()
        sink.close()
        assert client.path.read_bytes() == CONTENT[: 100 * KiB]
        assert not response.isclosed()


def test_a_destination_that_fails(tmp_path):
    """The length is what is left to read of the response, and no more."""

    def attempt(copy: Callable[..., None], size: int) -> tuple[Any, bool, bytes]:
        body = CONTENT[:size]
        script = Script(answers(head(size), body))
        with gevent.Timeout(GUARD), Client(tmp_path, script) as client, Ends(tmp_path) as ends:
            response = client.get()
            ours, theirs = ends.connect("unix")
            theirs.close()
            sink = ends.enter_context(ours.makefile("wb", 0))
            error = seen(copy, response, sink)
            rest = response.read()
            assert body.endswith(rest)
            return error, response.isclosed(), client.get().read()

    for size in (1000, 1 * MiB):
        wanted = attempt(original, size)
        assert wanted[0][0] is BrokenPipeError
        assert attempt(patched, size) == wanted


@pytest.mark.parametrize("kind", ["file", "tcp", "unix", "pipe"])
@pytest.mark.parametrize("size", [1000, 100 * KiB, 3 * MiB])
def test_to_each_destination(tmp_path, size, kind):
    script = Script(answers(head(size), CONTENT[:size]))
    with gevent.Timeout(GUARD), Client(tmp_path, script) as client, Ends(tmp_path) as ends:
        response = client.get()
        sink, arrived = ends.sink(kind)
        with counting() as grown:
            shutil.copyfileobj(response, sink)
        assert arrived() == CONTENT[:size]
        assert (response.length, response.isclosed()) == (0, True)
        assert client.get().read() == b"second"
    assert grown.fallbacks == {}
    assert grown.bytes_spliced + grown.bytes_copied == size


@pytest.mark.parametrize("count", [None, 0, 1, 100, 99_999, 100_000, 100_001])
@pytest.mark.parametrize("sent", [100_000, 60_000])
def test_copy_with_a_count(tmp_path, sent, count):
    """gsplice.copy() leaves the response as reads of so many bytes would."""
    script = Script((((head(100_000) + CONTENT[:sent]),),))

    def attempt(taken: bool) -> tuple[Any, ...]:
        with gevent.Timeout(GUARD), Client(tmp_path, script) as client:
            response = client.get()
            sink = client.sink()
            if not taken:
                response.__class__ = type("Other", (http.client.HTTPResponse,), {})
            number = gsplice.copy(response, sink, count)
            sink.close()
            return number, client.path.read_bytes(), state(response)

    wanted = attempt(False)
    with counting() as grown:
        assert attempt(True) == wanted
    assert grown.fallbacks == {}
    assert wanted[0] == len(wanted[1]) == grown.bytes_spliced + grown.bytes_copied


def no_pipes(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(splice, "acquire", lambda: None)
    return "no_pipe"


def refusing(monkeypatch: pytest.MonkeyPatch) -> str:
    calls: list[int] = []
    splice = os.splice

    def refuse(*args: Any, **options: Any) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(22, "refused")
        return splice(*args, **options)

    monkeypatch.setattr(os, "splice", refuse)
    return "refused"


@pytest.mark.parametrize("trouble", [no_pipes, refusing])
def test_read_goes_on_where_splice_stops(tmp_path, monkeypatch, trouble):
    script = Script(answers(head(3 * MiB), CONTENT[: 3 * MiB]))
    wanted = download(original, tmp_path, script)
    reason = trouble(monkeypatch)
    with counting() as grown:
        assert download(patched, tmp_path, script) == wanted
    assert grown.fallbacks == {reason: 1}


# --- responses that are not taken ---


class OwnRead(http.client.HTTPResponse):
    def read(self, amt: int | None = None) -> bytes:
        return super().read(amt).upper()


def by_subclass(monkeypatch: Any, response: Any) -> str:
    response.__class__ = OwnRead
    return "source_type"


def by_instance(monkeypatch: Any, response: Any) -> str:
    read = response.read
    response.read = lambda amt=None: read(amt).upper()
    return "body"


def by_class(monkeypatch: Any, response: Any) -> str:
    monkeypatch.setattr(http.client.HTTPResponse, "read", OwnReadLike(response))
    return "body"


class OwnReadLike:
    """As mocks and instrumentation put one in the place of a method."""

    def __init__(self, response: Any) -> None:
        self._read = http.client.HTTPResponse.read
        self._response = response

    def __call__(self, amt: int | None = None) -> bytes:
        return self._read(self._response, amt).upper()


def by_file(monkeypatch: Any, response: Any) -> str:
    file = response.fp
    response.fp = SimpleNamespace(read=lambda size: file.read(size).upper(), close=file.close)
    return "source_type"


def by_file_method(monkeypatch: Any, response: Any) -> str:
    raw = response.fp.raw
    readinto = raw.readinto

    def upper(buffer: Any) -> int:
        number = readinto(buffer)
        buffer[:number] = bytes(buffer[:number]).upper()
        return number

    raw.readinto = upper
    return "source_type"


def by_length(monkeypatch: Any, response: Any) -> str:
    response.length = float(response.length)
    return "body"


@pytest.mark.parametrize(
    "change", [by_subclass, by_instance, by_class, by_file, by_file_method, by_length]
)
def test_a_response_that_reads_in_its_own_way(tmp_path, monkeypatch, change):
    script = Script(((head(100_000), b"abc" * 40_000),))
    with gevent.Timeout(GUARD), Client(tmp_path, script) as client:
        response = client.get()
        sink = client.sink()
        with monkeypatch.context() as patch:
            reason = change(patch, response)
            with counting() as grown:
                result = seen(shutil.copyfileobj, response, sink)
        sink.close()
        arrived = client.path.read_bytes()
        if change is by_length:
            assert result[0] is TypeError
        else:  # of the bytes that were buffered before, this one knew nothing
            assert arrived.lower() == (b"abc" * 40_000)[:100_000]
            assert arrived[8 * KiB :].isupper()
    assert grown.fallbacks == {reason: 1}
    assert grown.bytes_spliced == 0


@pytest.mark.parametrize("closing", ["read", "close", "connection"])
def test_a_response_that_is_closed(tmp_path, closing):
    def before(response: Any) -> None:
        if closing == "read":
            response.read()
        elif closing == "close":
            response.close()
        else:
            response.fp.close()

    script = Script(((head(1000), CONTENT[:1000]),))
    reason = "closed" if closing == "connection" else "body"
    compare(tmp_path, script, fast=0, reason=reason, before=before)


def test_a_response_that_has_not_begun(tmp_path):
    with Ends(tmp_path) as ends:
        ours, _ = ends.connect()
        response = http.client.HTTPResponse(ours)
        with counting() as grown, open(tmp_path / "copy", "wb") as sink:
            wanted = seen(original, response, sink)
            assert seen(shutil.copyfileobj, response, sink) == wanted
        response.close()
    assert grown.fallbacks == {"body": 1}


def test_a_response_is_no_destination(tmp_path):
    script = Script(((head(1000), CONTENT[:1000]),))
    with Client(tmp_path, script) as client, open(__file__, "rb") as file:
        response = client.get()
        with counting() as grown:
            assert seen(shutil.copyfileobj, file, response) == (
                io.UnsupportedOperation,
                None,
            )
    assert grown.fallbacks == {"destination_type": 1}


# --- any combination ---


@dataclasses.dataclass(frozen=True)
class Case:
    size: int
    sent: int
    framing: str
    more: tuple[str, ...]
    version: str
    pieces: int
    read: int

    def script(self) -> Script:
        body = CONTENT[: min(self.sent, self.size)]
        if self.framing == "chunked":
            start = head(None, *self.more, "Transfer-Encoding: chunked", version=self.version)
            data = start + chunked(CONTENT[: self.size])
        else:
            length = None if self.framing == "close" else self.size
            data = head(length, *self.more, version=self.version) + body
        step = len(data) // self.pieces + 1
        first = tuple(data[at : at + step] for at in range(0, len(data), step))
        if self.framing == "length" and self.sent >= self.size:
            return Script((first, (SECOND,)))
        return Script((first,))


CASES = st.builds(
    Case,
    size=st.sampled_from([0, 1, 100, *SIZES]),
    sent=st.sampled_from([10, 8 * KiB, 64 * KiB, 4 * MiB, 4 * MiB]),
    framing=st.sampled_from(["length", "length", "close", "chunked"]),
    more=st.sampled_from([(), ("Connection: close",), ("Connection: keep-alive",)]),
    version=st.sampled_from(["1.0", "1.1"]),
    pieces=st.integers(1, 4),
    read=st.sampled_from([0, 0, 1, 5000, 8 * KiB, 70 * KiB]),
)


@pytest.mark.parametrize(
    "examples", [60, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_any_combination(tmp_path, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(CASES)
    def check(case: Case) -> None:
        options = {"before": lambda response: response.read(case.read)} if case.read else {}
        wanted = download(original, tmp_path, case.script(), **options)
        with counting() as grown:
            assert download(patched, tmp_path, case.script(), **options) == wanted
        if not grown.fallbacks:
            assert grown.bytes_spliced + grown.bytes_copied == len(wanted["arrived"])
        else:
            assert grown.fallbacks == {"body": 1}
            assert case.framing == "chunked" or case.size <= case.read or not wanted["arrived"]

    check()


# --- urllib3 ---


class GeventConnection(urllib3.connection.HTTPConnection):
    """As it connects after gevent.monkey.patch_all()."""

    def _new_conn(self) -> Any:
        return gevent.socket.create_connection((self.host, self.port))


class GeventPool(urllib3.HTTPConnectionPool):
    ConnectionCls = GeventConnection


@contextlib.contextmanager
def pool_to(script: Script) -> Iterator[tuple[Any, list[Any]]]:
    """Give a pool of one connection to a server, and the list of those it has accepted."""
    accepted: list[Any] = []
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def accept() -> None:
            while True:
                sock, _ = listener.accept()
                accepted.append(sock)
                servers.append(gevent.spawn(script.serve, sock))

        servers = [gevent.spawn(accept)]
        pool = GeventPool(*listener.getsockname(), maxsize=1, timeout=0.3, retries=False)
        try:
            yield pool, accepted
        finally:
            pool.close()
            gevent.killall(servers)
            for sock in accepted:
                sock.close()


def urllib3_state(response: Any) -> dict[str, Any]:
    return {
        "tell": response.tell(),
        "length_remaining": response.length_remaining,
        "closed": response.closed,
        "isclosed": response.isclosed(),
        "released": response.connection is None,
        "inner": (response._fp.length, response._fp.closed, response._fp.isclosed()),
        "uncached": getattr(response, "_uncached_read_occurred", None),
    }


def urllib3_download(
    copy: Callable[..., Any],
    directory: Path,
    script: Script,
    before: Callable[[Any], Any] = lambda response: None,
    **options: Any,
) -> dict[str, Any]:
    path = directory / "copy"
    with gevent.Timeout(GUARD), pool_to(script) as (pool, accepted), open(path, "wb") as sink:
        response = pool.urlopen("GET", "/", preload_content=False, **options)
        result = {"before": before(response)}
        result["error"] = seen(copy, response, sink)
        result |= urllib3_state(response)
        sink.close()
        result["arrived"] = path.read_bytes()
        result["second"] = seen(lambda: pool.urlopen("GET", "/", pool_timeout=0.01).data)
        result["connections"] = len(accepted)
        return result


def urllib3_compare(
    directory: Path, script: Script, *, fast: bool = True, **options: Any
) -> dict[str, Any]:
    wanted = urllib3_download(original, directory, script, **options)
    with counting() as grown:
        got = urllib3_download(patched, directory, script, **options)
    assert got == wanted
    assert grown.fallbacks == ({} if fast else {"body": 1})
    if fast:
        assert grown.bytes_spliced + grown.bytes_copied == len(wanted["arrived"])
    else:
        assert grown.bytes_spliced == 0
    return wanted


@pytest.mark.few
@pytest.mark.parametrize("read", [0, 100, 10_000])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("size", [1000, *SIZES, 3 * MiB])
def test_urllib3(tmp_path, size, decode, read):
    script = Script(answers(head(size), CONTENT[:size]))
    wanted = urllib3_compare(
        tmp_path,
        script,
        before=lambda response: response.read(read) if read else None,
        decode_content=decode,
        fast=size > read,
    )
    assert wanted["arrived"] == CONTENT[read:size]
    assert wanted["second"] == b"second"
    assert wanted["connections"] == 1


@pytest.mark.parametrize("count", [199_999, 200_000])
def test_urllib3_lets_go_with_the_last_byte(tmp_path, count):
    def attempt(taken: bool) -> tuple[Any, ...]:
        script = Script(answers(head(200_000), CONTENT[:200_000]))
        with pool_to(script) as (pool, _), open(tmp_path / "copy", "wb") as sink:
            response = pool.urlopen("GET", "/", preload_content=False)
            if not taken:
                response.__class__ = type("Other", (urllib3.HTTPResponse,), {})
            return gsplice.copy(response, sink, count), urllib3_state(response)

    wanted = attempt(False)
    with counting() as grown:
        assert attempt(True) == wanted
    assert wanted[1]["released"] == (count == 200_000)
    assert grown.fallbacks == {}


@pytest.mark.parametrize("read", [0, 100])
@pytest.mark.parametrize("decode", [False, True])
def test_urllib3_and_a_content_encoding(tmp_path, decode, read):
    packed = gzip.compress(CONTENT[:300_000])
    script = Script(answers(head(len(packed), "Content-Encoding: gzip"), packed))
    wanted = urllib3_compare(
        tmp_path,
        script,
        before=lambda response: response.read(read) if read else None,
        decode_content=decode,
        fast=not decode,
    )
    arrived = wanted["arrived"]
    assert arrived
    assert (CONTENT[:300_000] if decode else packed).endswith(arrived)  # urllib3 1 reads more


def test_urllib3_and_read_that_is_made_to_decode(tmp_path):
    """As programs do it with requests, whose ``raw`` does not decode of its own."""
    packed = gzip.compress(CONTENT[:300_000])
    script = Script(answers(head(len(packed), "Content-Encoding: gzip"), packed))

    def before(response: Any) -> None:
        response.read = functools.partial(response.read, decode_content=True)

    wanted = urllib3_compare(tmp_path, script, before=before, decode_content=False, fast=False)
    assert wanted["arrived"] == CONTENT[:300_000]


def test_urllib3_and_chunks(tmp_path):
    first = head(None, "Transfer-Encoding: chunked") + chunked(CONTENT[:200_000])
    wanted = urllib3_compare(tmp_path, Script(answers(first)), fast=False)
    assert wanted["arrived"] == CONTENT[:200_000]


@pytest.mark.few
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("size", [5000, *AROUND])
def test_urllib3_and_crlf_after_a_body(tmp_path, size, decode):
    """It gives up a connection on which there is something to read, as some may be unpatched."""
    script = and_more(size, CRLF, tail=min(size, 8 * KiB))
    wanted = urllib3_download(original, tmp_path, script, decode_content=decode)
    got = urllib3_download(patched, tmp_path, script, decode_content=decode)
    assert (got["second"], got["connections"]) == (b"second", 1)
    assert wanted["connections"] == 1 or size in AROUND
    assert got == wanted | {name: got[name] for name in ("second", "connections")}


def test_urllib3_until_the_connection_is_closed(tmp_path):
    script = Script(((head(None), CONTENT[:200_000]),))
    assert urllib3_compare(tmp_path, script)["arrived"] == CONTENT[:200_000]


@pytest.mark.few
@pytest.mark.parametrize("sent", [0, 5000, 200 * KiB])
@pytest.mark.parametrize("ending", ["close", "reset", "stall"])
def test_urllib3_and_a_body_that_breaks_off(tmp_path, ending, sent):
    """It has errors of its own, and gives up the connection."""
    script = Script(((head(300 * KiB), CONTENT[:sent]),), ending)
    options = {"enforce_content_length": True}  # the default in urllib3 2
    wanted = urllib3_download(original, tmp_path, script, **options)
    with counting() as grown:
        got = urllib3_download(patched, tmp_path, script, **options)
    assert (
        got["error"][0]
        is {
            "close": urllib3.exceptions.ProtocolError,
            "reset": urllib3.exceptions.ProtocolError,
            "stall": urllib3.exceptions.ReadTimeoutError,
        }[ending]
    )
    assert got["arrived"] == CONTENT[:sent]
    assert got["length_remaining"] == 300 * KiB - sent
    assert got["tell"] == sent
    for name in ("error", "closed", "isclosed", "released", "second", "connections"):
        assert got[name] == wanted[name]
    assert grown.bytes_spliced + grown.bytes_copied == sent
    assert grown.fallbacks == {}


@pytest.mark.parametrize("copy", [original, patched])
@pytest.mark.parametrize("sent", [0, 200 * KiB])
def test_urllib3_gives_up_the_connection_when_the_wait_is_cut_short(tmp_path, sent, copy):
    script = Script(((head(300 * KiB), CONTENT[:sent]),), "stall")
    with pool_to(script) as (pool, _), open(tmp_path / "copy", "wb") as sink:
        response = pool.urlopen("GET", "/", preload_content=False, timeout=GUARD)
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
            copy(response, sink)
        assert (response.isclosed(), response.connection) == (True, None)


@pytest.mark.parametrize("size", [1000, 1 * MiB])
def test_urllib3_and_a_destination_that_fails(tmp_path, size):
    """That is no error of the connection's."""

    def attempt(copy: Callable[..., None]) -> tuple[Any, bool, bytes]:
        script = Script(answers(head(size), CONTENT[:size]))
        with pool_to(script) as (pool, _), Ends(tmp_path) as ends:
            response = pool.urlopen("GET", "/", preload_content=False)
            ours, theirs = ends.connect("unix")
            theirs.close()
            sink = ends.enter_context(ours.makefile("wb", 0))
            error = seen(copy, response, sink)
            response.drain_conn()
            return error, response.connection is None, pool.urlopen("GET", "/").data

    wanted = attempt(original)
    assert wanted[0][0] is BrokenPipeError
    assert attempt(patched) == wanted


@pytest.mark.parametrize("size", [1000, 1 * MiB])
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_urllib3_to_a_pipe(tmp_path, size, ending):
    whole = ending == "close"
    script = Script(((head(size if whole else 2 * size), CONTENT[:size]),), ending)

    def attempt(copy: Callable[..., None]) -> tuple[Any, bytes]:
        with gevent.Timeout(GUARD), pool_to(script) as (pool, _), Ends(tmp_path) as ends:
            response = pool.urlopen("GET", "/", preload_content=False)
            sink, arrived = ends.sink("pipe")
            return seen(copy, response, sink), arrived()

    wanted = attempt(original)
    with counting() as grown:
        got = attempt(patched)
    assert got[0] == wanted[0]
    assert got[1] == CONTENT[:size]
    assert grown.bytes_spliced + grown.bytes_copied == size


# --- as a program has it ---

PROGRAM = """
import gevent.monkey
gevent.monkey.patch_all()
import gsplice
gsplice.patch_all()
import hashlib, shutil, sys, tempfile
from gevent.pywsgi import WSGIServer
for name in ("http.client", "urllib3", "requests"):
    assert name not in sys.modules or name == "http.client", name

body = bytes(range(256)) * 4097

def application(environ, start_response):
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

server = WSGIServer(("127.0.0.1", 0), application, log=None)
server.start()
url = f"http://127.0.0.1:{server.server_port}/"
way = sys.argv[1]
with tempfile.TemporaryFile() as file:
    if way == "urllib":
        import urllib.request
        with urllib.request.urlopen(url) as response:
            assert response.msg == "OK"
            shutil.copyfileobj(response, file)
    else:
        import requests
        with requests.get(url, stream=True) as response:
            shutil.copyfileobj(response.raw, file)
    file.seek(0)
    assert file.read() == body
stats = gsplice.stats()
assert stats.bytes_spliced > len(body) - 9000, stats
assert dict(stats.fallbacks) == {}, stats
server.stop()
"""


@pytest.mark.parametrize("way", ["urllib", "requests"])
def test_in_a_program(way):
    run_program(PROGRAM, way)


def test_a_limited_stream_around_a_response(tmp_path: Path) -> None:
    """The response lets go of its connection, as after a read to the end."""
    from werkzeug.wsgi import LimitedStream

    script = and_more(3 * MiB, CRLF)
    with gevent.Timeout(GUARD), Client(tmp_path, script) as client, counting() as grown:
        response = client.get()
        with client.sink() as sink:
            shutil.copyfileobj(LimitedStream(response, 3 * MiB), sink)
        assert client.path.read_bytes() == CONTENT[: 3 * MiB]
        assert response.isclosed()
        assert client.get().read() == b"second"
    assert grown.bytes_spliced > 2 * MiB


FORK = """
import errno, gevent, gevent.os, gevent.socket, gsplice, http.client, os, sys
gsplice.patch_all()
size = 2 << 20
ours, theirs = gevent.socket.socketpair()
response = http.client.HTTPResponse(ours)
theirs.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
response.begin()
feed = gevent.spawn(theirs.sendall, bytes(size - 1))
file = open(sys.argv[1], "wb")
copy = gevent.spawn(gsplice.copyfileobj, response, file)
while response.length > 1 or not ours._read_event.active:
    gevent.sleep(0.001)
child = gevent.os.fork_gevent()  # without a watcher: the child is ours to wait for
if not child:
    gevent.get_hub().print_exception = lambda *args: None
    theirs.send(b"x")
    copy.join()
    # What nobody has read here is left for the parent.
    os._exit(copy.exception.errno != errno.ECANCELED)
assert os.waitpid(child, 0)[1] == 0
copy.get()
for each in file, response, ours, theirs:
    each.close()
assert os.path.getsize(sys.argv[1]) == size
"""


def test_a_fork_while_the_last_byte_is_waited_for(tmp_path):
    run_program(FORK, tmp_path / "copy")
