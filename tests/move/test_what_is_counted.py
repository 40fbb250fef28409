"""The counters say what was delivered, also after an error and without a pipe."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
from pathlib import Path

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    receive_all,
    some_bytes,
)
from ends import MOVERS, Ends, KiB, MiB
from pairs import MANY, outcome

import gsplice


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
