"""What is in the page cache, asked of real files on ext4, tmpfs and FUSE."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from cold import FUSE, TMPFS, ReadAhead, assert_on_disk, drop, with_a_cold_file
from conftest import file_of, some_bytes
from ends import KiB, MiB, mounted, until
from slowfs import SlowFS

from gsplice._ends import page_cache
from gsplice._ends.page_cache import COLD_STRETCH, READ_AHEAD, STRIDE, Residency, read_resident
from gsplice._os import linux
from gsplice._os.linux import filesystem_type, in_core
from gsplice.config import settings


def warm(fd: int, offset: int, length: int) -> None:
    """Have that range of a file in the page cache, and nothing read ahead of it."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert len(os.pread(fd, length, offset)) == length


def asked(fd: int) -> Residency:
    """Return what is asked about the file, when a thread has learned its filesystem's type."""
    status = os.fstat(fd)
    page_cache.learn_filesystems_and_run((status.st_dev,), lambda fd: None, fd)
    return Residency(status)


def assert_cached(ready: int, wanted: int) -> None:
    """Pass if *wanted* bytes were ready; where the disk was as fast as we are, begin again."""
    if ready > wanted:
        raise ReadAhead
    assert ready == wanted


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """8 MiB on a disk, all in the page cache."""
    with opened(file_of(tmp_path / "file", 8 * MiB)) as fd:
        assert_on_disk(fd)
        yield fd


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    try:
        os.write(fd, some_bytes(1 * MiB))
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def far(slow: SlowFS, request: pytest.FixtureRequest) -> Iterator[int]:
    """8 MiB on FUSE, none of it in the page cache."""
    name = request.node.name
    file_of(slow.directory / name, 8 * MiB)
    with opened(slow.mount / name) as fd:
        yield fd


# ---- a disk


def test_all_in_the_page_cache(disk: int) -> None:
    cache = asked(disk)
    assert cache.cached(disk, 0, 8 * MiB) == 8 * MiB
    assert cache.cached(disk, 100, 1000) == 1000
    assert cache.cached(disk, 8 * MiB - 5, 5) == 5


@with_a_cold_file
def test_nothing_in_the_page_cache(disk: int) -> None:
    drop(disk)
    cache = asked(disk)
    assert_cached(cache.cached(disk, 0, 8 * MiB), 0)
    assert cache.cached(disk, 5 * MiB, 1) == 0


@with_a_cold_file
def test_it_ends_before_a_hole_in_the_page_cache(disk: int) -> None:
    drop(disk)
    warm(disk, 0, 1 * MiB)
    warm(disk, 2 * MiB, 6 * MiB)
    assert not in_core(disk, 1 * MiB, 1)
    assert_cached(asked(disk).cached(disk, 0, 4 * MiB), 1 * MiB)
    assert_cached(asked(disk).cached(disk, 2 * MiB, 4 * MiB), 4 * MiB)


@with_a_cold_file
def test_each_stride_counts(disk: int) -> None:
    drop(disk)
    warm(disk, 0, 2 * STRIDE)
    warm(disk, 3 * STRIDE, 8 * MiB - 3 * STRIDE)
    assert not in_core(disk, 2 * STRIDE, 1)
    assert_cached(asked(disk).cached(disk, 0, 4 * MiB), 2 * STRIDE)


def test_nobody_can_choose_what_goes_unnoticed(disk: int) -> None:
    """Requests for single bytes leave the pages at the ends of the strides."""
    drop(disk)
    for offset in range(0, 8 * MiB, STRIDE):
        for page in (offset, offset + STRIDE - 4 * KiB):
            warm(disk, page, 4 * KiB)
    assert asked(disk).cached(disk, 0, 8 * MiB) < 8 * MiB


@with_a_cold_file
def test_what_was_only_read_ahead_does_not_count(disk: int) -> None:
    """Its last page may be resident and its next one under way."""
    drop(disk)
    warm(disk, 0, 1 * MiB)
    assert_cached(asked(disk).cached(disk, 0, 512 * KiB), 0)
    warm(disk, 512 * KiB + READ_AHEAD, 4 * KiB)
    assert_cached(asked(disk).cached(disk, 0, 512 * KiB), 512 * KiB)


