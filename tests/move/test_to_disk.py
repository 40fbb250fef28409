"""From a socket to a slow disk: a thread goes on filling and draining while the greenlet waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.os
import pytest
from conftest import counting, some_bytes
from ends import GUARD, Ends, KiB, MiB, file_size_limit, is_waited_for, threads_done, until
from gevent import GreenletExit
from gevent.monkey import get_original
from slowfs import SlowFS

import gsplice
from gsplice._ends import page_cache, recognise
from gsplice._ends.socket import Socket
from gsplice._move import to_disk
from gsplice._move.move import move
from gsplice._move.to_disk import _RevocableSocket
from gsplice._move.transfer import Transfer
from gsplice._threads import workers
from gsplice._threads.threads import Threads

waitpid = get_original("os", "waitpid")  # gevent's may lose a child under libuv

pytestmark = pytest.mark.usefixtures("threads_idle")

#: Jobs for closing what the thread had of a file of a filesystem that is told of each close.
CLOSING = 1

#: In place of the file that bytes go to.
OPEN: Any = SimpleNamespace(raw=SimpleNamespace(closed=False))

#: More than a small pipe holds.
DATA = some_bytes(250 * KiB)


class Held(Ends):
    """A copy from a socket to a file, whose first piece is held up on its way to the disk."""

    def __init__(
        self,
        directory: Path,
        slow: SlowFS,
        copy: Callable[[Any, Any], Any] = gsplice.copy,
        kind: str = "unix",
    ) -> None:
        super().__init__(directory)
        self.slow = slow
        self.name = directory.name
        self.sock, self.peer = self.connect(kind)
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MiB)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MiB)
        self.dst = self.enter_context((slow.mount / self.name).open("wb", 0))
        slow.hold(self.name, "write")
        self.peer.sendall(DATA)
        until(lambda: held_by(self.sock) == len(DATA))
        self.moving = self.spawn(copy, self.sock, self.dst)
        until(lambda: slow.begun(self.name, "write"))
        assert 0 < held_by(self.sock) < len(DATA)

    def release(self) -> None:
        self.slow.release(self.name, "write")

    def written(self) -> bytes:
        threads_done()
        return (self.slow.directory / self.name).read_bytes()

    def rest(self) -> bytes:
        """Return what is left in the socket."""
        self.peer.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: self.sock.recv(MiB), b""))


def held_by(sock: Any) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.fixture(autouse=True)
def small_pipe(no_pipe_lost: None) -> Iterator[None]:
    """The next pipe to be lent holds less than DATA."""
    pipe = gsplice.pipes.acquire()
    assert pipe is not None
    fcntl.fcntl(pipe.write_fd, fcntl.F_SETPIPE_SZ, 64 * KiB)
    gsplice.pipes.release(pipe)
    yield
    with contextlib.suppress(OSError, ValueError):  # it is closed
        fcntl.fcntl(pipe.write_fd, fcntl.F_SETPIPE_SZ, pipe.capacity)


def test_one_trip_for_all_there_is(slow: SlowFS, tmp_path: Path) -> None:
    with counting() as grown, Held(tmp_path, slow) as held:
        held.peer.shutdown(socket.SHUT_WR)
        held.release()
        assert held.moving.get(timeout=GUARD) == held.dst.tell() == len(DATA)
        assert held.written() == DATA
    assert grown.bytes_spliced == len(DATA)
    assert grown.offloads == 1 + CLOSING


def test_no_more_than_was_asked_for(slow: SlowFS, tmp_path: Path) -> None:
    count = len(DATA) - 1000

    def copy(src: Any, dst: Any) -> int:
        return gsplice.copy(src, dst, count)

    with counting() as grown, Held(tmp_path, slow, copy) as held:
        held.release()
        assert held.moving.get(timeout=GUARD) == held.dst.tell() == count
        assert held.written() == DATA[:count]
        assert held.rest() == DATA[count:]
    assert grown.offloads == 1 + CLOSING


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", ["killed", "timed out"])
def test_nothing_more_is_taken_when_the_greenlet_has_gone(
    slow: SlowFS, tmp_path: Path, end: str
) -> None:
    """What has been taken is written, and the file stands behind it; the rest is still there."""
    with Held(tmp_path, slow) as held:
        held.moving.kill(GreenletExit if end == "killed" else gevent.Timeout, timeout=GUARD)
        stands = held.dst.tell()
        held.release()
        assert held.written() == DATA[:stands]
        assert held.rest() == DATA[stands:] != b""


@pytest.mark.usefixtures("quiet")
def test_a_copy_that_is_taken_up_again(slow: SlowFS, tmp_path: Path) -> None:
    with Held(tmp_path, slow) as held:
        held.moving.kill(gevent.Timeout, timeout=GUARD)
        again = held.spawn(gsplice.copy, held.sock, held.dst)
        held.peer.shutdown(socket.SHUT_WR)
        gevent.sleep(0)
        held.release()
        again.get(timeout=GUARD)
        assert held.written() == DATA


class Counted(Socket):
    """Part of a stream, as the body of a message is."""

    __slots__ = ("remains",)

    def remaining(self) -> int:
        return self.remains

    def note_taken(self, number: int) -> None:
        self.remains -= number


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", ["killed", "not killed"])
def test_what_a_thread_may_take_counts_as_taken_meanwhile(
    slow: SlowFS, tmp_path: Path, end: str
) -> None:
    """Whoever else reads the same body then does not read on into the next message."""
    src: Any = None

    def copy(sock: Any, dst: Any) -> None:
        nonlocal src
        src = Counted(None, None, sock)
        src.remains = len(DATA) - 1000
        move(Transfer(src, recognise.sink(dst)))

    with Held(tmp_path, slow, copy) as held:
        assert src.remains == 0
        if end == "killed":
            held.moving.kill(timeout=GUARD)
            assert 0 < src.remains == len(DATA) - 1000 - held.dst.tell()
        held.release()
        held.moving.join(GUARD)
        assert held.written() == DATA[: len(DATA) - 1000 - src.remains]
        assert held.rest() == DATA[len(DATA) - 1000 - src.remains :]


def test_somebody_else_writes_meanwhile(slow: SlowFS, tmp_path: Path) -> None:
    """It comes behind what the thread has in hand, without a hole."""
    with Held(tmp_path, slow) as held:
        stands = held.dst.tell()
        held.release()
        held.dst.write(b"somebody else's")
        held.peer.shutdown(socket.SHUT_WR)
        held.moving.get(timeout=GUARD)
        before, _, after = held.written().partition(b"somebody else's")
        assert len(before) >= stands
        assert before + after == DATA


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("closed", ["sock", "dst"])
def test_an_end_is_closed(slow: SlowFS, tmp_path: Path, closed: str) -> None:
    """A file gets what was there already; the peer of a socket learns of it at once."""
    with Held(tmp_path, slow) as held:
        if closed == "sock":
            held.sock.close()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                held.peer.recv(1)  # bytes had not been read
                held.peer.send(b"x")
        else:
            held.dst.close()
        held.peer.close()
        held.release()
        if closed == "sock":
            with pytest.raises(OSError, match="Bad file descriptor"):
                held.moving.get(timeout=GUARD)
        else:
            assert held.moving.get(timeout=GUARD) == len(DATA)
        written = held.written()
        assert written and DATA.startswith(written)
        assert (written == DATA) == (closed == "dst")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("closed", ["", "sock"])
def test_the_disk_is_full_and_an_end_is_closed(slow: SlowFS, tmp_path: Path, closed: str) -> None:
    """What has been written counts, and the error is the disk's, whoever has closed the source."""
    room = 40 * KiB  # less than what the pipe holds when the thread begins
    with file_size_limit(room), counting() as grown, Held(tmp_path, slow) as held:
        if closed:
            held.sock.close()
        held.release()
        with pytest.raises(OSError) as caught:
            held.moving.get(timeout=GUARD)
        assert caught.value.errno == errno.EFBIG
        assert held.dst.tell() == room
        assert held.written() == DATA[:room]
    assert grown.bytes_spliced == room


