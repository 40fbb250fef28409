"""Errors of a disk, and files that shrink or grow under way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import (
    counting,
    digest,
    file_of,
    some_bytes,
)
from ends import GUARD, Ends, MiB
from slow_disks import TO_ANY, held_beyond, moved, sink_for
from slowfs import SlowFS

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.few
@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
@pytest.mark.parametrize("beyond", [0, 1 * MiB])
@pytest.mark.parametrize("way", TO_ANY)
def test_an_error_of_the_disk(
    slow: SlowFS, tmp_path: Path, name: str, way: str, beyond: int, error: str
) -> None:
    size = 2 * MiB
    results = []
    for number, move in enumerate(TO_ANY[way]):
        one = f"{name}{number}"
        path = slow.mount / one
        file_of(slow.directory / one, size)
        slow.fail(error, one, beyond=beyond)
        with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
            dst, finish = sink_for(ends, way)
            with pytest.raises(OSError) as raised:
                move(src, dst)
            position = src.tell()
            arrived = finish()
        assert some_bytes(size).startswith(arrived)
        results.append((raised.type, raised.value.errno))
        if number == 0:
            assert position == len(arrived)
            assert bool(arrived) == bool(beyond)
            assert moved(grown) == len(arrived)
            assert grown.offloads > 0
    assert results[0] == results[1]


@pytest.mark.parametrize("way", TO_ANY)
def test_a_file_truncated_under_way(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    size, cut = 3 * MiB, 1 * MiB + 100
    held = held_beyond(1 * MiB, slow, name, tmp_path, way, size)
    with held as (_, src, _, finish, moving):
        os.truncate(slow.directory / name, cut)
        slow.release(name)
        moving.get(timeout=GUARD)
        arrived = finish()
        assert digest(arrived[:cut]) == digest(some_bytes(size)[:cut])
        # What had been asked for already, the kernel may have filled up with zeros.
        assert not any(arrived[cut:])
        assert src.tell() == len(arrived) < size


@pytest.mark.parametrize("way", TO_ANY)
def test_a_file_grown_under_way(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    size = 2 * MiB
    held = held_beyond(1 * MiB, slow, name, tmp_path, way, size)
    with held as (_, src, _, finish, moving):
        with (slow.mount / name).open("ab", 0) as more:
            more.write(some_bytes(100_000, seed=5))
        slow.release(name)
        moving.get(timeout=GUARD)
        assert digest(finish()) == digest(some_bytes(size) + some_bytes(100_000, seed=5))
        assert src.tell() == size + 100_000
