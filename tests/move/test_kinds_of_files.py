"""Files of every filesystem, of every size, and that change under way."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    receiver,
    some_bytes,
)
from ends import GUARD, MOVERS, Ends, KiB, MiB, is_waited_for, until
from pairs import MANY, READ_AHEAD
from unpatched import unpatched_copyfileobj

import gsplice
from gsplice._ends import page_cache


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.parametrize(("from_shm", "to_shm"), [(True, True), (True, False), (False, True)])
def test_file_to_file_across_filesystems(
    tmp_path: Path, shm: Path, from_shm: bool, to_shm: bool
) -> None:
    src_path = file_of((shm if from_shm else tmp_path) / "src", MANY)
    dst_path = (shm if to_shm else tmp_path) / "dst"
    with src_path.open("rb") as src, dst_path.open("wb") as dst, counting() as grown:
        shutil.copyfileobj(src, dst)
        assert (src.tell(), dst.tell()) == (MANY, MANY)
    assert dst_path.read_bytes() == src_path.read_bytes()
    assert grown.bytes_copy_file_range + grown.bytes_spliced == MANY
    assert grown.fallbacks == {}


@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_tmpfs_takes_part_like_any_other(shm: Path, source: str) -> None:
    data = some_bytes(MANY)
    with Ends(shm) as ends, counting() as grown:
        dst, finish = ends.sink("file" if source != "file" else "tcp")
        shutil.copyfileobj(ends.source(source, data), dst)
        assert digest(finish()) == digest(data)
    assert grown.fallbacks == {}
    assert grown.bytes_spliced + grown.bytes_sendfile >= MANY - READ_AHEAD


PSEUDO_FILES = ["/proc/self/cmdline", "/proc/version", "/sys/devices/system/cpu/possible"]
# a binary file of sysfs has a size, unlike the others here, and is big
PSEUDO_FILES += filter(os.path.exists, ["/sys/kernel/btf/vmlinux"])


@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("path", PSEUDO_FILES)
def test_files_that_the_kernel_makes_up(ends: Ends, path: str, sink: str) -> None:
    dst, finish = ends.sink(sink)
    with open(path, "rb") as src:
        shutil.copyfileobj(src, dst)
        assert src.read() == b""
    assert digest(finish()) == digest(Path(path).read_bytes())


def test_a_file_of_procfs_that_changes_while_it_is_read(ends: Ends) -> None:
    dst, finish = ends.sink("tcp")
    with open("/proc/meminfo", "rb") as src:
        shutil.copyfileobj(src, dst)
    names = [line.split()[0] for line in finish().splitlines()]
    assert names == [line.split()[0] for line in Path("/proc/meminfo").read_bytes().splitlines()]


def test_a_file_of_procfs_as_destination_is_written_the_ordinary_way(ends: Ends) -> None:
    path = Path("/proc/self/comm")
    before = path.read_bytes().rstrip(b"\n")
    try:
        with path.open("wb", buffering=0) as dst, counting() as grown:
            shutil.copyfileobj(ends.source("tcp", b"spliced"), dst)
        assert path.read_bytes() == b"spliced\n"
        assert grown.fallbacks in ({"refused": 1}, {})  # {}: all of it had been read ahead
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("source", ["file", "tcp", "pipe"])
def test_append_only_destination(ends: Ends, tmp_path: Path, source: str) -> None:
    data = some_bytes(MANY)
    path = file_of(tmp_path / "log", 1000, seed=1)
    with path.open("ab") as dst, counting() as grown:
        shutil.copyfileobj(ends.source(source, data), dst)
        assert dst.tell() == 1000 + MANY
    assert digest(path.read_bytes()) == digest(some_bytes(1000, seed=1) + data)
    assert grown.fallbacks == {"append": 1}


@pytest.mark.parametrize("start", [0, 100, 65 * KiB])
def test_a_file_copied_onto_itself(tmp_path: Path, start: int) -> None:
    def run(copyfileobj: Callable[..., None]) -> tuple[str, int, int]:
        path = file_of(tmp_path / "self", 200 * KiB)
        with path.open("rb") as src, path.open("r+b") as dst:
            src.seek(100 * KiB)
            dst.seek(start)
            copyfileobj(src, dst)
            ends_at = src.tell(), dst.tell()
        return digest(path.read_bytes()), *ends_at

    with counting() as grown:
        patched = run(shutil.copyfileobj)
    assert patched == run(unpatched_copyfileobj)
    assert grown.fallbacks == {"same_file": 1}


def test_devices_go_the_ordinary_way(ends: Ends) -> None:
    dst, finish = ends.sink("tcp")
    with open("/dev/zero", "rb") as zero, open("/dev/null", "wb") as null, counting() as grown:
        assert gsplice.copy(zero, dst, MANY) == MANY
        assert gsplice.copy(ends.source("file", bytes(MANY)), null) == MANY
        assert gsplice.copy(ends.source("tcp", bytes(MANY)), null) == MANY
    assert finish() == bytes(MANY)
    assert grown.fallbacks == {"source_type": 1, "destination_type": 2}


OFFSETS = [2**31 - 100, 2**32 - 100, 2**32 + 2**31]


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A file beyond 4 GiB, empty but for some bytes at each of OFFSETS.

    And for one that is looked at to learn whether these were only read ahead: Linux 6.1 calls a
    hole not resident, with RWF_NOWAIT, until somebody has read it.
    """
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(OFFSETS[-1] + MiB)
        for seed, offset in enumerate(OFFSETS):
            file.seek(offset)
            file.write(some_bytes(200 * KiB, seed))
            if offset != OFFSETS[-1]:
                file.seek(page_cache.READ_AHEAD, os.SEEK_CUR)
                file.write(b"x")
    return path