@with_a_cold_file
def test_nobody_asks_for_a_stretch_where_the_disk_was_met(disk: int) -> None:
    drop(disk)
    cache = asked(disk)
    assert_cached(cache.cached(disk, 0, 1 * MiB), 0)
    warm(disk, 0, 8 * MiB)
    assert cache.cached(disk, COLD_STRETCH - 1, 1 * MiB) == 0
    assert cache.cached(disk, COLD_STRETCH, 1 * MiB) == 1 * MiB


@with_a_cold_file
def test_the_stretch_grows(tmp_path: Path) -> None:
    with opened(file_of(tmp_path / "file", 16 * MiB)) as fd:
        drop(fd)
        cache = asked(fd)
        assert_cached(cache.cached(fd, 0, 1 * MiB), 0)
        assert_cached(cache.cached(fd, COLD_STRETCH, 1 * MiB), 0)
        warm(fd, 0, 16 * MiB)
        assert cache.cached(fd, 3 * COLD_STRETCH - 1, 1 * MiB) == 0
        assert cache.cached(fd, 3 * COLD_STRETCH, 1 * MiB) == 1 * MiB


@pytest.mark.parametrize("believed", [1e9, -1])
@with_a_cold_file
def test_an_answer_is_believed_for_some_time(
    disk: int, believed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "BELIEVED", believed)
    cache = asked(disk)
    assert cache.cached(disk, 0, 4 * MiB) == 4 * MiB
    drop(disk)
    assert_cached(cache.cached(disk, 1 * MiB, 1 * MiB), 1 * MiB if believed > 0 else 0)


def test_at_the_end_and_beyond(disk: int) -> None:
    assert asked(disk).cached(disk, 8 * MiB, 1) == 0
    assert asked(disk).cached(disk, 9 * MiB, 1) == 0
    assert asked(disk).read(disk, 8 * MiB, 10) == b""
    assert asked(disk).read(disk, 8 * MiB - 3, 10) == some_bytes(8 * MiB)[-3:]


@with_a_cold_file
def test_reading(disk: int) -> None:
    cache = asked(disk)
    assert cache.read(disk, 1000, 64 * KiB) == some_bytes(8 * MiB)[1000 : 1000 + 64 * KiB]
    drop(disk)
    assert_cached(len(cache.read(disk, 1000, 64 * KiB) or b""), 0)  # which has it read ahead


@with_a_cold_file
def test_a_read_ends_before_what_is_missing(disk: int) -> None:
    drop(disk)
    warm(disk, 0, 32 * KiB)
    read = read_resident(disk, 0, 64 * KiB)
    assert read is not None
    assert_cached(len(read), 32 * KiB)
    assert read == some_bytes(8 * MiB)[: 32 * KiB]


def test_a_bad_descriptor_raises_in_reading_only(tmp_path: Path) -> None:
    with opened(file_of(tmp_path / "file", 100), os.O_WRONLY) as fd:
        assert asked(fd).cached(fd, 0, 100) == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_resident(fd, 0, 100)


# ---- in memory


def test_tmpfs_needs_no_disk(memory: int) -> None:
    assert filesystem_type(memory) == TMPFS
    cache = asked(memory)
    assert cache.cached(memory, 0, 1 * MiB) == 1 * MiB
    assert cache.read(memory, 5, 10) == some_bytes(1 * MiB)[5:15]


def test_the_kernels_own_files_need_no_disk() -> None:
    with opened(Path("/proc/self/status"), os.O_RDONLY) as fd:
        assert asked(fd).cached(fd, 0, 1) == 1


