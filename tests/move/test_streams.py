"""Streams in small pieces, in both directions, and to their end."""

from __future__ import annotations

import io
import shutil
import socket

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    receive_all,
    some_bytes,
)
from ends import GUARD, Ends, MiB
from pairs import READ_AHEAD

import gsplice


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("sink", ["file", "tcp", "pipe"])
def test_sixteen_small_segments(ends: Ends, kind: str, sink: str) -> None:
    ours, theirs = ends.connect(kind)
    if kind == "tcp":
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = some_bytes(1600)
    for start in range(0, 1600, 100):
        theirs.send(data[start : start + 100])
    theirs.shutdown(socket.SHUT_WR)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        assert gsplice.copy(ours, dst) == 1600
    assert finish() == data
    assert grown.bytes_spliced == 1600


@pytest.mark.parametrize("segments", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("sink", ["tcp", "pipe"])
def test_a_stream_of_single_bytes(ends: Ends, sink: str, segments: int) -> None:
    ours, theirs = ends.connect("unix")  # which never joins two of them
    data = some_bytes(segments)

    def feed() -> None:
        for number in range(segments):
            theirs.send(data[number : number + 1])
        theirs.shutdown(socket.SHUT_WR)

    ends.spawn(feed)
    dst, finish = ends.sink(sink)
    with counting() as grown:
        assert gsplice.copy(ours, dst) == segments
    assert digest(finish()) == digest(data)
    assert grown.bytes_spliced == segments


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_both_directions_at_once_on_one_socket(ends: Ends, kind: str) -> None:
    ours, theirs = ends.connect(kind)
    data = some_bytes(8 * MiB + 1)

    def echo() -> None:
        with theirs.makefile("rb") as src, theirs.makefile("wb") as dst:
            shutil.copyfileobj(src, dst)
        theirs.shutdown(socket.SHUT_WR)

    def feed() -> None:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)

    with counting() as grown:
        echoing = ends.spawn(echo)
        ends.spawn(feed)
        assert digest(receive_all(ours)) == digest(data)
        echoing.get(timeout=GUARD)
    assert grown.bytes_spliced + grown.bytes_copied == len(data)
    assert grown.bytes_copied <= READ_AHEAD


def test_a_socket_can_be_read_and_written_by_two_copies_at_once(ends: Ends) -> None:
    ours, theirs = ends.connect()
    out, back = some_bytes(4 * MiB, 1), some_bytes(5 * MiB, 2)
    received = io.BytesIO()

    def outwards() -> None:
        gsplice.copy(ends.source("file", out), ours)
        ours.shutdown(socket.SHUT_WR)

    inwards_to, finish = ends.sink("file")
    inwards = ends.spawn(gsplice.copy, ours, inwards_to)
    ends.spawn(outwards)
    reading = ends.spawn(lambda: received.write(receive_all(theirs)))
    theirs.sendall(back)
    theirs.shutdown(socket.SHUT_WR)
    assert inwards.get(timeout=GUARD) == len(back)
    reading.get(timeout=GUARD)
    assert digest(received.getvalue()) == digest(out)
    assert digest(finish()) == digest(back)


@pytest.mark.parametrize("sink", ["tcp", "unix", "pipe"])
def test_the_end_of_the_source_is_not_passed_on_before_its_bytes(
    small_ends: Ends, sink: str
) -> None:
    """The source has ended long before the destination takes its first byte."""
    data = some_bytes(2 * MiB)
    src = small_ends.source("unix", data)
    if sink == "pipe":
        peer, dst = small_ends.pipe()
        read = peer.read
    else:
        dst, peer = small_ends.connect(sink)

        def read() -> bytes:
            return receive_all(peer)

    def run() -> None:
        gsplice.copy(src, dst)
        dst.close()

    copying = small_ends.spawn(run)
    for _ in range(100):
        gevent.sleep(0)
    assert not copying.dead
    assert digest(read()) == digest(data)
    copying.get(timeout=GUARD)
