"""Every pair of ends: all bytes arrive, the kernel moved them, and both ends stand right."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    receive_all,
    receiver,
    run_program,
    some_bytes,
)
from ends import FILES, GUARD, KINDS, MOVERS, PIPES, SOCKETS, Ends, KiB, MiB, is_waited_for, until
from gevent.exceptions import ConcurrentObjectUseError
from gevent.monkey import get_original

import gsplice

unpatched_copyfileobj = get_original("shutil", "copyfileobj")

#: Many pipe-fuls, and no multiple of anything.
MANY = 3 * MiB + 7
#: The most that an object may have read ahead, and that may therefore go through memory.
READ_AHEAD = 256 * KiB


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with Ends(tmp_path) as made:
        yield made


@pytest.fixture
def small_ends(tmp_path: Path) -> Iterator[Ends]:
    """Ends whose sockets have little room, so that transfers wait."""
    with Ends(tmp_path, buffers=16 * KiB) as made:
        yield made


def assert_fast(grown: Any, source: str, sink: str, size: int) -> None:
    """Pass if *size* bytes went the way that suits the two ends."""
    assert grown.transfers == 1
    assert grown.fallbacks == {}
    if source in FILES:
        way = grown.bytes_spliced if sink in SOCKETS else grown.bytes_copy_file_range
        assert way == size
    else:
        assert grown.bytes_spliced + grown.bytes_copied == size
        assert grown.bytes_copied <= READ_AHEAD
    if source in PIPES or sink in PIPES or (source in FILES and sink in FILES):
        assert grown.pipes_created + grown.acquired_local + grown.acquired_global == 0


def rest_of(src: Any) -> bytes:
    return receive_all(src) if hasattr(src, "recv") else src.read()


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


# ---- files


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
                file.seek(gsplice.page_cache.READ_AHEAD, os.SEEK_CUR)
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


# ---- streams


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
def test_sixteen_small_segments(ends: Ends, kind: str, sink: str) -> None:
    ours, theirs = ends.connect(kind)
    if kind == "tcp":
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = some_bytes(1600)
    for start in range(0, 1600, 100):
        theirs.send(data[start : start + 100])
    theirs.shutdown(socket.SHUT_WR)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        assert gsplice.copy(ours, dst) == 1600
    assert finish() == data
    assert grown.bytes_spliced == 1600


@pytest.mark.parametrize("segments", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("sink", ["tcp", "pipe"])
def test_a_stream_of_single_bytes(ends: Ends, sink: str, segments: int) -> None:
    ours, theirs = ends.connect("unix")  # which never joins two of them
    data = some_bytes(segments)

    def feed() -> None:
        for number in range(segments):
            theirs.send(data[number : number + 1])
        theirs.shutdown(socket.SHUT_WR)

    ends.spawn(feed)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        assert gsplice.copy(ours, dst) == segments
    assert digest(finish()) == digest(data)
    assert grown.bytes_spliced == segments


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_both_directions_at_once_on_one_socket(ends: Ends, kind: str) -> None:
    ours, theirs = ends.connect(kind)
    data = some_bytes(8 * MiB + 1)

    def echo() -> None:
        with theirs.makefile("rb") as src, theirs.makefile("wb") as dst:
            shutil.copyfileobj(src, dst)
        theirs.shutdown(socket.SHUT_WR)

    def feed() -> None:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)

    with counting() as grown:
        echoing = ends.spawn(echo)
        ends.spawn(feed)
        assert digest(receive_all(ours)) == digest(data)
        echoing.get(timeout=GUARD)
    assert grown.bytes_spliced + grown.bytes_copied == len(data)
    assert grown.bytes_copied <= READ_AHEAD


def test_a_socket_can_be_read_and_written_by_two_copies_at_once(ends: Ends) -> None:
    ours, theirs = ends.connect()
    out, back = some_bytes(4 * MiB, 1), some_bytes(5 * MiB, 2)
    received = io.BytesIO()

    def outwards() -> None:
        gsplice.copy(ends.source("file", out), ours)
        ours.shutdown(socket.SHUT_WR)

    inwards_to, finish = ends.sink("file")
    inwards = ends.spawn(gsplice.copy, ours, inwards_to)
    ends.spawn(outwards)
    reading = ends.spawn(lambda: received.write(receive_all(theirs)))
    theirs.sendall(back)
    theirs.shutdown(socket.SHUT_WR)
    assert inwards.get(timeout=GUARD) == len(back)
    reading.get(timeout=GUARD)
    assert digest(received.getvalue()) == digest(out)
    assert digest(finish()) == digest(back)


@pytest.mark.parametrize("sink", ["tcp", "unix", "pipe"])
def test_the_end_of_the_source_is_not_passed_on_before_its_bytes(
    small_ends: Ends, sink: str
) -> None:
    """The source has ended long before the destination takes its first byte."""
    data = some_bytes(2 * MiB)
    src = small_ends.source("unix", data)
    if sink == "pipe":
        peer, dst = small_ends.pipe()
        read = peer.read
    else:
        dst, peer = small_ends.connect(sink)

        def read() -> bytes:
            return receive_all(peer)

    def run() -> None:
        gsplice.copy(src, dst)
        dst.close()

    copying = small_ends.spawn(run)
    for _ in range(100):
        gevent.sleep(0)
    assert not copying.dead
    assert digest(read()) == digest(data)
    copying.get(timeout=GUARD)


# ---- a file copied within itself


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


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


# ---- errors, compared with unpatched

Scenario = Callable[[Ends, Callable[..., Any], str], Any]


def outcome(function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """Return the result of a call, or the class and number of its exception."""
    try:
        with gevent.Timeout(GUARD):
            return "returned", function(*args)
    except Exception as err:  # noqa: BLE001
        return type(err), getattr(err, "errno", None)


#: For each name the patched function and the unpatched one.
SENDERS = {
    "sendfile": (
        lambda src, dst: dst.sendfile(src),
        lambda src, dst: get_original("gevent._socket3.socket", "sendfile")(dst, src),
    ),
    "copyfileobj": (
        lambda src, dst: shutil.copyfileobj(src, dst),
        unpatched_copyfileobj,
    ),
}


class Sending:
    """A transfer to a peer that does not read, under way and waiting for it."""

    def __init__(self, ends: Ends, sender: str, send: Callable[..., Any]) -> None:
        self.src = ends.source("file", some_bytes(4 * MiB))
        self.sock, self.peer = ends.connect()
        self.dst = self.sock
        if sender == "copyfileobj":
            self.dst = ends.enter_context(self.sock.makefile("wb", buffering=0))
        self.greenlet = ends.spawn(outcome, send, self.src, self.dst)
        # An acknowledgement that is late makes room once more: then it goes on, closed or not.
        until(lambda: is_waited_for(self.sock) and not select.select([], [self.sock], [], 0)[1])

    def close(self) -> None:
        self.dst.close()
        self.sock.close()

    def result(self) -> Any:
        return self.greenlet.get(timeout=GUARD)


def reset(sock: Any) -> None:
    """Close *sock* in a way that its peer meets ECONNRESET."""
    linger_not = b"\1\0\0\0\0\0\0\0"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
    sock.close()


@pytest.mark.parametrize(
    "happening",
    [
        lambda sending: reset(sending.peer),
        lambda sending: sending.peer.close(),
        lambda sending: sending.close(),
        lambda sending: sending.sock.shutdown(socket.SHUT_WR),
    ],
    ids=["peer resets", "peer closes early", "socket closed", "socket shut down"],
)
@pytest.mark.parametrize("sender", SENDERS)
def test_a_broken_send_fails_as_unpatched(
    small_ends: Ends, sender: str, happening: Callable[[Sending], None]
) -> None:
    results = []
    with counting() as grown:
        for send in SENDERS[sender]:
            sending = Sending(small_ends, sender, send)
            happening(sending)
            results.append(sending.result())
    assert results[0] == results[1]
    assert issubclass(results[0][0], OSError)
    assert grown.bytes_spliced > 0


@pytest.mark.parametrize("sender", SENDERS)
def test_the_file_closed_under_way_fails_as_unpatched(small_ends: Ends, sender: str) -> None:
    results = []
    for send in SENDERS[sender]:
        sending = Sending(small_ends, sender, send)
        sending.src.close()
        small_ends.callback(receiver(sending.peer).kill)
        results.append(sending.result())
        sending.close()
    assert results[0] == results[1] == (ValueError, None)


@pytest.mark.parametrize("sender", SENDERS)
def test_a_peer_that_never_reads_runs_into_the_timeout(small_ends: Ends, sender: str) -> None:
    results, sent = [], []
    for send in SENDERS[sender]:
        src = small_ends.source("file", some_bytes(4 * MiB))
        sock, peer = small_ends.connect()
        sock.settimeout(0.05)
        dst = sock if sender == "sendfile" else sock.makefile("wb", buffering=0)
        results.append(outcome(send, src, dst))
        dst.close()
        sock.close()
        sent.append((src.tell(), len(receive_all(peer))))
    assert results[0] == results[1] == (TimeoutError, None)
    assert sent[0][0] == sent[0][1]


@pytest.mark.parametrize("sender", SENDERS)
def test_one_greenlet_at_a_time_may_wait_for_a_socket(small_ends: Ends, sender: str) -> None:
    for send in SENDERS[sender]:
        sending = Sending(small_ends, sender, send)
        others = some_bytes(1 * MiB, seed=1)
        other = small_ends.source("file", others)
        assert outcome(send, other, sending.dst) == (ConcurrentObjectUseError, None)
        arrived = receiver(sending.peer)
        assert sending.result()[0] == "returned"
        sending.close()
        received = arrived.get(timeout=GUARD)
        if send is SENDERS[sender][0]:  # unpatched, a file may stand where it was read to
            # On Linux 6.1 a socket that poll(2) does not call writable may take some bytes more.
            sent = others[: other.tell()]
            before, _, after = received.partition(sent) if sent else (received, b"", b"")
            assert len(received) == 4 * MiB + len(sent)
            assert digest(before + after) == digest(some_bytes(4 * MiB))


def start_receiving(
    ends: Ends, copy: Callable[..., Any], buffering: int = -1
) -> tuple[Any, Any, Any, gevent.Greenlet]:
    """Start *copy* from a peer that has sent something; return when it waits for more."""
    sock, peer = ends.connect()
    peer.sendall(b"x" * 1000)
    path = ends.path()
    dst = ends.enter_context(path.open("wb", buffering=0))
    src = sock.makefile("rb", buffering=buffering)
    receiving = ends.spawn(outcome, copy, src, dst)
    until(lambda: path.exists() and path.stat().st_size == 1000)
    until(lambda: is_waited_for(sock, "read"))
    return sock, peer, (src, dst), receiving


COPIES = [lambda src, dst: shutil.copyfileobj(src, dst), unpatched_copyfileobj]


@pytest.mark.parametrize(
    "happening",
    [
        lambda sock, peer, files: reset(peer),
        lambda sock, peer, files: (files[0].close(), sock.close()),
        lambda sock, peer, files: sock.shutdown(socket.SHUT_RD),
    ],
    ids=["peer resets", "socket closed", "socket shut down"],
)
@pytest.mark.parametrize("buffering", [0])
def test_a_broken_receive_fails_as_unpatched(
    ends: Ends, happening: Callable[..., None], buffering: int
) -> None:
    results = []
    for copy in COPIES:
        sock, peer, files, receiving = start_receiving(ends, copy, buffering)
        happening(sock, peer, files)
        results.append(receiving.get(timeout=GUARD))
        assert files[1].closed or files[1].tell() == 1000
    assert results[0] == results[1]


def test_a_destination_closed_while_the_source_is_waited_for(ends: Ends) -> None:
    results = []
    for copy in COPIES:
        _, peer, (_, dst), receiving = start_receiving(ends, copy, 0)
        dst.close()
        peer.sendall(b"more")
        peer.close()
        results.append(receiving.get(timeout=GUARD))
    assert results[0] == results[1] == (ValueError, None)


@pytest.mark.parametrize("end", ["file", "socket"])
def test_a_socket_closed_while_a_pipe_is_waited_for(ends: Ends, end: str) -> None:
    """Neither end has been asked since when the bytes come."""
    results = []
    for copy in [*COPIES, lambda src, dst: gsplice.copy(src, dst)]:
        if end == "socket" and copy in COPIES:
            continue  # knows file objects only
        src, feeder = ends.pipe(buffering=0)
        sock, _ = ends.connect()
        dst = sock.makefile("wb", buffering=0) if end == "file" else sock
        copying = ends.spawn(outcome, copy, src, dst)
        gevent.sleep(0)  # it runs until it waits for the pipe
        dst.close()
        sock.close()
        feeder.write(b"more")
        feeder.close()
        results.append(copying.get(timeout=GUARD))
    assert set(results) == {(ValueError, None) if end == "file" else (OSError, errno.EBADF)}


def test_a_timed_out_socket_file_refuses_reads_as_unpatched(ends: Ends) -> None:
    for copy in COPIES:
        sock, _ = ends.connect()
        sock.settimeout(0.05)
        src = sock.makefile("rb", buffering=0)
        dst, _ = ends.sink("file")
        assert outcome(copy, src, dst) == (TimeoutError, None)
        assert outcome(copy, src, dst) == (OSError, None)
        assert outcome(src.read, 1) == (OSError, None)


# ---- counters


def test_the_counters_of_a_failed_transfer_are_what_was_delivered(small_ends: Ends) -> None:
    src = small_ends.source("file", some_bytes(4 * MiB))
    sock, peer = small_ends.connect()
    sock.settimeout(0.05)
    with counting() as grown, pytest.raises(TimeoutError):
        sock.sendfile(src)
    sock.close()
    arrived = len(receive_all(peer))
    assert grown.bytes_spliced == arrived == src.tell() > 0
    assert grown.transfers == 1


def test_the_counters_of_a_failed_splice_are_what_was_delivered(small_ends: Ends) -> None:
    src = small_ends.source("bare_tcp", some_bytes(4 * MiB))
    sock, peer = small_ends.connect()
    sock.settimeout(0.05)
    with counting() as grown, pytest.raises(TimeoutError):
        gsplice.copy(src, sock)
    sock.close()
    assert grown.bytes_spliced == len(receive_all(peer)) > 0
    assert grown.transfers == 1
    assert grown.pipes_in_use == 0
    assert grown.pipes_closed == 1  # it still held bytes


def test_a_transfer_that_moved_nothing_is_not_counted(ends: Ends) -> None:
    sock, _ = ends.connect()
    sock.settimeout(0.01)
    with counting() as grown, pytest.raises(TimeoutError):
        gsplice.copy(sock, ends.sink("file")[0])
    assert grown.transfers == grown.bytes_spliced == grown.pipes_in_use == 0


def test_one_call_without_a_pipe_is_one_fallback(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gsplice.config.settings.__dict__, "max_pipes", 0)
    data = some_bytes(MANY)
    dst, finish = ends.sink("tcp")
    # idle pipes of earlier tests would still be lent
    idle = list(iter(gsplice.pipes.acquire, None))
    with counting() as grown:
        assert gsplice.copy(ends.source("bare_tcp", data), dst) == MANY
    for pipe in idle:
        gsplice.pipes.release(pipe)
    assert digest(finish()) == digest(data)
    assert grown.fallbacks == {"no_pipe": 1}


@pytest.mark.parametrize("size", [300 * KiB])
def test_copy_is_honest_about_a_destination_that_has_no_room(size: int) -> None:
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    with open(read_fd, "rb") as reader:
        with io.FileIO(write_fd, "wb") as dst:
            result = outcome(gsplice.copy, io.BytesIO(bytes(size)), dst)
        arrived = len(reader.read())
    assert result == ("returned", arrived) or result == (BlockingIOError, errno.EAGAIN)


@pytest.mark.parametrize("size", [50 * KiB, 2 * MiB])
def test_copy_leaves_a_file_at_what_was_delivered(small_ends: Ends, size: int) -> None:
    src = small_ends.source("file", some_bytes(size))
    sock, peer = small_ends.connect()
    sock.settimeout(0.05)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    with pytest.raises(TimeoutError):
        gsplice.copy(src, sock)
    sock.close()
    assert src.tell() == len(receive_all(peer))


@pytest.mark.parametrize("mover", MOVERS)
def test_what_was_read_ahead_but_not_delivered_is_still_to_be_read(
    small_ends: Ends, tmp_path: Path, mover: str
) -> None:
    path = file_of(tmp_path / "file", 4 * MiB)
    sock, peer = small_ends.connect()
    sock.settimeout(0.05)
    with path.open("rb", buffering=1 * MiB) as src:
        src.read(1)
        with sock.makefile("wb", buffering=0) as dst, pytest.raises(TimeoutError):
            MOVERS[mover](src, dst)
        sock.close()
        assert src.tell() == 1 + len(receive_all(peer))


def test_where_python_lacks_copy_file_range_a_file_goes_by_splice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    path = file_of(tmp_path / "from", 3 * MiB)
    with path.open("rb") as src, (tmp_path / "to").open("wb") as dst, counting() as grown:
        shutil.copyfileobj(src, dst)
    assert digest((tmp_path / "to").read_bytes()) == digest(path.read_bytes())
    assert (grown.bytes_spliced, grown.bytes_copy_file_range) == (3 * MiB, 0)


def test_a_huge_read_ahead_gives_way(tmp_path: Path) -> None:
    size = 16 * MiB
    path = file_of(tmp_path / "from", size)
    turns = []

    def other() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0)

    with path.open("rb", buffering=size - 1) as src, (tmp_path / "to").open("wb") as dst:
        src.read(1)
        running = gevent.spawn(other)
        with counting() as grown:
            shutil.copyfileobj(src, dst)
        running.kill()
    assert digest((tmp_path / "to").read_bytes()) == digest(path.read_bytes()[1:])
    assert grown.bytes_copied >= size - 2
    assert len(turns) >= 7


# ---- gsplice.copy between objects that are not ours


def test_what_is_copied_to_a_buffer_has_arrived_when_the_copy_returns(ends: Ends) -> None:
    path = ends.path()
    sock, peer = ends.connect()
    with path.open("wb") as file, sock.makefile("wb") as sock_file:
        assert gsplice.copy(io.BytesIO(b"x" * 5000), file) == 5000
        assert path.read_bytes() == b"x" * 5000
        assert gsplice.copy(io.BytesIO(b"x" * 5000), sock_file) == 5000
        assert len(peer.recv(5000, socket.MSG_WAITALL)) == 5000


def test_nothing_now_is_not_the_end(ends: Ends) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    with open(read_fd, "rb", buffering=0) as src, open(write_fd, "wb") as still_open:
        with pytest.raises(BlockingIOError):
            gsplice.copy(src, io.BytesIO())
        assert not still_open.closed


def test_a_copy_between_foreign_objects_gives_way() -> None:
    turns: list[int] = []

    def other() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0)

    running = gevent.spawn(other)
    assert gsplice.copy(io.BytesIO(bytes(16 * MiB)), io.BytesIO()) == 16 * MiB
    running.kill()
    assert len(turns) >= 7


@pytest.mark.parametrize("mover", MOVERS)
def test_a_file_into_a_full_blocking_pipe_waits_on_the_hub(tmp_path: Path, mover: str) -> None:
    data = some_bytes(300 * KiB)
    path = file_of(tmp_path / "file", len(data))
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0) as reader, path.open("rb") as src:

        def read_all() -> bytes:
            received = b""
            while len(received) < len(data):
                gevent.socket.wait_read(read_fd)
                received += reader.read(64 * KiB) or b""
            return received

        reading = gevent.spawn(read_all)  # runs only if the copy waits on the hub
        with open(write_fd, "wb") as dst, counting() as grown:
            MOVERS[mover](src, dst)
        assert digest(reading.get(timeout=GUARD)) == digest(data)
    assert grown.fallbacks == {"file_to_pipe": 1}


# ---- who else writes or reads


def test_a_standard_stream_is_left_to_the_original(tmp_path: Path) -> None:
    """A child that logs to it as well loses no line: only write(2) takes the position's lock."""
    file_of(tmp_path / "from", 1 * MiB)
    program = (
        "import sys, shutil, gevent, gsplice; gevent.get_hub(); gsplice.patch_all()\n"
        "shutil.copyfileobj(open(sys.argv[1], 'rb'), sys.stdout.buffer)\n"
        "print(dict(gsplice.stats().fallbacks), file=sys.stderr)"
    )
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "from"], stdout=log, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"{'standard_stream': 1}\n")
    assert (tmp_path / "log").read_bytes() == (tmp_path / "from").read_bytes()


