"""Downloads: what an HTTP response gives goes by splice, and leaves it as its own read() would.

Each case is run through the original function as well, against a server that follows the same
script, and all that can be seen afterwards is compared: the response, the connection, and what a
second request on it gets.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, receive_all, run_program
from ends import GUARD, KiB, MiB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from responses import (
    CONTENT,
    CRLF,
    SECOND,
    SIZES,
    Client,
    Script,
    and_more,
    answers,
    chunked,
    compare,
    download,
    head,
    original,
    patched,
)

from gsplice._ends import recognise
from gsplice._ends.small import SMALL_BODY

pytestmark = pytest.mark.usefixtures("every_size")


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
