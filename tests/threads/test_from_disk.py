"""A thread that fills and drains, from a file on a disk to a socket."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import gevent
import gevent.os
import gevent.socket
import pytest
from cold import with_a_cold_file
from conftest import counting, digest, file_of, some_bytes
from ends import GUARD, Ends, KiB, MiB, until
from gevent.os import waitpid
from slow_disks import Clock, cold, needed_a_thread
from slowfs import SlowFS

import gsplice
from gsplice._ends import page_cache
from gsplice._ends.socket import Socket
from gsplice._move import from_disk, memory
from gsplice._move.from_disk import _Outlet
from gsplice._pool.pipe import Pipe

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that holds 1000 bytes, which need not be taken out."""
    found = gsplice.pipes.acquire()
    assert found is not None
    os.write(found.write_fd, bytes(1000))
    found.pending = 1000
    yield found
    gsplice.pipes.release(found)


@pytest.fixture
def size(slow: SlowFS, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make a file that one job sends in many pieces; return its size."""
    monkeypatch.setattr(from_disk, "COLD_PIECE", 16 * KiB)
    monkeypatch.setattr(from_disk, "LONG", GUARD)
    file_of(slow.directory / name, 512 * KiB)
    return 512 * KiB


def test_one_job_sends_several_pieces(slow: SlowFS, tmp_path: Path, name: str, size: int) -> None:
    """While the thread waits for the next piece, those before have arrived."""
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src, counting() as grown:
        sock, peer = ends.connect("unix")
        slow.hold(name, beyond=128 * KiB)
        before = gsplice.stats().offloads
        moving = ends.spawn(sock.sendfile, src)
        received = bytearray()
        with gevent.Timeout(GUARD):
            while len(received) < 32 * KiB:
                received += peer.recv(1 * MiB)
        assert gsplice.stats().offloads == before + 1
        slow.release(name)
        with gevent.Timeout(GUARD):
            while len(received) < size:
                received += peer.recv(1 * MiB)
        assert moving.get(timeout=GUARD) == size == src.tell()
    assert digest(bytes(received)) == digest(some_bytes(size))
    assert grown.bytes_spliced == size


def test_what_a_thread_has_sent_counts_when_its_greenlet_is_killed(
    slow: SlowFS, tmp_path: Path, name: str, size: int
) -> None:
    """It is in the middle of a read then, and sends nothing of that."""
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src, counting() as grown:
        sock, peer = ends.connect("unix")
        slow.hold(name, beyond=128 * KiB)
        moving = ends.spawn(sock.sendfile, src)
        with gevent.Timeout(GUARD):
            received = peer.recv(16 * KiB)
        until(lambda: slow.begun(name))
        moving.kill()
        position = src.tell()
        assert position > 0
        slow.release(name)
        sock.close()
        with gevent.Timeout(GUARD):
            while data := peer.recv(1 * MiB):
                received += data
        assert digest(received) == digest(some_bytes(size)[:position])
    assert grown.bytes_spliced == position


def test_a_greenlet_that_has_gone_sends_nothing(tmp_path: Path, pipe: Pipe) -> None:
    with Ends(tmp_path) as ends:
        sock, peer = ends.connect("unix")
        outlet = _Outlet(Socket(None, None, sock))
        outlet.leave_to_thread()
        outlet.drain(pipe, 1000)
        assert (outlet.sent, outlet.pending) == (0, 1000)
        sock.close()
        assert peer.recv(1) == b""


def test_the_number_of_a_closed_socket_is_anothers(tmp_path: Path, pipe: Pipe) -> None:
    with Ends(tmp_path) as ends:
        sock, _ = ends.connect("unix")
        other, peer = ends.connect("unix")
        outlet = _Outlet(Socket(None, None, sock))
        keep = os.dup(sock.fileno())
        os.dup2(other.fileno(), sock.fileno())
        outlet.drain(pipe, 1000)
        assert (outlet.sent, outlet.pending) == (0, 1000)
        os.dup2(keep, sock.fileno())
        os.close(keep)
        other.close()
        assert peer.recv(1) == b""


def test_a_fork_while_the_thread_is_in_a_splice(tmp_path: Path) -> None:
    """In the child nobody would ever give the lock back."""
    with Ends(tmp_path) as ends:
        outlet = _Outlet(Socket(None, None, ends.connect("unix")[0]))
        with outlet._lock:
            pid = gevent.os.fork_gevent()
            if pid == 0:
                signal.alarm(GUARD)
                outlet.leave_to_thread()
                os._exit(0)
        assert waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("size", [5000, 64 * KiB])
def test_a_fast_disk_needs_no_thread_for_a_small_file(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub serves others until the bytes are there."""
    monkeypatch.setattr(memory, "SOON", GUARD)
    monkeypatch.setattr(page_cache, "_slow_until", {})
    path = cold(tmp_path / "cold", size)
    clock = Clock()
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        assert dst.sendfile(src) == size == src.tell()
        assert digest(finish()) == digest(some_bytes(size))
    clock.greenlet.kill()
    assert grown.bytes_copied == size
    assert grown.offloads == 0


@with_a_cold_file
def test_a_slow_disk_is_left_to_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold(tmp_path / "cold", 64 * KiB)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        monkeypatch.setattr(page_cache, "SLOW", GUARD)
        page_cache.Residency(os.fstat(src.fileno())).note_slow()
        try:
            dst, finish = ends.sink("bare_unix")
            assert dst.sendfile(src) == 64 * KiB
        finally:
            page_cache._slow_until.clear()
        assert digest(finish()) == digest(some_bytes(64 * KiB))
    assert grown.bytes_copied == 64 * KiB
    needed_a_thread(grown)