def test_the_number_of_a_closed_socket_is_anothers(tmp_path: Path) -> None:
    """A thread may see that a moment after it has asked for the number."""
    with Ends(tmp_path) as ends:
        sock, _ = ends.connect("unix")
        other, peer = ends.connect("unix")
        peer.sendall(b"not for them")
        revocable = _RevocableSocket(Socket(None, None, sock), OPEN, 100)
        keep = os.dup(sock.fileno())
        os.dup2(other.fileno(), sock.fileno())
        pipe = gsplice.pipes.acquire()
        assert pipe is not None
        assert revocable.fill(pipe, -1, MiB) == revocable.taken == 0
        gsplice.pipes.release(pipe)
        os.dup2(keep, sock.fileno())
        os.close(keep)
        assert other.recv(100) == b"not for them"


def test_a_thread_leaves_a_closed_body_to_its_greenlet(tmp_path: Path) -> None:
    """What a library makes of the error has no business on a thread."""

    class Closing(Socket):
        def fileno(self) -> int:
            threads.append(get_original("_thread", "get_ident")())
            return super().fileno()

    threads: list[int] = []
    with Ends(tmp_path) as ends:
        sock, _ = ends.connect("unix")
        raw = sock.makefile("rb", buffering=0)
        revocable = _RevocableSocket(Closing(raw, raw, sock), OPEN, 100)
        raw.close()
        threads.clear()
        pipe = gsplice.pipes.acquire()
        assert pipe is not None
        assert revocable.fill(pipe, -1, MiB) == revocable.taken == 0
        gsplice.pipes.release(pipe)
    assert not threads


