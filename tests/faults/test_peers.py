"""Peers that behave badly, at either end of every kind of transfer that has a socket there.

Also files that others change while they are sent. What the tests of transfers have of it already
is listed in the README beside this file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import digest, file_of, open_descriptors, receive_all, receiver, some_bytes
from ends import GUARD, SOCKETS, Ends, KiB, MiB, is_waited_for, threads_done, until
from transfers import TRANSFERS, Kind, set_back
from victims import assert_clean

import gsplice

pytestmark = pytest.mark.usefixtures("quiet")

Record = Callable[[str, object], None]


def reset(sock: Any) -> None:
    """Close a socket so that its peer gets a reset, whatever is under way."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# ---- who reads from the transfer


def takes(sock: Any, most: int, piece: int = 1 << 16) -> bytes:
    taken = bytearray()
    while len(taken) < most and (data := sock.recv(min(piece, most - len(taken)))):
        taken += data
    return bytes(taken)


def resets_in_the_middle(sock: Any, size: int) -> bytes:
    taken = takes(sock, size // 2)
    reset(sock)
    return taken


def leaves_bytes_unread(sock: Any, size: int) -> bytes:
    taken = takes(sock, size // 3)
    sock.close()
    return taken


def goes_at_once(sock: Any, size: int) -> bytes:
    sock.close()
    return b""


def half_closes_first(sock: Any, size: int) -> bytes:
    sock.shutdown(socket.SHUT_WR)
    return receive_all(sock)


def sips(sock: Any, size: int) -> bytes:
    """Read a little at a time, and let everybody else run in between."""
    taken = bytearray()
    while data := sock.recv(2000 if len(taken) < 100 * KiB else 1 << 20):
        taken += data
        gevent.sleep(0)
    return bytes(taken)


READERS: dict[str, tuple[Callable[[Any, int], bytes], bool]] = {
    "resets in the middle": (resets_in_the_middle, False),
    "leaves bytes unread": (leaves_bytes_unread, False),
    "goes at once": (goes_at_once, False),
    "half-closes first": (half_closes_first, True),
    "sips": (sips, True),
}

TO_SOCKETS = [kind for kind in TRANSFERS if kind.sink in SOCKETS]


@pytest.mark.few
@pytest.mark.parametrize("kind", TO_SOCKETS, ids=str)
@pytest.mark.parametrize("behaviour", READERS)
def test_a_reader(tmp_path: Path, kind: Kind, behaviour: str) -> None:
    behave, gets_all = READERS[behaviour]
    data = some_bytes(kind.size)
    kind.set_up()
    before = open_descriptors() - 2 * gsplice.stats().pipes_idle
    try:
        with Ends(tmp_path, 16 * KiB if kind.sink.endswith("unix") else None) as ends:
            src = ends.source(kind.source, kind.preface + data)
            ours, theirs = ends.connect(kind.sink)
            theirs.sendall(kind.request)
            if kind.half_closed:
                theirs.shutdown(socket.SHUT_WR)
            bare = kind.sink.startswith("bare")
            dst = ours if bare else ends.enter_context(contextlib.closing(ours.makefile("wb", 0)))
            reading = ends.spawn(behave, theirs, kind.size)
            moving = ends.spawn(kind.run, src, dst)
            moving.join(GUARD)
            assert moving.dead
            position = src.tell() if kind.positions and kind.source == "file" else None
            dst.close()
            ours.close()
            arrived = kind.body(reading.get(timeout=GUARD))
            assert digest(arrived) == digest(data[: len(arrived)])
            if gets_all:
                assert len(arrived) == kind.size
                assert moving.value in (None, kind.size)
                assert moving.successful()
            elif moving.successful() and not kind.swallows:
                assert position in (None, kind.size)  # all was in the buffers before it went
            else:
                assert kind.swallows or isinstance(moving.exception, OSError), moving.exception
                assert position is None or len(arrived) <= position <= kind.size
    finally:
        set_back()
    threads_done()
    assert gsplice.stats().pipes_in_use == 0
    until(lambda: open_descriptors() - 2 * gsplice.stats().pipes_idle <= before)
    assert_clean(tmp_path)


# ---- who writes to the transfer


def breaks_off(sock: Any, data: bytes) -> None:
    sock.sendall(data[: len(data) // 2])
    reset(sock)


def dribbles(sock: Any, data: bytes) -> None:
    """A byte in a segment, for a while."""
    for number in range(500):
        sock.send(data[number : number + 1])
    sock.sendall(data[500:])
    sock.shutdown(socket.SHUT_WR)


def writes_and_goes(sock: Any, data: bytes) -> None:
    sock.sendall(data)
    sock.close()


def stops_reading_first(sock: Any, data: bytes) -> None:
    sock.shutdown(socket.SHUT_RD)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


WRITERS: dict[str, tuple[Callable[[Any, bytes], None], bool]] = {
    "breaks off": (breaks_off, False),
    "dribbles": (dribbles, True),
    "writes and goes": (writes_and_goes, True),
    "stops reading first": (stops_reading_first, True),
}

FROM_SOCKETS = [kind for kind in TRANSFERS if kind.source in SOCKETS]


@pytest.mark.few
@pytest.mark.parametrize("kind", FROM_SOCKETS, ids=str)
@pytest.mark.parametrize("behaviour", WRITERS)
def test_a_writer(tmp_path: Path, kind: Kind, behaviour: str) -> None:
    behave, sends_all = WRITERS[behaviour]
    data = some_bytes(kind.size)
    kind.set_up()
    try:
        with Ends(tmp_path) as ends:
            ours, theirs = ends.connect(kind.source)
            bare = kind.source.startswith("bare")
            src = ours if bare else ends.enter_context(contextlib.closing(ours.makefile("rb")))
            dst, finish = ends.sink(kind.sink, kind.request, kind.half_closed)
            writing = ends.spawn(behave, theirs, kind.preface + data)
            moving = ends.spawn(kind.run, src, dst)
            moving.join(GUARD)
            assert moving.dead
            threads_done()
            written = dst.tell() if kind.sink == "file" else None
            arrived = finish()
            assert digest(arrived) == digest(data[: len(arrived)])
            assert written in (None, len(arrived))
            if sends_all:
                moving.get()
                writing.get(timeout=GUARD)
                assert len(arrived) == kind.size
            else:
                assert len(arrived) < kind.size
    finally:
        set_back()
    assert gsplice.stats().pipes_in_use == 0
    assert_clean(tmp_path)


# ---- the same socket at both ends, and the same file in many hands


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_socket_copied_to_itself(tmp_path: Path, kind: str) -> None:
    """An echo: what comes goes back, and the end of one way ends the copy."""
    data = some_bytes(3 * MiB)
    with Ends(tmp_path) as ends:
        ours, theirs = ends.connect(kind)
        echoing = ends.spawn(gsplice.copy, ours, ours)
        back = receiver(theirs)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        assert echoing.get(timeout=GUARD) == len(data)
        ours.shutdown(socket.SHUT_WR)
        assert digest(back.get(timeout=GUARD)) == digest(data)


@pytest.mark.few
@pytest.mark.parametrize("offload", ["auto", "always"])
@pytest.mark.parametrize("shared", [False, True], ids=["opened by each", "one object"])
def test_one_file_sent_by_fifty_at_once(
    tmp_path: Path, shared: bool, offload: str, record_property: Record
) -> None:
    path = file_of(tmp_path / "file", 1 * MiB + 7)
    gsplice.config.settings.offload = offload
    try:
        with Ends(tmp_path, 16 * KiB) as ends:
            one = ends.enter_context(path.open("rb"))
            pairs = [ends.connect("unix" if number % 2 else "tcp") for number in range(50)]
            sending = []
            for sock, _ in pairs:
                file = one if shared else ends.enter_context(path.open("rb"))
                sending.append(
                    ends.spawn(lambda sock, file: (sock.sendfile(file), sock.close()), sock, file)
                )
            until(lambda: all(is_waited_for(sock) for sock, _ in pairs))  # all are under way
            arriving = [receiver(peer) for _, peer in pairs]
            for greenlet in sending:
                greenlet.get(timeout=GUARD)
            expected = digest(path.read_bytes())
            assert {digest(greenlet.get(timeout=GUARD)) for greenlet in arriving} == {expected}
    finally:
        set_back()
    record_property("cases", 50)


# ---- a file that somebody changes while it is sent

CHANGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, 300 * KiB),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: os.truncate(path, 9 * MiB),
    "replaced": lambda path: os.replace(file_of(path.with_name("new"), 3 * MiB, seed=9), path),
    "unlinked": lambda path: path.unlink(),
}


@pytest.mark.few
@pytest.mark.parametrize("name", ["sendfile", "sendfile, cold", "file to socket", "pywsgi, cold"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_changed_under_way(tmp_path: Path, name: str, change: str) -> None:
    """Bytes of that file and of no other, or zeros where it has grown; never more than promised."""
    kind = next(kind for kind in TRANSFERS if kind.name == name)
    path = file_of(tmp_path / "file", 3 * MiB)
    data = path.read_bytes()
    kind.set_up()
    try:
        with Ends(tmp_path, 16 * KiB) as ends, path.open("rb") as src:
            sock, peer = ends.connect()
            peer.sendall(kind.request)
            bare = kind.sink.startswith("bare")
            dst = sock if bare else ends.enter_context(contextlib.closing(sock.makefile("wb", 0)))
            moving = ends.spawn(kind.run, src, dst)
            until(lambda: is_waited_for(sock))
            CHANGES[change](path)
            arriving = receiver(peer)
            moving.join(GUARD)
            assert moving.dead
            assert moving.successful(), moving.exception
            dst.close()
            sock.close()
            arrived = kind.body(arriving.get(timeout=GUARD))
            assert moving.value in (None, len(arrived))
            if kind.positions:
                assert src.tell() == len(arrived)
            if change in ("replaced", "unlinked"):
                assert digest(arrived) == digest(data)
            elif change == "extended":
                assert len(arrived) == (3 * MiB if kind.headed else 9 * MiB)
                assert digest(arrived) == digest(data.ljust(len(arrived), b"\0"))
            else:
                assert digest(arrived) == digest(data[: len(arrived)])
    finally:
        set_back()
    assert gsplice.stats().pipes_in_use == 0
