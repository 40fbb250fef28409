"""Files that are written on a thread."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from conftest import (
    counting,
    digest,
    some_bytes,
)
from ends import GUARD, Ends, KiB, MiB, threads_done, until
from slow_disks import Clock, descriptors, kill, moved, time_out, unpatched_copyfileobj
from slowfs import SlowFS
from victims import Victim, assert_clean

import gsplice
from gsplice._ends.small import SMALL_FILE as SMALL

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.parametrize("source", ["bare_unix", "unix", "pipe", "file"])
def test_the_hub_goes_round_while_a_write_is_held(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock, source: str
) -> None:
    data = some_bytes(1 * MiB)
    slow.hold(name, "write")
    with Ends(tmp_path) as ends, counting() as grown:
        src = ends.source(source, data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        clock.goes_on()
        assert not moving.dead
        slow.release(name, "write")
        assert moving.get(timeout=GUARD) == len(data)
        assert dst.tell() == len(data)
    assert digest((slow.directory / name).read_bytes()) == digest(data)
    assert grown.offloads > 0
    assert moved(grown) == len(data)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", [kill, time_out])
def test_ended_while_a_thread_writes(
    slow: SlowFS, tmp_path: Path, name: str, end: Callable[..., None]
) -> None:
    data = some_bytes(1 * MiB)
    assert_clean(tmp_path)
    with Ends(tmp_path) as ends:
        before = descriptors()
        src = ends.source("bare_unix", data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        slow.hold(name, "write")
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        end(moving)
        assert moving.dead
        taken = dst.tell()  # which a thread is still going to write
        slow.release(name, "write")
        threads_done()
        until(lambda: gsplice.stats().pipes_in_use == 0)
    until(lambda: descriptors() <= before)
    assert (slow.directory / name).read_bytes() == data[:taken] != b""
    assert_clean(tmp_path)


@pytest.mark.parametrize("copy", ["patched", "unpatched"])
def test_an_error_of_writing(slow: SlowFS, tmp_path: Path, name: str, copy: str) -> None:
    data = some_bytes(1 * MiB)
    slow.fail("ENOSPC", name, "write", beyond=256 * KiB)
    move = gsplice.copyfileobj if copy == "patched" else unpatched_copyfileobj
    with Ends(tmp_path) as ends:
        src = ends.source("unix", data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        with pytest.raises(OSError) as raised:
            move(src, dst)
        assert raised.value.errno == errno.ENOSPC
        written = (slow.directory / name).read_bytes()
        assert dst.tell() == len(written) <= 256 * KiB
        assert data.startswith(written)


def test_a_file_closed_while_a_thread_writes(slow: SlowFS, tmp_path: Path, name: str) -> None:
    with Ends(tmp_path) as ends:
        src = ends.source("bare_unix", some_bytes(1 * MiB))
        dst = (slow.mount / name).open("wb", 0)
        slow.hold(name, "write")
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        number = dst.fileno()
        dst.close()
        victim = Victim(tmp_path, number)
        slow.release(name, "write")
        with pytest.raises(ValueError, match="closed file"):
            moving.get(timeout=GUARD)
        victim.check()
    assert some_bytes(1 * MiB).startswith((slow.directory / name).read_bytes())


@pytest.mark.parametrize("size", [3000, 256 * KiB])
@pytest.mark.parametrize("source", ["socket", "pipe", "file"])
def test_big_pieces_are_written_to_a_disk_on_a_thread(
    tmp_path: Path, source: str, size: int
) -> None:
    data = some_bytes(size)
    with Ends(tmp_path) as ends:
        dst, finish = ends.sink("file")
        if source == "socket":
            src, peer = ends.connect("unix")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * size)
            assert peer._sock.send(data) == size  # all of it is there from the start
            peer.close()
        elif source == "pipe":
            read_fd, write_fd = os.pipe()
            src = ends.enter_context(open(read_fd, "rb", 0))
            fcntl(write_fd, F_SETPIPE_SZ, 2 * size)
            assert os.write(write_fd, data) == size
            os.close(write_fd)
        else:
            src = ends.source("file", data)
        with counting() as grown:
            assert gsplice.copy(src, dst) == size
        assert dst.tell() == size
        assert digest(finish()) == digest(data)
    assert (grown.offloads > 0) == (size > SMALL)
    assert moved(grown) == size


def test_what_is_written_to_memory_needs_no_thread(tmp_path: Path) -> None:
    data = some_bytes(2 * MiB)
    with Ends(tmp_path) as ends, counting() as grown:
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        dst = ends.enter_context(open(fd, "wb", 0))
        assert gsplice.copy(ends.source("bare_unix", data), dst) == len(data)
        assert digest(os.pread(fd, 3 * MiB, 0)) == digest(data)
        src = ends.enter_context(open(os.dup(fd), "rb"))
        src.seek(0)
        sock, finish = ends.sink("bare_unix")
        assert sock.sendfile(src) == len(data)
        assert digest(finish()) == digest(data)
    assert grown.offloads == 0
    assert grown.bytes_spliced == 2 * len(data)


@pytest.mark.parametrize("place", ["disk", "slow"])
def test_two_writers_to_one_file(slow: SlowFS, tmp_path: Path, name: str, place: str) -> None:
    """Each piece lands in one piece, behind what the other has written."""
    path = (slow.mount if place == "slow" else tmp_path) / name
    records = [bytes([65 + who]) * 99 + b"\n" for who in range(2)]
    with Ends(tmp_path) as ends, counting() as grown:
        dst = ends.enter_context(path.open("wb", 0))
        moving = []
        for record in records:
            ours, theirs = ends.connect("unix")
            ends.spawn(lambda peer, data: (peer.sendall(data), peer.close()), theirs, record * 9000)
            moving.append(ends.spawn(gsplice.copyfileobj, ours.makefile("rb", 0), dst))
        gevent.joinall(moving, timeout=GUARD, raise_error=True)
        assert dst.tell() == 2 * 9000 * 100
    assert grown.offloads > 0
    written = path.read_bytes()
    assert len(written) == 2 * 9000 * 100
    for who in range(2):
        assert written.count(bytes([65 + who])) == 9000 * 99
    assert written.count(b"\n") == 2 * 9000


def test_two_writers_one_of_whom_is_killed(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock
) -> None:
    """The other one waits until the thread has written, and then writes behind that."""
    first, second = some_bytes(100 * KiB), some_bytes(3000, seed=1)
    with Ends(tmp_path) as ends:
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        ours, theirs = ends.connect("unix")
        theirs.sendall(first)
        slow.hold(name, "write")
        killed = ends.spawn(gsplice.copyfileobj, ours.makefile("rb", 0), dst)
        until(lambda: slow.begun(name, "write"))
        other, feeder = ends.connect("unix")
        feeder.sendall(second)
        feeder.close()
        writing = ends.spawn(gsplice.copyfileobj, other.makefile("rb", 0), dst)
        clock.goes_on()
        killed.kill(timeout=GUARD)
        assert killed.dead
        slow.release(name, "write")
        writing.get(timeout=GUARD)
        threads_done()
        assert dst.tell() == len(first + second)
    assert (slow.directory / name).read_bytes() == first + second
