"""What broke elsewhere: system calls that fail, answer EAGAIN or 0, spin, block, or cork a tail."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import select
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, digest, file_of, receive_all, some_bytes
from ends import GUARD, MOVERS, Ends, KiB, MiB, is_waited_for, until
from gevent.fileobject import FileObjectPosix
from gevent.monkey import get_original
from strace import SIZE, traced
from unpatched import unpatched_copyfileobj

import gsplice

WAYS = {
    "file to socket, no pipe": ("file", "bare_unix", "sendfile"),
    "file to socket": ("file", "tcp", "splice"),
    "file to file": ("file", "file", "copy_file_range"),
    "socket to socket": ("unix", "bare_tcp", "splice"),
    "socket to file": ("bare_unix", "file", "splice"),
    "pipe to socket": ("pipe", "unix", "splice"),
    "socket to pipe": ("unix", "pipe", "splice"),
}
ENVIRON = {"file to socket, no pipe": {"GSPLICE_MAX_PIPES": "0"}}
#: Answers that mean "not this way".
REFUSALS = ["EINVAL", "ENOSYS", "EPERM"]
#: Answers that mean "once more".
AGAIN = ["EINTR", "EAGAIN"]


def check_fault(directory: Path, way: str, error: str, when: str) -> None:
    source, sink, call = WAYS[way]
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
    said, log = traced(directory, source, sink, *inject, environ=ENVIRON.get(way))
    if call == "sendfile":
        assert said.fallbacks.pop("no_pipe") == 1
    assert any("(INJECTED)" in line for line in log)
    assert said.prefix
    assert said.leaked <= 0
    assert said.pipes_in_use == 0
    assert said.position in (None, said.arrived)
    assert said.written in (None, said.arrived)
    assert said.failed is None
    assert said.result == said.arrived == SIZE
    moved = said.bytes_spliced + said.bytes_sendfile + said.bytes_copy_file_range
    assert moved + said.bytes_copied <= said.arrived
    if error in AGAIN:
        assert said.fallbacks == {}
        assert moved >= SIZE - 256 * KiB
    if error in REFUSALS:
        assert said.fallbacks == ({} if call == "copy_file_range" else {"refused": 1})


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("way", "error", "when"),
    [
        ("file to socket, no pipe", "EINVAL", "2"),
        ("file to socket, no pipe", "EAGAIN", "1..100"),
        ("file to socket", "EINTR", "1+3"),
        ("file to socket", "EINVAL", "1"),
        ("file to socket", "EINVAL", "2"),
        ("file to socket", "EAGAIN", "2"),
        ("file to file", "EINVAL", "2"),
        ("socket to socket", "EINTR", "1+3"),
        ("socket to socket", "EAGAIN", "1..100"),
        ("socket to socket", "ENOSYS", "5"),
        ("socket to file", "EINVAL", "2"),
        ("pipe to socket", "EPERM", "2"),
        ("pipe to socket", "EAGAIN", "1..100"),
        ("socket to pipe", "EAGAIN", "1..100"),
    ],
)
def test_a_failing_system_call_loses_nothing(
    tmp_path: Path, way: str, error: str, when: str
) -> None:
    check_fault(tmp_path, way, error, when)


@pytest.mark.few(1)
@pytest.mark.parametrize("error", ["ENOMEM", "EMFILE"])
def test_without_pipes_a_transfer_goes_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    monkeypatch.setenv("GEVENT_LOOP", "libev-cext")  # libuv needs pipes of its own
    inject = ["-e", "trace=pipe2", "-e", f"inject=pipe2:error={error}"]
    said, log = traced(tmp_path, "unix", "bare_tcp", *inject)
    assert any("(INJECTED)" in line for line in log)
    assert said.result == said.arrived == SIZE
    assert said.prefix
    assert said.fallbacks["no_pipe"] == 1
    assert said.pipes_created == said.pipes_in_use == 0


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "way", ["file to socket, no pipe", "file to socket", "socket to socket", "pipe to socket"]
)
def test_the_last_piece_is_not_held_back(tmp_path: Path, way: str) -> None:
    """A piece sent with a promise of more, or asked for beyond the end, would wait 200 ms."""
    source, sink, call = WAYS[way]
    size = 3 * MiB + 10  # the tail is small
    trace = "trace=splice,sendfile,sendto,sendmsg"
    said, log = traced(tmp_path, source, sink, "-e", trace, size=size, environ=ENVIRON.get(way))
    assert said.arrived == size
    calls = [line for line in log if f" {call}(" in line]
    assert calls
    assert "_MORE" not in [line for line in calls if not line.endswith("= 0")][-1]
    for line in calls:
        if match := re.search(r"sendfile\(\d+, \d+, \[(\d+)\].*, (\d+)\)", line):
            assert int(match[1]) + int(match[2]) <= size
        else:
            assert call == "splice"


# ---- end of file is told from everything else that looks like it


def send_with_urgent_byte(peer: Any, before: bytes, after: bytes) -> None:
    if before:
        peer.sendall(before)
    peer.send(b"!", socket.MSG_OOB)
    peer.sendall(after)
    peer.shutdown(socket.SHUT_WR)


@pytest.mark.few
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 1000), (1000, 1000), (100_000, 100_000)])
@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_urgent_data_is_not_the_end_of_the_stream(
    tmp_path: Path, kind: str, sink: str, before: int, after: int, inline: bool
) -> None:
    """At TCP's urgent mark splice() answers 0, or EAGAIN while the socket is readable."""
    data = some_bytes(before + after)
    results = []
    for copy in (MOVERS["copyfileobj"], unpatched_copyfileobj):
        with Ends(tmp_path) as ends:
            ours, peer = ends.connect(kind)
            if inline:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            send_with_urgent_byte(peer, data[:before], data[before:])
            dst, finish = ends.sink(sink)
            with ours.makefile("rb", buffering=0) as src, gevent.Timeout(GUARD):
                copy(src, dst)
            results.append(digest(finish()))
    assert results[0] == results[1]


