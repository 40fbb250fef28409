"""Destinations that are their own source, refuse splice, or are full."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    counting,
    digest,
    file_of,
    some_bytes,
)
from ends import GUARD, MOVERS, Ends, KiB, MiB, file_size_limit, until
from pairs import MANY
from unpatched import unpatched_copyfileobj

import gsplice


@pytest.mark.parametrize("count", [1, 50_000, 200_000, None])
@pytest.mark.parametrize("two_objects", [True, False])
def test_copy_within_one_file_does_what_reading_and_writing_does(
    tmp_path: Path, count: int | None, two_objects: bool
) -> None:
    def by_reading_and_writing(src: Any, dst: Any, count: int | None) -> int:
        left = 1 << 30 if count is None else count
        done = 0
        while data := src.read(min(64 * KiB, left - done)):
            done += dst.write(data)
        return done

    after = []
    for number, mover in enumerate((by_reading_and_writing, gsplice.copy)):
        path = file_of(tmp_path / str(number), 400_000)
        with path.open("r+b") as one, path.open("r+b") as other:
            one.seek(100_000)
            sink = other if two_objects else one
            if count is None and not two_objects:
                one.seek(300_000)  # it writes behind what it has read, to the end
            with counting() as grown:
                copied = mover(one, sink, count)
            after.append((copied, one.tell(), sink.tell()))
            sink.flush()
            after.append(digest(path.read_bytes()))
    assert after[:2] == after[2:]
    assert grown.fallbacks == {"same_file": 1}


# ---- a destination that changes its mind


@pytest.mark.parametrize("source", ["bare_unix", "pipe"])
@pytest.mark.parametrize("mover", ["copy", "copyfileobj"])
def test_a_destination_that_refuses_splice_under_way_loses_nothing(
    ends: Ends, tmp_path: Path, source: str, mover: str
) -> None:
    first, second = some_bytes(300 * KiB, 1), some_bytes(3 * MiB, 2)
    if source == "pipe":
        src, feeder = ends.pipe()
        send = feeder.raw.write
    else:
        src, feeder = ends.connect()
        send = feeder.send
        if mover == "copyfileobj":
            src = src.makefile("rb")

    def feed(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[send(view) :]

    path = tmp_path / "dst"
    with path.open("wb", buffering=0) as dst:
        with counting() as grown:
            copying = ends.spawn(MOVERS[mover], src, dst)
            feed(first)
            until(lambda: path.stat().st_size == len(first))
            flags = fcntl.fcntl(dst, fcntl.F_GETFL)
            fcntl.fcntl(dst, fcntl.F_SETFL, flags | os.O_APPEND)
            feed(second)
            feeder.close()
            copying.get(timeout=GUARD)
        assert dst.tell() == len(first) + len(second)
    src.close()
    assert digest(path.read_bytes()) == digest(first + second)
    assert grown.fallbacks == {"refused": 1}
    assert grown.bytes_spliced + grown.bytes_copied >= len(first)
    assert grown.pipes_in_use == 0


@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_a_full_destination(ends: Ends, tmp_path: Path, source: str) -> None:
    """The same error as unpatched, and as many bytes as fit."""
    data = some_bytes(MANY)
    limit = 1 * MiB + 100

    def run(copyfileobj: Callable[..., None], path: Path) -> tuple[type, int | None, bytes]:
        src = ends.source(source, data)
        dst = ends.enter_context(path.open("wb", buffering=0))
        with pytest.raises(OSError) as caught, file_size_limit(limit):
            copyfileobj(src, dst)
        return caught.type, caught.value.errno, path.read_bytes()

    patched = run(shutil.copyfileobj, tmp_path / "patched")
    assert patched[:2] == run(unpatched_copyfileobj, tmp_path / "unpatched")[:2]
    assert patched[1] == errno.EFBIG
    assert digest(patched[2]) == digest(data[:limit])