def test_threads_without_a_hub_that_write_to_one_file_lose_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "from", 8 * MiB)
    pool = gevent.get_hub().threadpool
    with (tmp_path / "to").open("wb", buffering=0) as dst, counting() as grown:

        def copy() -> None:
            with path.open("rb") as src:
                shutil.copyfileobj(src, dst)

        gevent.joinall([pool.spawn(copy) for _ in range(4)], raise_error=True)
    assert (tmp_path / "to").stat().st_size == 4 * 8 * MiB
    assert grown.fallbacks == {"other_hub": 4}


def test_another_thread_that_reads_the_same_pipe_never_sees_nothing(tmp_path: Path) -> None:
    answers: list[Any] = []
    for number in range(30):
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb") as src, (tmp_path / str(number)).open("wb") as dst:
            os.write(write_fd, b"x" * 2000)

            def read(src: Any = src) -> None:
                while data := src.read(3):
                    answers.append(data)
                answers.append(data)

            thread = get_original("threading", "Thread")(target=read)
            thread.start()
            get_original("threading", "Timer")(0.002, os.close, [write_fd]).start()
            shutil.copyfileobj(src, dst)
            thread.join()
    assert None not in answers


def test_a_finalizer_may_copy_at_exit(tmp_path: Path) -> None:
    path = file_of(tmp_path / "from", 5 * MiB)
    run_program(
        """
import sys, shutil, gevent, gsplice
gevent.sleep(0)
gsplice.patch_all()
class Copies:
    def __init__(self, src, dst):
        self.ends = open(src, 'rb'), open(dst, 'wb')
    def __del__(self, copy=shutil.copyfileobj):
        copy(*self.ends)
        for end in self.ends:
            end.close()
copies = Copies(*sys.argv[1:])
""",
        path,
        tmp_path / "to",
    )
    assert digest((tmp_path / "to").read_bytes()) == digest(path.read_bytes())


