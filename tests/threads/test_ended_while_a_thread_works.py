"""Killed, timed out or closed while a thread works."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from ends import GUARD, Ends, MiB, is_waited_for, threads_done, until
from slow_disks import (
    TO_ANY,
    TO_FILE,
    TO_SOCKET,
    descriptors,
    held_beyond,
    kill,
    moved,
    sink_for,
    time_out,
)
from slowfs import SlowFS
from victims import Victim, assert_clean

import gsplice
from gsplice._move.account import PIECE

pytestmark = pytest.mark.usefixtures("threads_idle")


#: Also what needs no pipe, or goes through memory.
INTERRUPTED = {way: (way, 1 * MiB) for way in TO_ANY} | {
    "sendfile of a small file": ("sendfile", 5000),
    "small file to file": ("copyfileobj to file", 5000),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", [kill, time_out])
@pytest.mark.parametrize("transfer", INTERRUPTED)
def test_ended_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, transfer: str, end: Callable[..., None]
) -> None:
    way, size = INTERRUPTED[transfer]
    file_of(slow.directory / name, size)
    assert_clean(tmp_path)  # opens what is opened once
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        before = descriptors()
        slow.hold(name)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name))
        end(moving)
        assert moving.dead  # and the read is still held
        assert src.tell() == 0
        slow.release(name)
        threads_done()
        until(lambda: descriptors() <= before)
        until(lambda: gsplice.stats().pipes_in_use == 0)
        assert some_bytes(size).startswith(finish())  # the thread had its order to copy
        if way not in TO_FILE:
            assert src.tell() == 0
    assert_clean(tmp_path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("way", TO_ANY)
def test_killed_halfway(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    """The file stands where what was delivered ends."""
    size = 2 * PIECE
    held = held_beyond(size - MiB, slow, name, tmp_path, way, size)
    with held as (ends, src, dst, finish, moving):
        if way in TO_FILE:
            until(lambda: os.fstat(dst.fileno()).st_size > PIECE)
        else:
            until(lambda: gsplice.stats().pipes_in_use == 1)
        moving.kill(timeout=GUARD)
        assert moving.dead
        position = src.tell()
        slow.release(name)
        threads_done()
        arrived = finish()
        assert some_bytes(size).startswith(arrived)
        if way in TO_FILE:
            assert 0 < position <= len(arrived)
        else:
            assert position == len(arrived) > 0
        src.seek(position)
        rest, finish_rest = ends.sink("bare_unix")
        gsplice.copy(src, rest)
        assert digest(finish_rest()) == digest(some_bytes(size)[position:])


@pytest.mark.usefixtures("quiet")
def test_killed_in_the_queue(many_held: list[str], slow: SlowFS, tmp_path: Path) -> None:
    file_of(slow.directory / (last := many_held[0] + "last"), 1 * MiB)
    with Ends(tmp_path) as ends, (slow.mount / last).open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        before = descriptors()
        moving = ends.spawn(dst.sendfile, src)
        until(lambda: gsplice.stats().offloads > 0 and not moving.ready() and moving.started)
        gevent.sleep(0)
        moving.kill(timeout=GUARD)
        assert moving.dead
        assert src.tell() == 0
        until(lambda: descriptors() <= before)
        assert finish() == b""
    assert not slow.begun(last)
    assert moved(grown) == 0


@pytest.mark.parametrize("way", TO_ANY)
def test_the_file_closed_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, way: str
) -> None:
    """Nobody else's file gets the bytes, or is read, when it takes the number."""
    results = []
    for move in TO_ANY[way]:
        with Ends(tmp_path) as ends:
            file_of(slow.directory / name, 4 * MiB)
            src = (slow.mount / name).open("rb")
            dst, finish = sink_for(ends, way)
            if move is TO_ANY[way][0]:
                slow.hold(name)
            moving = ends.spawn(move, src, dst)
            if move is TO_ANY[way][0]:
                until(lambda: slow.begun(name))
            elif way in TO_FILE:
                continue  # the unpatched one lets nobody close it
            else:
                until(lambda moving=moving: moving.started and not moving.ready())
            number = src.fileno()
            src.close()
            victim = Victim(tmp_path, number)
            if move is TO_ANY[way][0]:
                slow.release(name)
            moving.join(GUARD)
            victim.check()
            results.append(type(moving.exception))
            assert some_bytes(4 * MiB).startswith(finish())
    assert set(results) == {ValueError}


@pytest.mark.parametrize("way", TO_SOCKET)
def test_the_socket_closed_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, way: str
) -> None:
    results = []
    file_of(slow.directory / name, 4 * MiB)
    patched = TO_SOCKET[way][0]
    for move in TO_SOCKET[way]:
        with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
            sock, _ = ends.connect("unix")
            if move is patched:
                slow.hold(name)
            moving = ends.spawn(move, src, sock)
            if move is patched:
                until(lambda: slow.begun(name))
            else:
                until(lambda sock=sock: is_waited_for(sock))
            number = sock.fileno()
            sock.close()
            if way == "copyfileobj to socket" and sock.fileno() == number:
                results.append("kept open by its file")
                moving.kill()
                if move is patched:
                    slow.release(name)
                continue
            until(lambda number=number: not os.path.exists(f"/proc/self/fd/{number}"))
            victim = Victim(tmp_path, number)
            if move is patched:
                slow.release(name)
            moving.join(GUARD)
            victim.check()
            # gevent's has a class of its own where somebody waited for the socket
            assert isinstance(moving.exception, OSError)
            results.append(moving.exception.errno)
            if move is patched:
                assert src.tell() == 0
    assert results[0] == results[1]
    assert_clean(tmp_path)
