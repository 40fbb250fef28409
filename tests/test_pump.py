"""From a socket to a slow disk: a thread goes on filling and draining while the greenlet waits."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.os
import pytest
from conftest import counting, some_bytes
from ends import GUARD, Ends, KiB, MiB, is_waited_for, threads_done, until
from gevent import GreenletExit
from gevent.monkey import get_original
from slowfs import SlowFS

import gsplice
from gsplice._pump import _Tap
from gsplice.recognise import sink, source

waitpid = get_original("os", "waitpid")  # gevent's may lose a child under libuv

#: Jobs for closing what the thread had of a file of a filesystem that is told of each close.
CLOSING = 1

FIRST, SECOND = some_bytes(100 * KiB, 1), some_bytes(150 * KiB, 2)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowFS]:
    with SlowFS(tmp_path_factory.mktemp("slow")) as filesystem:
        yield filesystem


class Held(Ends):
    """A copy from a socket to a file: FIRST is held up on its way to the disk, SECOND is there."""

    def __init__(
        self,
        directory: Path,
        slow: SlowFS,
        copy: Callable[[Any, Any], Any] = gsplice.copy,
        second: bytes = SECOND,
        kind: str = "unix",
    ) -> None:
        super().__init__(directory)
        self.slow = slow
        self.name = directory.name
        self.sock, self.peer = self.connect(kind)
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MiB)
        self.dst = self.enter_context((slow.mount / self.name).open("wb", 0))
        slow.hold(self.name, "write")
        assert self.peer._sock.send(FIRST) == len(FIRST)
        self.moving = self.spawn(copy, self.sock, self.dst)
        until(lambda: slow.begun(self.name, "write"))
        assert self.peer._sock.send(second) == len(second)

    def release(self) -> None:
        self.slow.release(self.name, "write")

    def written(self) -> bytes:
        threads_done()
        return (self.slow.directory / self.name).read_bytes()


@pytest.fixture(autouse=True)
def threads_idle(no_pipe_lost: None) -> Iterator[None]:
    yield
    threads_done()
    until(lambda: gsplice.stats().pipes_in_use == 0)


def test_one_trip_for_all_there_is(slow: SlowFS, tmp_path: Path) -> None:
    with counting() as grown, Held(tmp_path, slow) as held:
        held.peer.shutdown(socket.SHUT_WR)
        held.release()
        assert held.moving.get(timeout=GUARD) == len(FIRST + SECOND)
        assert held.dst.tell() == len(FIRST + SECOND)
        assert held.written() == FIRST + SECOND
    assert grown.bytes_spliced == len(FIRST + SECOND)
    assert grown.offloads == 1 + CLOSING


def test_no_more_than_was_asked_for(slow: SlowFS, tmp_path: Path) -> None:
    count = len(FIRST) + 1000

    def copy(src: Any, dst: Any) -> int:
        return gsplice.copy(src, dst, count)

    with counting() as grown, Held(tmp_path, slow, copy) as held:
        held.release()
        assert held.moving.get(timeout=GUARD) == held.dst.tell() == count
        assert held.written() == (FIRST + SECOND)[:count]
        assert held.sock.recv(MiB, socket.MSG_WAITALL | socket.MSG_PEEK)[:10] == SECOND[1000:1010]
    assert grown.offloads == 1 + CLOSING


@pytest.mark.parametrize("end", ["killed", "timed out"])
@pytest.mark.usefixtures("quiet")
def test_nothing_more_is_taken_when_the_greenlet_has_gone(
    slow: SlowFS, tmp_path: Path, end: str
) -> None:
    """Whoever reads from the socket next gets all that follows."""
    with Held(tmp_path, slow) as held:
        held.moving.kill(GreenletExit if end == "killed" else gevent.Timeout, timeout=GUARD)
        held.release()
        held.peer.shutdown(socket.SHUT_WR)
        assert held.written() == FIRST
        assert b"".join(iter(lambda: held.sock.recv(MiB), b"")) == SECOND


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("closed", ["sock", "dst"])
def test_nothing_more_is_taken_when_an_end_has_been_closed(
    slow: SlowFS, tmp_path: Path, closed: str
) -> None:
    with Held(tmp_path, slow) as held:
        getattr(held, closed).close()
        held.release()
        with pytest.raises((OSError, ValueError), match=r"Bad file descriptor|closed"):
            held.moving.get(timeout=GUARD)
        assert held.written() == FIRST


@pytest.mark.usefixtures("quiet")
def test_a_connection_that_is_reset(slow: SlowFS, tmp_path: Path) -> None:
    with counting() as grown, Held(tmp_path, slow, second=b"x", kind="tcp") as held:
        linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])
        held.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        held.peer.close()
        held.release()
        with pytest.raises(ConnectionResetError):
            held.moving.get(timeout=GUARD)
        assert held.written() == FIRST + b"x"
        assert held.dst.tell() == len(FIRST) + 1
    assert grown.bytes_spliced == len(FIRST) + 1


def test_it_goes_on_after_a_pause(slow: SlowFS, tmp_path: Path) -> None:
    """What comes later is waited for on the hub, not on the thread."""
    with counting() as grown, Held(tmp_path, slow) as held:
        held.release()
        until(lambda: is_waited_for(held.sock, "read"))
        assert gsplice.stats().pipes_in_use == 0
        assert held.written() == FIRST + SECOND
        held.peer.sendall(FIRST)
        held.peer.shutdown(socket.SHUT_WR)
        assert held.moving.get(timeout=GUARD) == len(FIRST + SECOND + FIRST)
        assert held.written() == FIRST + SECOND + FIRST
    assert grown.offloads == 2 + CLOSING


def test_a_fork_while_the_thread_is_at_work(slow: SlowFS, tmp_path: Path) -> None:
    """The child's copy ends with an error, and takes nothing from the parent's socket."""
    with Held(tmp_path, slow) as held:
        pid = gevent.os.fork_gevent()  # without a watcher: the child is ours to wait for
        if pid == 0:
            end = 1
            try:
                with gevent.Timeout(GUARD):
                    held.moving.join()
                end = getattr(held.moving.exception, "errno", 2)
            finally:
                os._exit(end)
        assert os.waitstatus_to_exitcode(waitpid(pid, 0)[1]) == errno.ECANCELED
        held.peer.shutdown(socket.SHUT_WR)
        held.release()
        assert held.moving.get(timeout=GUARD) == len(FIRST + SECOND)
        assert held.written() == FIRST + SECOND


def test_a_fork_while_the_thread_is_in_a_splice(tmp_path: Path) -> None:
    """In the child nobody would ever give the lock back."""
    with Ends(tmp_path) as ends:
        tap = _Tap(source(ends.source("unix", b"")), sink(ends.sink("file")[0]), 1)
        with tap._lock:
            pid = gevent.os.fork_gevent()
            if pid == 0:
                signal.alarm(GUARD)
                tap.lent = True
                os._exit(0)
        assert waitpid(pid, 0)[1] == 0