def test_urgent_data_under_way_does_not_spin(tmp_path: Path) -> None:
    with Ends(tmp_path) as ends:
        ours, peer = ends.connect()
        dst, finish = ends.sink("file")
        copying = ends.spawn(gsplice.copy, ours, dst)
        peer.sendall(b"before")
        until(lambda: os.fstat(dst.fileno()).st_size == 6)
        until(lambda: is_waited_for(ours, "read"))
        peer.send(b"!", socket.MSG_OOB)
        for _ in range(10):
            gevent.sleep(0.001)
        assert not copying.dead
        peer.sendall(b"after")
        peer.shutdown(socket.SHUT_WR)
        assert copying.get(timeout=GUARD) == 11
        assert finish() == b"beforeafter"


def test_a_pipe_whose_bytes_somebody_else_takes_has_not_ended(tmp_path: Path) -> None:
    """Both readers are woken for every byte, and one of them finds the pipe empty."""
    with Ends(tmp_path) as ends:
        reader, writer = ends.pipe(buffering=0)
        other = ends.enter_context(FileObjectPosix(os.dup(reader.fileno()), "rb", buffering=0))
        sinks = [ends.sink("unix") for _ in range(2)]
        copying = [
            ends.spawn(gsplice.copy, src, dst)
            for src, (dst, _) in zip((reader, other), sinks, strict=True)
        ]
        for _ in range(50):
            until(lambda: all(src._read_watcher.callback is not None for src in (reader, other)))
            assert not any(copy.dead for copy in copying)
            writer.write(b"x")
            # the next one only when this one is gone, and both wait again
            until(lambda: not select.select([reader.fileno()], [], [], 0)[0])
        writer.close()
        assert sum(copy.get(timeout=GUARD) for copy in copying) == 50
        assert b"".join(finish() for _, finish in sinks) == b"x" * 50


# ---- no busy loop


