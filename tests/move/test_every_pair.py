"""Every pair of ends: all bytes arrive, the kernel moved them, and both ends stand right."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    some_bytes,
)
from ends import FILES, KINDS, MOVERS, PIPES, SOCKETS, Ends, KiB, MiB
from pairs import MANY, assert_fast, rest_of

import gsplice

# ---- every pair


@pytest.mark.few(64)
@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("sink", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_pair_moves_inside_the_kernel(ends: Ends, source: str, sink: str, mover: str) -> None:
    if mover == "copyfileobj" and "bare" in source + sink:
        mover = "copy"  # a bare socket is no file object
    data = some_bytes(MANY)
    src = ends.source(source, data)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        result = MOVERS[mover](src, dst)
    assert result == (MANY if mover == "copy" else None)
    if source in FILES:
        assert src.tell() == MANY
    if sink in FILES:
        assert dst.tell() == MANY
    assert digest(finish()) == digest(data)
    if source in FILES and sink in PIPES:
        # the pages would wait in the pipe by reference, for as long as its reader likes
        assert grown.fallbacks == {"file_to_pipe": 1}
        assert grown.bytes_spliced == grown.bytes_sendfile == 0
    else:
        assert_fast(grown, source, sink, MANY)


@pytest.mark.few
@pytest.mark.parametrize(
    "count", [0, 1, 8 * KiB, 64 * KiB, 64 * KiB + 1, 1 * MiB, MANY - 1, MANY, MANY + 1, 1 << 40]
)
@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("source", ["file", "bare_tcp", "tcp", "pipe"])
def test_copy_takes_exactly_count_bytes(ends: Ends, source: str, sink: str, count: int) -> None:
    data = some_bytes(MANY)
    moved = min(count, MANY)
    src = ends.source(source, data)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        assert gsplice.copy(src, dst, count) == moved
    if source in FILES:
        assert src.tell() == moved
    assert digest(rest_of(src)) == digest(data[moved:])
    assert digest(finish()) == digest(data[:moved])
    if source not in FILES and moved:
        assert_fast(grown, source, sink, moved)
    elif sink not in PIPES and moved > 64 * KiB:
        assert grown.bytes_spliced + grown.bytes_copy_file_range >= moved - 64 * KiB


@pytest.mark.parametrize("source", ["tcp", "unix", "pipe"])
def test_copy_of_nothing_does_not_wait_for_the_source(ends: Ends, source: str) -> None:
    src = ends.connect(source)[0].makefile("rb") if source in SOCKETS else ends.pipe()[0]
    with src, gevent.Timeout(2):
        assert gsplice.copy(src, ends.sink("file")[0], 0) == 0


@pytest.mark.parametrize(
    ("count", "error"),
    [(-1, ValueError), (2.5, TypeError), ("1", TypeError)],
)
def test_copy_refuses_a_count_that_is_none(ends: Ends, count: Any, error: type) -> None:
    src, (dst, finish) = ends.source("file", b"abc"), ends.sink("file")
    with pytest.raises(error):
        gsplice.copy(src, dst, count)
    assert src.tell() == 0
    assert finish() == b""


@pytest.mark.parametrize("pair", [(object(), io.BytesIO()), (io.BytesIO(), object())])
def test_copy_refuses_what_is_no_end(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError):
        gsplice.copy(*pair)


def test_consecutive_copies_share_a_stream_without_gap(ends: Ends) -> None:
    data = some_bytes(MANY)
    src = ends.source("tcp", data)
    dst, finish = ends.sink("tcp")
    counts = [1, 4095, 100, 1 * MiB, 70_000, 1]
    for count in counts:
        assert gsplice.copy(src, dst, count) == count
    assert gsplice.copy(src, dst) == MANY - sum(counts)
    assert digest(finish()) == digest(data)


@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_what_was_read_ahead_goes_first(ends: Ends, source: str, sink: str) -> None:
    data = some_bytes(MANY)
    src = ends.source(source, data)
    assert src.read(10) == data[:10]
    dst, finish = ends.sink(sink)
    dst.write(b"unflushed")
    shutil.copyfileobj(src, dst)
    assert digest(finish()) == digest(b"unflushed" + data[10:])


@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_an_end_can_be_used_on_after_a_copy(ends: Ends, source: str, sink: str) -> None:
    data = some_bytes(MANY)
    dst, finish = ends.sink(sink)
    dst.write(b"before")
    shutil.copyfileobj(ends.source(source, data), dst)
    dst.write(b"between")
    shutil.copyfileobj(ends.source(source, data), dst)
    assert digest(finish()) == digest(b"before" + data + b"between" + data)


@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_a_destination_open_for_both_can_be_read_and_written_on(
    ends: Ends, tmp_path: Path, source: str
) -> None:
    data, old = some_bytes(MANY), some_bytes(5 * MiB, seed=1)
    path = file_of(tmp_path / "both", len(old), seed=1)
    with path.open("r+b") as dst:
        assert dst.read(10) == old[:10]  # and it has read ahead
        dst.write(b"0123456789")
        shutil.copyfileobj(ends.source(source, data), dst)
        assert dst.tell() == 20 + MANY
        assert dst.read(10) == old[20 + MANY :][:10]
        dst.write(b"x")
        dst.seek(-21, os.SEEK_CUR)
        assert dst.read(10) == data[-10:]
    new = old[:10] + b"0123456789" + data + old[20 + MANY :][:10] + b"x"
    assert digest(path.read_bytes()) == digest(new + old[len(new) :])


@pytest.mark.few
@pytest.mark.parametrize("size", [0, 1, 64 * KiB, 64 * KiB + 1])
@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_short_sources(ends: Ends, source: str, sink: str, size: int) -> None:
    data = some_bytes(size)
    src = ends.source(source, data)
    dst, finish = ends.sink(sink)
    assert gsplice.copy(src, dst) == size
    assert digest(finish()) == digest(data)