@pytest.mark.parametrize(("seed", "offset"), list(enumerate(OFFSETS)))
def test_sendfile_beyond_two_and_four_gib(ends: Ends, huge: Path, seed: int, offset: int) -> None:
    sock, finish = ends.sink("bare_tcp")
    with huge.open("rb") as src, counting() as grown:
        assert sock.sendfile(src, offset, 200 * KiB) == 200 * KiB
        assert src.tell() == offset + 200 * KiB
    assert digest(finish()) == digest(some_bytes(200 * KiB, seed))
    assert grown.bytes_spliced > 0


@pytest.mark.parametrize(("seed", "offset"), list(enumerate(OFFSETS)))
@pytest.mark.parametrize("sink", ["file", "tcp"])
def test_copy_beyond_two_and_four_gib(
    ends: Ends, huge: Path, sink: str, seed: int, offset: int
) -> None:
    dst, finish = ends.sink(sink)
    with huge.open("rb") as src, counting() as grown:
        src.seek(offset)
        assert gsplice.copy(src, dst, 200 * KiB) == 200 * KiB
        assert src.tell() == offset + 200 * KiB
    assert digest(finish()) == digest(some_bytes(200 * KiB, seed))
    assert grown.bytes_spliced + grown.bytes_copy_file_range == 200 * KiB


@pytest.mark.parametrize("source", ["file", "tcp"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_destination_beyond_two_and_four_gib(
    ends: Ends, tmp_path: Path, source: str, offset: int
) -> None:
    data = some_bytes(200 * KiB)
    with (tmp_path / "dst").open("w+b", buffering=0) as dst:
        dst.seek(offset)
        shutil.copyfileobj(ends.source(source, data), dst)
        assert dst.tell() == offset + len(data)
        dst.seek(offset)
        assert digest(dst.read()) == digest(data)


def test_copyfileobj_at_the_end_of_a_huge_file(ends: Ends, huge: Path) -> None:
    dst, finish = ends.sink("tcp")
    with huge.open("rb") as src:
        src.seek(OFFSETS[-1])
        shutil.copyfileobj(src, dst)
        assert src.tell() == OFFSETS[-1] + MiB
    assert digest(finish()) == digest(some_bytes(200 * KiB, 2).ljust(MiB, b"\0"))


# ---- files that change under way


@pytest.mark.parametrize("mover", ["sendfile", "copyfileobj", "copy"])
@pytest.mark.parametrize("change", ["grows", "shrinks", "vanishes"])
def test_a_file_that_changes_while_the_receiver_is_slow(
    small_ends: Ends, tmp_path: Path, mover: str, change: str
) -> None:
    size = {"grows": 3 * MiB, "shrinks": 1 * MiB + 1, "vanishes": 0}[change]
    path = file_of(tmp_path / "file", 2 * MiB)
    start = path.read_bytes()
    sock, peer = small_ends.connect()
    with path.open("rb") as src, sock.makefile("wb") as dst:

        def run() -> int:
            if mover == "sendfile":
                return sock.sendfile(src)
            return MOVERS[mover](src, dst) or src.tell()

        sender = gevent.spawn(run)
        until(lambda: is_waited_for(sock))
        os.truncate(path, size)
        arrived = receiver(peer)
        sent = sender.get(timeout=GUARD)
        assert sent == src.tell()
        dst.close()
        sock.close()
        received = arrived.get(timeout=GUARD)
    assert len(received) == sent
    if change == "vanishes":
        assert start.startswith(received)
    else:
        assert digest(received) == digest(start.ljust(size, b"\0")[:size])


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_copied_to_a_file(tmp_path: Path, change: str) -> None:
    size = {"grows": 9 * MiB, "shrinks": 5 * MiB}[change]
    path = file_of(tmp_path / "src", 7 * MiB)
    start = path.read_bytes()
    changer = gevent.spawn(os.truncate, path, size)
    with path.open("rb") as src, (tmp_path / "dst").open("wb") as dst:
        shutil.copyfileobj(src, dst)
        assert changer.dead  # it had its turn during the copy
        assert src.tell() == dst.tell() == size
    assert digest((tmp_path / "dst").read_bytes()) == digest(start.ljust(size, b"\0")[:size])
