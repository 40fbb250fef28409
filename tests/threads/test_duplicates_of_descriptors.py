"""What the descriptors that a thread has for itself must not do."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from fcntl import LOCK_EX, lockf
from pathlib import Path

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    some_bytes,
)
from ends import GUARD, Ends, KiB, MiB, threads_done, until
from slow_disks import cold
from slowfs import SlowFS

import gsplice
from gsplice._threads import descriptor
from gsplice.config import settings

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.parametrize("end", ["source", "sink"])
def test_a_lock_outlives_a_copy(tmp_path: Path, end: str) -> None:
    """Closing any descriptor of a file drops the locks that the process has on it: fcntl(2)."""
    path = cold(tmp_path / "from", 3 * MiB)
    with path.open("rb+") as src, (tmp_path / "to").open("wb") as dst, counting() as grown:
        locked = src if end == "source" else dst
        lockf(locked, LOCK_EX)
        gsplice.copyfileobj(src, dst)
        other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'rb+'), 6)  # LOCK_EX | LOCK_NB"
        refused = subprocess.run([sys.executable, "-c", other, locked.name], capture_output=True)
        assert b"BlockingIOError" in refused.stderr
        kept = len(descriptor._kept_for_locks)
    assert grown.offloads > 0
    assert kept == 1
    with path.open("rb") as src, (tmp_path / "to2").open("wb") as dst:
        gsplice.copyfileobj(src, dst)  # closes what was kept
    assert not descriptor._kept_for_locks


@pytest.mark.parametrize("times", [1, 3])
def test_a_locked_file_costs_one_descriptor_however_often_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    path = file_of(tmp_path / "from", 300 * KiB)
    monkeypatch.setattr(settings, "offload", "always")
    with path.open("rb+") as src, counting() as grown:
        lockf(src, LOCK_EX)
        for _ in range(times):
            src.seek(0)
            with Ends(tmp_path) as ends:
                sock, finish = ends.sink("bare_unix")
                assert sock.sendfile(src) == 300 * KiB
                assert digest(finish()) == digest(some_bytes(300 * KiB))
        until(lambda: len(descriptor._kept_for_locks) == 1)
    assert grown.offloads >= times


def test_a_lock_outlives_a_read_of_a_fuse_file(tmp_path: Path) -> None:
    """mmap.mmap() makes a duplicate, too, and closes it."""
    size = 300 * KiB
    with SlowFS(tmp_path) as slow:
        file_of(slow.directory / "file", size)
        with (slow.mount / "file").open("rb+") as src, counting() as grown, Ends(tmp_path) as ends:
            lockf(src, LOCK_EX)
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size
            assert digest(finish()) == digest(some_bytes(size))
            other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'rb+'), 6)"
            refused = subprocess.run([sys.executable, "-c", other, src.name], capture_output=True)
            assert b"BlockingIOError" in refused.stderr
        with (slow.mount / "file").open("rb") as src, Ends(tmp_path) as ends:
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size  # closes what was kept
            finish()
            threads_done()
    assert grown.offloads > 0
    assert grown.bytes_spliced == size


def test_what_must_not_be_cached_is_read_anew(tmp_path: Path) -> None:
    size = 300 * KiB
    with SlowFS(tmp_path, "--direct-io") as slow:
        file_of(slow.directory / "file", size)
        with (slow.mount / "file").open("rb") as src, counting() as grown:
            for seed in (0, 1):
                file_of(slow.directory / "file", size, seed)
                src.seek(0)
                with Ends(slow.control) as ends:
                    sock, finish = ends.sink("bare_unix")
                    assert sock.sendfile(src) == size
                    assert digest(finish()) == digest(some_bytes(size, seed))
    assert grown.bytes_copied == 2 * size
    assert grown.offloads > 0


@pytest.mark.parametrize("place", ["same", "across"])
def test_two_files_copied_into_one_leave_no_hole(tmp_path: Path, place: str) -> None:
    size = 5 * MiB
    with contextlib.ExitStack() as stack:
        where = tmp_path
        if place == "across":
            where = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        paths = [file_of(where / str(seed), size, seed) for seed in range(2)]
        with (tmp_path / "to").open("wb", 0) as dst, counting() as grown:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            copying = [gevent.spawn(gsplice.copyfileobj, src, dst) for src in files]
            gevent.joinall(copying, timeout=GUARD, raise_error=True)
    got = (tmp_path / "to").read_bytes()
    assert len(got) == 2 * size
    pieces = [got[at : at + MiB] for at in range(0, len(got), MiB)]
    contents = (some_bytes(size, seed) for seed in range(2))
    assert sorted(pieces) == sorted(
        data[at : at + MiB] for data in contents for at in range(0, size, MiB)
    )
    assert grown.offloads > 0