@pytest.fixture
def splices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every splice() made so far: what it was asked for, and what it gave."""
    calls: list[Any] = []
    splice = os.splice

    def recorded(*args: Any, **kwargs: Any) -> int:
        bound = inspect.signature(splice).bind(*args, **kwargs)
        calls.append([args, bound.arguments, None])
        calls[-1][2] = splice(*args, **kwargs)
        return calls[-1][2]

    monkeypatch.setattr(os, "splice", recorded)
    yield calls
    assert calls


def test_a_stalled_reader_of_the_callers_own_pipe_costs_nothing(
    tmp_path: Path, splices: list[Any]
) -> None:
    data = some_bytes(2 * MiB)
    with Ends(tmp_path) as ends:
        src = ends.source("unix", data)
        reader, writer = ends.pipe()
        copying = ends.spawn(gsplice.copy, src, writer)
        until(lambda: writer.raw._write_watcher.callback is not None)
        before = len(splices)
        for _ in range(200):  # the source is readable all the time
            gevent.sleep(0)
        assert len(splices) == before
        arrived = ends.spawn(reader.read)
        assert copying.get(timeout=GUARD) == len(data)
        writer.close()
        assert digest(arrived.get(timeout=GUARD)) == digest(data)


@pytest.mark.parametrize("source", ["bare_unix", "bare_tcp", "pipe"])
def test_a_stalled_receiver_costs_nothing(tmp_path: Path, splices: list[Any], source: str) -> None:
    with Ends(tmp_path) as ends:
        src = ends.source(source, some_bytes(8 * MiB))
        sock, _ = ends.connect("unix")
        ends.spawn(gsplice.copy, src, sock)
        until(lambda: is_waited_for(sock))
        before = len(splices)
        for _ in range(200):
            gevent.sleep(0)
        assert len(splices) == before


@pytest.mark.parametrize("source", ["unix", "tcp", "pipe"])
def test_a_silent_source_costs_nothing(tmp_path: Path, splices: list[Any], source: str) -> None:
    with Ends(tmp_path) as ends:
        if source == "pipe":
            src, feeder = ends.pipe(buffering=0)
            send, waits = feeder.write, src._read_watcher
        else:
            src, feeder = ends.connect(source)
            send, waits = feeder.send, src._read_event
        dst, _ = ends.sink("unix")
        with counting() as grown:
            ends.spawn(gsplice.copy, src, dst)
            send(b"x")
            until(lambda: splices and waits.callback is not None)
            before = len(splices)
            for _ in range(200):
                gevent.sleep(0)
        assert len(splices) - before <= 2  # the byte may only now have arrived
        assert grown.pipes_in_use == 0  # an idle transfer holds no pipe


def test_both_ends_of_every_splice_are_non_blocking(tmp_path: Path, splices: list[Any]) -> None:
    with Ends(tmp_path) as ends:
        dst, finish = ends.sink("tcp")
        gsplice.copy(ends.source("unix", some_bytes(1 * MiB)), dst)
        finish()
    for _, arguments, _ in splices:
        assert arguments["flags"] & os.SPLICE_F_NONBLOCK


# ---- pipes of any capacity


@pytest.fixture
def capacity(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[int]:
    """Have the pool give pipes of this capacity only."""
    settings = gsplice.config.settings
    monkeypatch.setitem(settings.__dict__, "max_pipes", 0)
    idle = list(iter(gsplice.pipes.acquire, None))
    monkeypatch.setitem(settings.__dict__, "max_pipes", len(idle) + 1)
    monkeypatch.setitem(settings.__dict__, "pipe_size", request.param)
    yield request.param
    mine = gsplice.pipes.acquire()
    assert mine.capacity == request.param
    mine.close()
    for pipe in idle:
        gsplice.pipes.release(pipe)


@pytest.mark.parametrize("capacity", [4 * KiB, 64 * KiB], indirect=True)
@pytest.mark.parametrize("sink", ["bare_tcp", "file"])
@pytest.mark.parametrize("source", ["bare_tcp", "bare_unix"])
def test_a_small_pipe_carries_a_big_stream(
    tmp_path: Path, capacity: int, source: str, sink: str
) -> None:
    data = some_bytes(3 * MiB + 7)
    with Ends(tmp_path) as ends, counting() as grown:
        dst, finish = ends.sink(sink)
        assert gsplice.copy(ends.source(source, data), dst) == len(data)
        assert digest(finish()) == digest(data)
    assert grown.bytes_spliced == len(data)


# ---- ends that must not be spliced


def test_a_terminal_is_written_the_ordinary_way(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as reader, open(theirs, "wb") as tty, counting() as grown:
        with Ends(tmp_path) as ends:
            shutil.copyfileobj(ends.source("tcp", b"to a terminal"), tty)
        tty.flush()
        assert reader.read(100) == b"to a terminal"
    assert grown.fallbacks == {"destination_type": 1}


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_messages_keep_their_boundaries(kind: int) -> None:
    """A spliced datagram socket would give the messages joined, or cut."""
    left, right = gevent.socket.socketpair(socket.AF_UNIX, kind)
    out, inn = gevent.socket.socketpair(socket.AF_UNIX, kind)
    with left, right, out, inn, counting() as grown:
        for message in (b"one", b"two", b"three"):
            left.send(message)
        assert gsplice.copy(right, out, 11) == 11
        assert [inn.recv(100) for _ in range(3)] == [b"one", b"two", b"three"]
    assert grown.fallbacks == {"socket_type": 1}


def test_a_socket_made_blocking_is_left_to_the_original(tmp_path: Path) -> None:
    data = some_bytes(2 * MiB)
    path = file_of(tmp_path / "file", len(data))
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        sock, peer = ends.connect()
        native = get_original("socket", "socket")(fileno=peer.detach())
        native.setblocking(True)
        received = io.BytesIO()
        reader = get_original("threading", "Thread")(
            target=lambda: received.write(receive_all(native))
        )
        reader.start()
        os.set_blocking(sock.fileno(), True)
        assert sock.sendfile(src) == len(data)
        sock.close()
        reader.join()
        native.close()
    assert digest(received.getvalue()) == digest(data)
    assert grown.fallbacks == {"blocking": 1}


def test_a_socket_that_is_non_blocking_for_its_owner_is_refused_as_unpatched(
    tmp_path: Path,
) -> None:
    with Ends(tmp_path) as ends:
        sock, _ = ends.connect()
        sock.setblocking(False)
        with pytest.raises(ValueError, match="non-blocking"):
            sock.sendfile(ends.source("file", some_bytes(1 * MiB)))


def test_a_transfer_in_another_thread_uses_that_threads_hub(tmp_path: Path) -> None:
    data = some_bytes(2 * MiB)
    result: list[Any] = []

    def run() -> None:
        directory = tmp_path / "thread"
        directory.mkdir()
        with Ends(directory) as ends:
            dst, finish = ends.sink("tcp")
            gsplice.copy(ends.source("unix", data), dst)
            result.append(finish())
        gevent.get_hub().destroy(destroy_loop=True)

    with counting() as grown:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert digest(result[0]) == digest(data)
    assert grown.bytes_spliced + grown.bytes_copied == len(data)
    assert grown.fallbacks == {}


def test_a_socket_of_another_threads_hub_goes_to_the_original(tmp_path: Path) -> None:
    with Ends(tmp_path) as ends:
        sock, peer = ends.connect("unix")
        sock.sendall(b"x" * 1000)
        sock.shutdown(socket.SHUT_WR)
        assert select.select([peer], [], [], GUARD)[0]
        copied = io.BytesIO()
        with counting() as grown:
            thread = threading.Thread(target=lambda: gsplice.copy(peer, copied))
            thread.start()
            thread.join()
        assert copied.getvalue() == b"x" * 1000
        assert sum(grown.fallbacks.values()) == 1
        assert grown.transfers == 0


# ---- one more way out


@pytest.mark.parametrize("mover", MOVERS)
def test_a_descriptor_closed_behind_the_objects_back(tmp_path: Path, mover: str) -> None:
    with Ends(tmp_path) as ends:
        src, (dst, _) = ends.source("file", some_bytes(1 * MiB)), ends.sink("file")
        fd = os.dup(src.fileno())
        os.close(src.fileno())
        try:
            with pytest.raises(OSError) as caught:
                MOVERS[mover](src, dst)
            assert caught.value.errno == errno.EBADF
        finally:
            os.dup2(fd, src.fileno())
            os.close(fd)