def test_a_type_is_not_asked_for_on_the_hub(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On FUSE, statfs(2) waits for the server."""
    monkeypatch.setattr(page_cache, "_types", {})
    cache = Residency(os.fstat(memory))
    assert cache.cached(memory, 0, 1) == 0
    assert cache.read(memory, 0, 1) is None
    assert cache.write_may_wait(1)
    asked(memory)
    assert cache.cached(memory, 0, 1) == 1
    assert not cache.write_may_wait(1)
    monkeypatch.setattr(page_cache, "TYPE_BELIEVED", -1)
    assert cache.write_may_wait(1)


# ---- FUSE, where RWF_NOWAIT has no answer


def test_fuse_has_no_answer_of_its_own(far: int) -> None:
    assert filesystem_type(far) == FUSE
    with pytest.raises(OSError, match="not supported"):
        read_resident(far, 0, 1)


def test_fuse_is_not_asked(far: int) -> None:
    """What mmap(2) and munmap(2) do there may need the server."""
    warm(far, 0, 8 * MiB)
    assert asked(far).cached(far, 0, 1 * MiB) == 0
    assert asked(far).read(far, 0, 100) is None
    assert asked(far).close_may_wait()


def test_overlayfs_in_the_page_cache_or_not(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    file_of(tmp_path / "lower" / "file", 8 * MiB)
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with (
        mounted(tmp_path / "merged", "-t", "overlay", "-o", layers, "overlay"),
        opened(tmp_path / "lower" / "file") as below,
        opened(tmp_path / "merged" / "file", os.O_RDONLY) as fd,
    ):
        drop(below)
        assert asked(fd).cached(fd, 0, 1 * MiB) == 0
        assert asked(fd).read(fd, 0, 100) is None
        warm(fd, 0, 8 * MiB)
        assert asked(fd).cached(fd, 0, 8 * MiB) == 8 * MiB
        assert asked(fd).cached(fd, 4097, 1000) == 1000
        assert asked(fd).read(fd, 4097, 1000) == some_bytes(8 * MiB)[4097:5097]


def test_each_page_counts(far: int) -> None:
    warm(far, 0, 1 * MiB)
    assert in_core(far, 0, 1 * MiB)
    assert in_core(far, 5000, 1)
    os.posix_fadvise(far, 512 * KiB, 4 * KiB, os.POSIX_FADV_DONTNEED)
    assert not in_core(far, 0, 1 * MiB)
    assert in_core(far, 0, 512 * KiB)
    assert not in_core(far, 0, 512 * KiB + 1)
    assert not in_core(far, 512 * KiB + 4095, 2)
    assert in_core(far, 516 * KiB, 1)


def test_pages_under_way_do_not_count(slow: SlowFS, far: int) -> None:
    """They are in the page cache, but whoever reads them waits for the filesystem."""
    name = os.path.basename(os.readlink(f"/proc/self/fd/{far}"))
    slow.hold(name)
    reading = gevent.get_hub().threadpool.spawn(os.pread, far, 64 * KiB, 0)
    until(lambda: slow.begun(name))
    try:
        assert not in_core(far, 0, 4 * KiB)
    finally:
        slow.release(name)
    assert reading.get() == some_bytes(8 * MiB)[: 64 * KiB]
    assert in_core(far, 0, 64 * KiB)


def test_nothing_is_in_core_that_can_not_be_mapped(tmp_path: Path) -> None:
    with opened(file_of(tmp_path / "file", 8 * KiB), os.O_WRONLY) as fd:
        assert not in_core(fd, 0, 4 * KiB)
    assert not in_core(-1, 0, 4 * KiB)
    read_end, write_end = os.pipe()
    try:
        assert not in_core(read_end, 0, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_asking_leaves_no_mapping(far: int) -> None:
    path = os.readlink(f"/proc/self/fd/{far}")
    assert not in_core(far, 0, 8 * MiB)
    assert path not in Path("/proc/self/maps").read_text()


def test_without_ctypes_nothing_is_known(
    far: int, disk: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "_libc", None)  # as it is where that can't be imported
    monkeypatch.setattr(page_cache, "_types", {})
    warm(far, 0, 8 * KiB)
    assert filesystem_type(memory) is None
    assert asked(far).cached(far, 0, 4 * KiB) == 0
    assert asked(disk).cached(disk, 0, 8 * MiB) == 8 * MiB
    assert asked(memory).write_may_wait(1)


# ---- the policy


@pytest.mark.parametrize(("policy", "resident"), [("never", 1 * MiB), ("always", 0)])
def test_a_policy_asks_nobody(
    disk: int, policy: str, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "offload", policy)
    for is_warm in (True, False):
        if not is_warm:
            drop(disk)
        assert asked(disk).cached(disk, 0, 1 * MiB) == resident
        assert asked(disk).write_may_wait(1) == (policy == "always")
        data = asked(disk).read(disk, 0, 10)
        assert data == (some_bytes(8 * MiB)[:10] if policy == "never" else None)
        os.pread(disk, 1, 0)


# ---- writing


def test_big_pieces_wait_for_a_disk(disk: int) -> None:
    assert not asked(disk).write_may_wait(64 * KiB)
    assert asked(disk).write_may_wait(64 * KiB + 1)


def test_no_piece_waits_in_memory(memory: int) -> None:
    assert not asked(memory).write_may_wait(2 * MiB)


def test_every_piece_waits_for_fuse(far: int) -> None:
    assert asked(far).write_may_wait(1)
