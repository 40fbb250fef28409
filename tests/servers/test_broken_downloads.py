"""Downloads that break off, destinations that fail, and what is not spliced."""

from __future__ import annotations

import http.client
import os
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting
from ends import GUARD, Ends, KiB, MiB, until
from responses import (
    CONTENT,
    Client,
    Script,
    answers,
    download,
    head,
    original,
    patched,
    seen,
    state,
)

import gsplice
from gsplice._move import splice

pytestmark = pytest.mark.usefixtures("every_size")


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
