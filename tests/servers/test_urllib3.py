"""Responses of urllib3."""

from __future__ import annotations

import contextlib
import functools
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
import urllib3
from conftest import counting
from ends import GUARD, Ends, KiB, MiB
from responses import (
    AROUND,
    CONTENT,
    CRLF,
    SIZES,
    Script,
    and_more,
    answers,
    chunked,
    head,
    original,
    patched,
    seen,
)

import gsplice

pytestmark = pytest.mark.usefixtures("every_size")


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