@pytest.mark.usefixtures("quiet")
def test_a_connection_that_is_reset(slow: SlowFS, tmp_path: Path) -> None:
    with counting() as grown, Held(tmp_path, slow, kind="tcp") as held:
        linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])
        held.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        held.peer.close()
        held.release()
        with pytest.raises(ConnectionResetError):
            held.moving.get(timeout=GUARD)
        assert DATA.startswith(held.written())
        assert held.dst.tell() == len(held.written())
    assert grown.bytes_spliced == len(held.written())


def test_it_goes_on_after_a_pause(slow: SlowFS, tmp_path: Path) -> None:
    """What comes later is waited for on the hub, not on the thread."""
    with counting() as grown, Held(tmp_path, slow) as held:
        held.release()
        until(lambda: is_waited_for(held.sock, "read"))
        assert gsplice.stats().pipes_in_use == 0
        assert held.written() == DATA
        held.peer.sendall(DATA[:1000])
        held.peer.shutdown(socket.SHUT_WR)
        assert held.moving.get(timeout=GUARD) == len(DATA) + 1000
        assert held.written() == DATA + DATA[:1000]
    assert grown.offloads == 2 + CLOSING


def test_the_thread_waits_a_moment_for_a_brisk_sender(
    slow: SlowFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_disk, "PATIENCE", GUARD * 1000)
    with counting() as grown, Held(tmp_path, slow) as held:
        held.release()
        for _ in range(2):
            until(lambda: held_by(held.sock) == 0)
            held.peer.sendall(DATA)
        held.peer.shutdown(socket.SHUT_WR)
        assert held.moving.get(timeout=GUARD) == held.dst.tell() == 3 * len(DATA)
        assert held.written() == 3 * DATA
    assert grown.offloads == 1 + CLOSING


def test_where_no_thread_can_be_started_nobody_waits_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub does the job then, and it is the hub that brings more."""

    def no_thread(function: Any, args: Any) -> None:
        raise RuntimeError("can't start new thread")

    hub = gevent.get_hub()
    monkeypatch.setitem(hub.__dict__, "_gsplice_threads", Threads(hub))
    monkeypatch.setattr(workers, "_start_thread", no_thread)
    monkeypatch.setattr(page_cache, "BIG_WRITE", 0)
    monkeypatch.setattr(to_disk, "_new_poll", lambda: pytest.fail("the hub waits"))
    with Ends(tmp_path) as ends, counting() as grown:
        sock, peer = ends.connect("unix")
        dst, finish = ends.sink("file")
        moving = ends.spawn(gsplice.copy, sock, dst)
        peer.sendall(DATA)
        until(lambda: is_waited_for(sock, "read"))
        peer.sendall(DATA)
        peer.shutdown(socket.SHUT_WR)
        assert moving.get(timeout=GUARD) == 2 * len(DATA)
        assert finish() == 2 * DATA
    assert grown.bytes_spliced == 2 * len(DATA)
    assert grown.offloads == 0


@pytest.mark.usefixtures("quiet")
def test_a_thread_that_waits_for_more_takes_none_for_a_greenlet_that_has_gone(
    slow: SlowFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_disk, "PATIENCE", GUARD * 1000)
    with Held(tmp_path, slow) as held:
        held.release()
        until(lambda: (slow.directory / held.name).stat().st_size == len(DATA))
        held.moving.kill(timeout=GUARD)
        assert held.dst.tell() == len(DATA)
        held.peer.sendall(b"the next one's")
        threads_done()
        assert held.written() == DATA
        assert held.rest() == b"the next one's"


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
        assert held.moving.get(timeout=GUARD) == len(DATA)
        assert held.written() == DATA


def test_a_fork_while_the_thread_is_in_a_splice(tmp_path: Path) -> None:
    """In the child nobody would ever give the lock back."""
    with Ends(tmp_path) as ends:
        revocable = _RevocableSocket(Socket(None, None, ends.source("bare_unix", b"")), OPEN, 1)
        with revocable._lock:
            pid = gevent.os.fork_gevent()
            if pid == 0:
                signal.alarm(GUARD)
                revocable.leave_to_thread()
                os._exit(0)
        assert waitpid(pid, 0)[1] == 0