@pytest.mark.few(2)
@pytest.mark.parametrize("loop", ["libev-cext", "libuv"])
@pytest.mark.parametrize("direction", ["from", "into"])
def test_a_blocking_pipe_is_left_blocking(loop: str, direction: str) -> None:
    """The process at its other end, or one that has inherited it, expects it to be."""
    run_program(
        """
import os, sys, gevent, gevent.socket, gsplice
read_fd, write_fd = os.pipe()
ours, theirs = gevent.socket.socketpair()
reader, writer = open(read_fd, 'rb'), open(write_fd, 'wb')
size = 300_000
if sys.argv[1] == 'from':
    copying = gevent.spawn(gsplice.copy, reader, ours, size)
    gevent.sleep(0.01)
    writer.write(b'x' * 1000)
    writer.flush()
    copied = len(theirs.recv(1000))
    assert os.get_blocking(read_fd)
    copying.kill()
else:
    copying = gevent.spawn(gsplice.copy, ours, writer, size)
    theirs.settimeout(0.01)
    try:
        theirs.sendall(bytes(size))  # more than the pipe takes
    except TimeoutError:
        pass
    gevent.sleep(0.01)
    assert os.get_blocking(write_fd)
    copying.kill()
assert os.get_blocking(read_fd) and os.get_blocking(write_fd)
for end in reader, writer, ours, theirs:
    end.close()
""",
        direction,
        GEVENT_LOOP=loop,
    )
