"""Small files in the page cache are copied at once, and what must not be copied so is not."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from bench import Bench
from conftest import counting, file_of, receive_all, some_bytes
from ends import GUARD, Ends, KiB, connection, is_waited_for, until
from unpatched import unpatched_copyfileobj

from gsplice._counters import MOST_NEW_REASONS
from gsplice._move import memory, small_file
from gsplice.config import settings

SIZES = [1, 1000, 4 * KiB - 1, 4 * KiB, 4 * KiB + 1, 8 * KiB, 16 * KiB, 64 * KiB - 1, 64 * KiB]


def written(directory: Path, copy: Callable[..., None], size: int, buffering: int) -> bytes:
    path = directory / "source"
    path.write_bytes(some_bytes(size))
    with open(path, "rb", buffering) as src, open(directory / "copy", "wb", buffering) as dst:
        dst.write(b"before")
        copy(src, dst)
        assert src.tell() == size
        assert src.read() == b""
        dst.write(b"after")
    return (directory / "copy").read_bytes()


@pytest.mark.parametrize("buffering", [-1, 0, 16])
@pytest.mark.parametrize("size", SIZES)
def test_to_a_file(tmp_path: Path, size: int, buffering: int) -> None:
    written(tmp_path, shutil.copyfileobj, size, buffering)  # now the filesystem is known
    wanted = written(tmp_path, unpatched_copyfileobj, size, buffering)
    with counting() as grown:
        assert written(tmp_path, shutil.copyfileobj, size, buffering) == wanted
    assert grown.fallbacks == {"small": 1}
    assert grown.transfers == grown.bytes_copied == grown.offloads == 0


@pytest.mark.parametrize("buffering", [-1, 0])
@pytest.mark.parametrize("size", SIZES)
def test_to_a_socket(ends: Ends, tmp_path: Path, size: int, buffering: int) -> None:
    (tmp_path / "source").write_bytes(some_bytes(size))
    sock, peer = ends.connect()
    received = gevent.spawn(receive_all, peer)
    with open(tmp_path / "source", "rb") as src, counting() as grown:
        with sock.makefile("wb", buffering) as sink:
            shutil.copyfileobj(src, sink)
        assert src.tell() == size
    sock.close()
    assert received.get() == some_bytes(size)
    assert grown.fallbacks == {"small": 1}


@pytest.mark.parametrize("size", [1000, 20_000])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_file_onto_its_own_end(tmp_path: Path, size: int, buffering: int) -> None:
    """What has just been written is read as well: the file grows until it may not grow more."""
    path, left = tmp_path / "file", []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        for copy in (unpatched_copyfileobj, shutil.copyfileobj):
            path.write_bytes(some_bytes(size))
            with open(path, "rb") as src, open(path, "r+b", buffering) as dst:
                dst.seek(size)
                with contextlib.suppress(OSError):
                    copy(src, dst)
            left.append(path.read_bytes())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left[0] == left[1]


@pytest.mark.parametrize("length", [0, -1, 999, 1000, 64 * KiB])
def test_after_an_error_the_source_is_where_the_original_leaves_it(
    tmp_path: Path, length: int
) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(1000))
    left = []
    for copy in (unpatched_copyfileobj, shutil.copyfileobj):
        with open(path, "rb") as src, open("/dev/full", "wb", 0) as full:
            with pytest.raises(OSError) as caught:
                copy(src, full, length)
            left.append((caught.value.errno, src.tell()))
    assert left[0] == left[1]
    assert left[0][0] == errno.ENOSPC


def test_a_file_that_is_not_open_for_reading(tmp_path: Path) -> None:
    """Its descriptor is."""
    path = tmp_path / "source"
    path.write_bytes(bytes(1000))
    for copy in (unpatched_copyfileobj, shutil.copyfileobj):
        with io.FileIO(os.open(path, os.O_RDWR), "w") as src, open(tmp_path / "copy", "wb") as dst:
            with pytest.raises(io.UnsupportedOperation, match="not open for reading"):
                copy(src, dst)
            assert dst.tell() == src.tell() == 0


def test_what_is_appended_while_the_socket_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "source"
    for copy in (unpatched_copyfileobj, shutil.copyfileobj):
        path.write_bytes(bytes(60_001))
        sock, peer = connection(buffers=4 * KiB)

        def copy_it(sock: Any = sock, copy: Callable[..., None] = copy) -> None:
            with sock, sock.makefile("wb") as sink, path.open("rb") as src:
                copy(src, sink)

        copying = gevent.spawn(copy_it)
        until(lambda sock=sock: is_waited_for(sock, "write"))  # type: ignore[misc]
        with path.open("ab") as file:
            file.write(b"more")
        with peer:
            assert receive_all(peer) == bytes(60_001) + b"more"
        copying.get()


def test_with_offload_always_nothing_is_read_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "offload", "always")
    with counting() as grown:
        written(tmp_path, shutil.copyfileobj, 1000, -1)
    assert grown.offloads > 0
    assert grown.fallbacks == {}


def test_what_the_buffer_has_room_for_is_not_written() -> None:
    with open("/dev/null", "wb", 100) as file:
        assert small_file._fits_buffer(file, file.raw, 99)
        assert not small_file._fits_buffer(file, file.raw, 100)
        file.write(bytes(60))
        assert not small_file._fits_buffer(file, file.raw, 41)
        assert not small_file._fits_buffer(file.raw, file.raw, 1)


def test_fallbacks_of_several_threads_are_all_counted(bench: Bench) -> None:
    each = 2 * MOST_NEW_REASONS + 1

    def fall_back() -> None:
        for _ in range(each):
            shutil.copyfileobj(io.BytesIO(), io.BytesIO())

    with counting() as grown:
        for thread in [bench.in_thread(fall_back) for _ in range(4)]:
            thread.get()
    assert grown.fallbacks == {"source_type": 4 * each}


def test_slow_clients_leave_few_buffers(tmp_path: Path) -> None:
    """Each has one as long as it is served."""
    path = file_of(tmp_path / "small", 60 * KiB)
    number = 2 * memory.MOST_BUFFERS
    with Ends(tmp_path, buffers=4 * KiB) as ends, contextlib.ExitStack() as files:
        pairs = [ends.connect("unix") for _ in range(number)]
        moving = [
            ends.spawn(sock.sendfile, files.enter_context(path.open("rb"))) for sock, _ in pairs
        ]
        until(lambda: all(is_waited_for(sock) for sock, _ in pairs))
        receiving = [ends.spawn(receive_all, peer) for _, peer in pairs]
        assert [one.get(timeout=GUARD) for one in moving] == [60 * KiB] * number
        for sock, _ in pairs:
            sock.close()
        assert {one.get(timeout=GUARD) for one in receiving} == {some_bytes(60 * KiB)}
    assert len(memory._buffers) <= memory.MOST_BUFFERS
