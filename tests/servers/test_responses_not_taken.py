"""Responses that read in a way of their own are left to it."""

from __future__ import annotations

import http.client
import io
import shutil
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting
from ends import GUARD, Ends, KiB
from responses import CONTENT, Client, Script, compare, head, original, seen

pytestmark = pytest.mark.usefixtures("every_size")


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
