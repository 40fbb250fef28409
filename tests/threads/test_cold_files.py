"""A real disk: a file that is not in the page cache is read on a thread."""

from __future__ import annotations

import os
from pathlib import Path

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from cold import drop, with_a_cold_file
from conftest import (
    counting,
    digest,
    file_of,
    no_pipe_to_be_had,
    some_bytes,
)
from ends import GUARD, Ends, KiB, MiB, is_waited_for, until
from slow_disks import TO_ANY, TO_FILE, Clock, cold, moved, needed_a_thread, outcome
from slowfs import SlowFS

import gsplice
from gsplice._ends.small import SMALL_FILE as SMALL

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.few
@pytest.mark.parametrize("position", [0, 1000])
@pytest.mark.parametrize("size", [5000, SMALL, 3 * MiB + 5])
@pytest.mark.parametrize("way", TO_ANY)
@with_a_cold_file
def test_a_cold_file(tmp_path: Path, way: str, size: int, position: int) -> None:
    patched, unpatched = TO_ANY[way]
    path = cold(tmp_path / "cold", size)
    with counting() as grown:
        got = outcome(tmp_path, way, patched, path, position)
    if size <= SMALL:  # it may have come by the time it is asked for again
        assert moved(grown) in (0, size - position)
    else:
        assert moved(grown) == size - position
        needed_a_thread(grown)
        assert grown.bytes_copied == 0
        fast = "bytes_copy_file_range" if way in TO_FILE else "bytes_spliced"
        assert getattr(grown, fast) > 0
    assert got[1:] == (digest(some_bytes(size)[position:]), size)
    # gevent's own sendfile is wrong about where the file stands then
    assert got[:2] == outcome(tmp_path, way, unpatched, path, position)[:2]


@pytest.mark.parametrize("way", TO_ANY)
@pytest.mark.parametrize("size", [5000, 3 * MiB + 5])
def test_a_warm_file_needs_no_thread(tmp_path: Path, way: str, size: int) -> None:
    """But for writing what is copied."""
    path = file_of(tmp_path / "warm", size)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(size)), size)
    if way not in TO_FILE:
        assert grown.offloads == 0


@pytest.mark.few
@pytest.mark.parametrize("count", [1, SMALL, 1 * MiB + 1])
@pytest.mark.parametrize("offset", [0, 4097])
@pytest.mark.parametrize("function", ["sendfile", "copy", "_sendfile_use_sendfile"])
@with_a_cold_file
def test_a_part_of_a_cold_file(tmp_path: Path, function: str, offset: int, count: int) -> None:
    path = cold(tmp_path / "cold", 3 * MiB)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        if function == "copy":
            src.seek(offset)
            sent = gsplice.copy(src, dst, count)
        else:
            sent = getattr(dst, function)(src, offset, count)
        assert sent == count
        assert src.tell() == offset + count
        assert digest(finish()) == digest(some_bytes(3 * MiB)[offset : offset + count])
    assert moved(grown) == count
    if count > SMALL:
        needed_a_thread(grown)


@with_a_cold_file
def test_a_cold_file_that_was_read_ahead(tmp_path: Path) -> None:
    path = cold(tmp_path / "cold", 3 * MiB)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        src.read(10)
        drop(src.fileno())
        assert dst.sendfile(src) == 3 * MiB - 10
        assert digest(finish()) == digest(some_bytes(3 * MiB)[10:])
    needed_a_thread(grown)


@with_a_cold_file
def test_cold_then_warm_then_cold(tmp_path: Path) -> None:
    """What is resident goes by sendfile(2), and what is not through a pipe."""
    size = 24 * MiB
    path = cold(tmp_path / "half", size)
    with path.open("rb") as src:
        os.posix_fadvise(src.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(src.fileno(), 14 * MiB, 0)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        assert dst.sendfile(src) == size
        assert digest(finish()) == digest(some_bytes(size))
    assert grown.bytes_spliced >= 8 * MiB
    needed_a_thread(grown)
    assert moved(grown) == size


@with_a_cold_file
def test_a_cold_file_to_a_slow_reader(tmp_path: Path) -> None:
    """What the socket does not take is given up, with the pipe, and read again."""
    size = 2 * MiB
    path = cold(tmp_path / "cold", size)
    with Ends(tmp_path, buffers=16 * KiB) as ends, path.open("rb") as src, counting() as grown:
        sock, peer = ends.connect()
        moving = ends.spawn(sock.sendfile, src)
        received = bytearray()
        while len(received) < size:
            until(lambda: is_waited_for(sock) or moving.dead)
            assert gsplice.stats().pipes_in_use == 0
            received += peer.recv(256 * KiB)
        assert moving.get(timeout=GUARD) == size
    assert digest(bytes(received)) == digest(some_bytes(size))
    needed_a_thread(grown)
    assert moved(grown) == size


@pytest.mark.parametrize("way", TO_ANY)
@with_a_cold_file
def test_without_a_pipe(
    slow: SlowFS,
    tmp_path: Path,
    name: str,
    clock: Clock,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)
    with no_pipe_to_be_had(monkeypatch):
        for path in (slow.mount / name, cold(tmp_path / "cold", 1 * MiB)):
            with counting() as grown:
                moving = gevent.spawn(outcome, tmp_path, way, TO_ANY[way][0], path)
                if path.parent == slow.mount:
                    until(lambda: slow.begun(name))
                    clock.goes_on()
                    slow.release(name)
                got = moving.get(timeout=GUARD)
            assert got[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
            needed_a_thread(grown)
            assert grown.bytes_spliced == 0
            assert moved(grown) == 1 * MiB
