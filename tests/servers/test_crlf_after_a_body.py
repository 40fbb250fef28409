"""A line that some servers send behind a body is dropped as http.client drops it."""

from __future__ import annotations

import http.client
import io
import shutil
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting
from ends import GUARD, Ends, KiB, MiB
from responses import (
    AROUND,
    CONTENT,
    CRLF,
    Client,
    Script,
    and_more,
    compare,
    download,
    head,
    original,
    patched,
    seen,
)

import gsplice

pytestmark = pytest.mark.usefixtures("every_size")


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
