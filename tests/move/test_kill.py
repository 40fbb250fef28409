"""Ends closed and greenlets killed under way: nothing leaks, nothing gets mixed up.

An exception at every switch is thrown in tests/faults/test_switches.py.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import digest, open_descriptors, receive_all, receiver, some_bytes
from ends import GUARD, Ends, KiB, MiB, is_waited_for, until
from unpatched import unpatched_copyfileobj
from victims import Victim, assert_clean

import gsplice


def move(src: Any, dst: Any) -> int:
    if isinstance(dst, gevent.socket.socket) and getattr(src, "seekable", bool)():
        return dst.sendfile(src)
    return gsplice.copy(src, dst)


@pytest.mark.parametrize("source", ["file", "bare_tcp", "tcp", "pipe"])
def test_a_destination_closed_under_way(tmp_path: Path, source: str) -> None:
    with Ends(tmp_path, buffers=16 * KiB) as ends:
        src = ends.source(source, some_bytes(2 * MiB))
        sock, peer = ends.connect()
        moving = ends.spawn(move, src, sock)
        until(lambda sock=sock: is_waited_for(sock))
        number = sock.fileno()
        sock.close()
        until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
        victim = Victim(tmp_path, number)
        assert victim.fd == number
        with pytest.raises(OSError, match="closed"):
            moving.get(timeout=GUARD)
        arrived = receive_all(peer)
        victim.check()
    assert some_bytes(2 * MiB).startswith(arrived)
    assert gsplice.stats().pipes_in_use == 0
    assert_clean(tmp_path)


def test_a_source_socket_closed_under_way(tmp_path: Path) -> None:
    with Ends(tmp_path) as ends:
        sock, peer = ends.connect()
        dst, finish = ends.sink("file")
        moving = ends.spawn(gsplice.copy, sock, dst)
        peer.sendall(b"before")
        until(lambda: os.fstat(dst.fileno()).st_size == 6)
        until(lambda: is_waited_for(sock, "read"))
        number = sock.fileno()
        sock.close()
        until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
        victim = Victim(tmp_path, number)
        with pytest.raises(OSError, match="closed"):
            moving.get(timeout=GUARD)
        victim.check()
        assert finish() == b"before"


@pytest.mark.parametrize("which", ["source", "destination"])
@pytest.mark.parametrize(
    ("source", "sink"), [("file", "file"), ("file", "bare_tcp"), ("bare_tcp", "file")]
)
def test_an_end_closed_while_a_transfer_gives_way(
    tmp_path: Path, source: str, sink: str, which: str
) -> None:
    """The transfer is ready to go on, not waiting, and must ask for the descriptor again."""
    size = 64 * MiB
    with Ends(tmp_path) as ends:
        src = ends.source(source, bytes(size))
        dst, _ = ends.sink(sink)
        victims = []

        def close() -> None:
            end = src if which == "source" else dst
            number = end.fileno()
            end.close()
            while os.path.exists(f"/proc/self/fd/{number}"):
                gevent.sleep(0)
            victims.append(Victim(tmp_path, number))

        moving = ends.spawn(move, src, dst)
        closing = ends.spawn(close)
        with pytest.raises((ValueError, OSError)):
            moving.get(timeout=GUARD)
        closing.get(timeout=GUARD)
        victims[0].check()
    assert gsplice.stats().pipes_in_use == 0


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_a_pipe_closed_under_way(tmp_path: Path, end: str) -> None:
    results = []
    for copy in (gsplice.copyfileobj, unpatched_copyfileobj):
        with Ends(tmp_path) as ends:
            reader, writer = ends.pipe(buffering=0)
            if end == "reader":
                ours, watcher = reader, reader._read_watcher
                moving = ends.spawn(copy, reader, ends.sink("unix")[0])
            else:
                ours, watcher = writer, writer._write_watcher
                moving = ends.spawn(copy, ends.source("unix", bytes(1 * MiB)), writer)
            until(lambda watcher=watcher: watcher.callback is not None)
            number = ours.fileno()
            ends.spawn(ours.close)
            until(lambda number=number: not os.path.exists(f"/proc/self/fd/{number}"))
            victim = Victim(tmp_path, number)
            moving.join(GUARD)
            results.append(type(moving.exception))
            victim.check()
    assert results[0] == results[1]
    assert results[0] is not type(None)


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_a_pipe_closed_while_the_other_end_is_waited_for(tmp_path: Path, end: str) -> None:
    """Nobody waits for the pipe, so nothing but asking again tells that its number is another's."""
    with Ends(tmp_path, buffers=4 * KiB) as ends:
        reader, writer = ends.pipe(buffering=0)
        sock, peer = ends.connect("unix")
        if end == "reader":
            moving, ours = ends.spawn(gsplice.copy, reader, sock), reader
            while not is_waited_for(sock):
                gevent.sleep(0)
                if select.select([], [writer.fileno()], [], 0)[1]:
                    writer.write(bytes(64 * KiB))
        else:
            moving, ours = ends.spawn(gsplice.copy, sock, writer), writer
            until(lambda: is_waited_for(sock, "read"))
        number = ours.fileno()
        ours.close()
        until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
        victim = Victim(tmp_path, number)
        if end == "reader":
            arrived = receiver(peer)
            ends.callback(arrived.kill)
        else:
            peer.sendall(b"not for the victim")
        with pytest.raises((ValueError, OSError)):
            moving.get(timeout=GUARD)
        victim.check()


def test_a_broken_connection_leaves_no_byte_for_the_next(tmp_path: Path) -> None:
    for seed in range(20):
        with Ends(tmp_path, buffers=16 * KiB) as ends:
            src = ends.source("bare_unix", some_bytes(1 * MiB, seed))
            sock, peer = ends.connect("unix")
            moving = ends.spawn(gsplice.copy, src, sock)
            until(lambda sock=sock: is_waited_for(sock))
            peer.close()
            moving.join(GUARD)
            assert isinstance(moving.exception, OSError)
        assert_clean(tmp_path)


def test_many_killed_at_once_leave_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    with Ends(tmp_path, buffers=4 * KiB) as ends:
        moving = []
        for seed in range(50):
            sock, _ = ends.connect("unix")
            src = ends.source("unix" if seed % 2 else "file", some_bytes(300 * KiB, seed))
            moving.append(gevent.spawn(move, src, sock))
            until(lambda sock=sock: is_waited_for(sock))
        assert gsplice.stats().pipes_in_use == 25
        gevent.killall(moving, timeout=GUARD)
        assert gsplice.stats().pipes_in_use == 0
    assert open_descriptors() <= before + gsplice.stats().pipes_idle * 2
    with Ends(tmp_path) as ends:
        arrived = []
        for seed in range(50):
            sock, peer = ends.connect("unix")
            arrived.append(receiver(peer))
            ends.spawn(
                lambda src, sock: (gsplice.copy(src, sock), sock.close()),
                ends.source("unix", some_bytes(300 * KiB, 100 + seed)),
                sock,
            )
        for seed, greenlet_ in enumerate(arrived):
            assert digest(greenlet_.get(timeout=GUARD)) == digest(some_bytes(300 * KiB, 100 + seed))
