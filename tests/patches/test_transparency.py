"""The patched names give what the unpatched ones give, whatever they are handed.

Each case is made twice and run through both. That the bytes arrive proves little, as a fallback
delivers them too: each case also states which way it must have gone. Where gsplice is meant to
differ, the test says how.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket as stdlib_socket
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
import pytest
from bench import FITS, Bench
from conftest import counting, receive_all
from hypothesis import strategies as st
from kinds import FILE, PIPE, SINKS, SOCKET, SOURCES
from sameness import (
    AFTER,
    CONTENT,
    PENDING,
    SIZES,
    Copy,
    KiB,
    MiB,
    Outcome,
    Send,
    copy_of,
    kind_named,
    kinds,
    many_examples,
    moved,
    position,
    read_before,
    read_on,
    run_on,
    unpatched_copyfileobj,
    unpatched_sendfile,
)

from gsplice._ends.small import SMALL_FILE as SMALL


@pytest.mark.few
@pytest.mark.parametrize("size", [1000, 200 * KiB])
@pytest.mark.parametrize("kind", kinds(SOURCES))
def test_sendfile_takes_each_kind_or_hands_it_on(open_bench, kind, size):
    Send(kind, min(size, kind.most)).check(open_bench)


@pytest.mark.few
@pytest.mark.parametrize("offset", [0, 1, 100 * KiB, 300 * KiB, -1, True, 2.5, None, "1", 1 << 63])
@pytest.mark.parametrize("count", [None, 0, -1, 2.5, True, 1, 150 * KiB, 1 << 40, "2"])
def test_sendfile_with_every_argument(open_bench, offset, count):
    Send(SOURCES[0], 200 * KiB, ahead=10, offset=offset, count=count).check(open_bench)


def sends() -> st.SearchStrategy[Send]:
    return st.builds(
        lambda size, **rest: Send(size=min(size, rest["kind"].most), **rest),
        kind=st.sampled_from([kind for kind in SOURCES if kind.role == FILE])
        | st.sampled_from(SOURCES),
        size=SIZES,
        ahead=st.sampled_from([0, 0, 10, 5000, 70 * KiB]),
        offset=st.just(0)
        | st.sampled_from([1, 100, 8 * KiB, 300 * KiB, 6 * MiB, -1, True, 2.5, None, "1"]),
        count=st.none() | SIZES | st.sampled_from([-1, 2.5, True, 1, 9 * MiB, "2"]),
        timeout=st.none() | st.just(30.0) | st.sampled_from([None, 0]),
        tcp=st.booleans(),
        subclass=st.booleans(),
    )


@many_examples
def test_sendfile(open_bench, examples):
    run_on(examples, lambda case: case.check(open_bench), case=sends())


@pytest.mark.few
@pytest.mark.parametrize(
    "sink", kinds(SINKS, lambda kind: kind.name in ("buffered", "socket", "pipe, FileObjectPosix"))
)
@pytest.mark.parametrize("source", kinds(SOURCES))
def test_copyfileobj_takes_each_source_or_hands_it_on(open_bench, source, sink):
    copy_of(source, sink, 200 * KiB).check(open_bench)


@pytest.mark.few
@pytest.mark.parametrize("before", ["nothing", "pending", "read", "past"])
@pytest.mark.parametrize(
    "source", kinds(SOURCES, lambda kind: kind.name in ("buffered", "socket", "pipe"))
)
@pytest.mark.parametrize("sink", kinds(SINKS))
def test_copyfileobj_takes_each_destination_or_hands_it_on(open_bench, source, sink, before):
    copy_of(source, sink, 200 * KiB, before=before).check(open_bench)


@pytest.mark.few
@pytest.mark.parametrize(
    "length", [0, None, 1, 4096, -1, -2, 2.5, 0.0, True, "1", "", 1 << 30, 1 << 62, 1 << 63]
)
@pytest.mark.parametrize(
    "source", kinds(SOURCES, lambda kind: kind.name in ("buffered", "raw", "socket", "pipe"))
)
def test_copyfileobj_with_every_length(open_bench, source, length):
    copy_of(source, kind_named(SINKS, "buffered"), 200 * KiB, length=length).check(open_bench)


def copies() -> st.SearchStrategy[Copy]:
    taken = (FILE, SOCKET, PIPE)
    return st.builds(
        copy_of,
        source=st.sampled_from([kind for kind in SOURCES if kind.role in taken])
        | st.sampled_from(SOURCES),
        sink=st.sampled_from([kind for kind in SINKS if kind.role in taken])
        | st.sampled_from(SINKS),
        size=SIZES,
        ahead=st.sampled_from([0, 0, 10, 5000, 70 * KiB]),
        before=st.sampled_from(["nothing", "pending", "read", "past"]),
        length=st.just(0) | st.sampled_from([None, 1, 4096, -1, -2, 2.5, True, "1", 1 << 62]),
    )


@many_examples
def test_copyfileobj(open_bench, examples):
    run_on(examples, lambda case: case.check(open_bench), case=copies())


@pytest.mark.parametrize("call", ["sendfile", "copyfileobj"])
@pytest.mark.parametrize("size", [30 * KiB, 300 * KiB])
def test_what_was_read_ahead_goes_first(open_bench, call, size):
    """Even if the file says something else by now, as somebody has overwritten it since."""

    def attempt(patched: bool, test: Bench) -> bytes:
        path = test.path(CONTENT[:size])
        source = test.keep(open(path, "rb"))
        source.read(10)
        path.write_bytes(bytes(size))
        sender, peer = test.pair()
        received = test.spawn(receive_all, peer)
        if call == "sendfile":
            (gevent.socket.socket.sendfile if patched else unpatched_sendfile)(sender, source)
        else:
            copy = shutil.copyfileobj if patched else unpatched_copyfileobj
            with sender.makefile("wb") as sink:
                copy(source, sink)
        sender.close()
        return received.get()

    with open_bench() as test:
        wanted = attempt(False, test)
    with open_bench() as test, counting() as grown:
        assert attempt(True, test) == wanted
    assert wanted.startswith(CONTENT[10:1000])
    assert wanted.endswith(bytes(1000))
    assert bool(grown.bytes_spliced) == (size > SMALL)


@pytest.mark.parametrize("name", ["buffered", "socket", "pipe"])
def test_a_file_that_was_copied_to_can_be_read_and_written_on(open_bench, name):
    """Its buffer knows where the file stands now, without having been asked in between."""

    def attempt(function: Callable[..., Any], test: Bench) -> list[Any]:
        path = test.path(bytes(1 * MiB))
        source = test.keep(kind_named(SOURCES, name).make(test, CONTENT[: 200 * KiB]))
        sink = test.keep(open(path, "r+b"))
        sink.read(3)
        function(source, sink)
        seen = [sink.read(10), sink.seek(5), sink.read(10), sink.write(AFTER), sink.read(1)]
        sink.close()
        return [*seen, path.read_bytes()]

    with open_bench() as test:
        wanted = attempt(unpatched_copyfileobj, test)
    with open_bench() as test, counting() as grown:
        assert attempt(shutil.copyfileobj, test) == wanted
    assert moved(grown) == 200 * KiB


# --- transfers that fail ---


def plug(open_bench: Bench, tcp: bool) -> tuple[Any, Any]:
    """Return a pair that takes much less than the tests send, as long as nobody reads."""
    sender, peer = open_bench.pair(tcp)
    sender.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, 64 * KiB)
    peer.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, 64 * KiB)
    return sender, peer


BIG = CONTENT[: 5 * MiB]


@pytest.mark.few
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("ahead", [0, 10])
@pytest.mark.parametrize(
    "kind", kinds(SOURCES, lambda kind: kind.role == FILE and kind.name != "big buffer")
)
def test_sendfile_to_a_receiver_that_does_not_read(open_bench, kind, ahead, offset, tcp):
    """Both time out; ours leaves the file where sending stopped."""

    def attempt(function: Callable[..., Any], test: Bench) -> tuple[Outcome, bytes]:
        source = test.keep(kind.make(test, BIG))
        read_before(source, ahead)
        sender, peer = plug(test, tcp)
        sender.settimeout(0.02)
        outcome = Outcome()
        outcome.call(function, sender, source, offset)
        outcome.source_at, outcome.next_bytes = position(source), read_on(source)
        sender.close()
        return outcome, receive_all(peer)

    start = offset or ahead
    with open_bench() as test:
        wanted, _ = attempt(unpatched_sendfile, test)
    with open_bench() as test, counting() as grown:
        got, arrived = attempt(gevent.socket.socket.sendfile, test)
    if kind.name == "FileObjectPosix" and wanted.error == (ValueError, None):
        # gevent 24.10 keeps no "b" in its mode, and sendfile wants to see one
        assert got == wanted
        assert not arrived
        return
    assert got.error == wanted.error == (TimeoutError, None)
    assert arrived == BIG[start : start + len(arrived)]
    assert 0 < len(arrived) == moved(grown)
    assert grown.bytes_spliced > 0
    assert grown.fallbacks == {}
    assert got.source_at == start + len(arrived)
    assert got.next_bytes == BIG[got.source_at :][:7]


@pytest.mark.few
@pytest.mark.parametrize("size", [1000, 5 * MiB])
@pytest.mark.parametrize(
    "state", ["peer has gone", "shut down", "closed", "unconnected", "listening"]
)
@pytest.mark.parametrize("name", ["buffered", "raw", "random"])
def test_sendfile_to_a_socket_that_cannot_send(open_bench, name, state, size):
    def attempt(function: Callable[..., Any], test: Bench) -> Outcome:
        source = test.keep(kind_named(SOURCES, name).make(test, CONTENT[:size]))
        sender, peer = test.pair()
        if state == "peer has gone":
            peer.close()
        elif state == "shut down":
            sender.shutdown(stdlib_socket.SHUT_WR)
        elif state == "closed":
            sender.close()
        else:
            sender = test.keep(gevent.socket.socket())
            if state == "listening":
                sender.bind(("127.0.0.1", 0))
                sender.listen()
        outcome = Outcome()
        outcome.call(function, sender, source)
        outcome.source_at = position(source)
        return outcome

    with open_bench() as test:
        wanted = attempt(unpatched_sendfile, test)
    with open_bench() as test, counting() as grown:
        got = attempt(gevent.socket.socket.sendfile, test)
    assert got.error == wanted.error
    assert got.error is not None
    assert moved(grown) == 0
    if state == "closed" and (name, size) != ("buffered", 1000):  # too small to be looked at
        assert grown.fallbacks == {"closed": 1}
    else:
        assert grown.fallbacks == {}
        assert got.source_at == 0  # gevent leaves it at 8192, which it has read and not sent


@pytest.mark.parametrize("size", [1000, 200 * KiB])
def test_sendfile_of_a_file_with_unwritten_bytes(open_bench, size):
    """They are a part of it."""

    def attempt(function: Callable[..., Any], test: Bench) -> Outcome:
        source = test.keep(open(test.path(CONTENT[:size]), "r+b"))
        source.seek(0, 2)
        source.write(PENDING)
        sender, peer = test.pair()
        received = test.spawn(receive_all, peer)
        outcome = Outcome()
        outcome.call(function, sender, source, 1)
        outcome.source_at = position(source)
        sender.close()
        outcome.arrived = received.get()
        return outcome

    with open_bench() as test:
        wanted = attempt(unpatched_sendfile, test)
    with open_bench() as test, counting() as grown:
        assert attempt(gevent.socket.socket.sendfile, test) == wanted
    assert wanted.arrived == (CONTENT[:size] + PENDING)[1:]
    assert moved(grown) == len(wanted.arrived)
    assert grown.fallbacks == {}


@pytest.mark.few
@pytest.mark.parametrize("ahead", [0, 10])
@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
@pytest.mark.parametrize("name", ["buffered", "raw", "random", "socket", "socket, raw", "pipe"])
def test_copyfileobj_to_a_receiver_that_does_not_read(open_bench, name, buffering, ahead):
    """Both time out; of a file ours leaves what was not delivered to be read again."""

    def attempt(function: Callable[..., Any], test: Bench) -> tuple[Outcome, bytes]:
        source = test.keep(kind_named(SOURCES, name).make(test, BIG))
        read_before(source, ahead)
        sender, peer = plug(test, tcp=False)
        sender.settimeout(0.02)
        sink = sender.makefile("wb", buffering)
        outcome = Outcome()
        outcome.call(function, source, sink)
        outcome.source_at, outcome.next_bytes = position(source), read_on(source)
        sender.shutdown(stdlib_socket.SHUT_WR)
        arrived = receive_all(peer)
        with contextlib.suppress(OSError):
            sink.close()
        return outcome, arrived

    with open_bench() as test:
        wanted, _ = attempt(unpatched_copyfileobj, test)
    with open_bench() as test, counting() as grown:
        got, arrived = attempt(shutil.copyfileobj, test)
    assert got.error == wanted.error == (TimeoutError, None)
    assert arrived == BIG[ahead : ahead + len(arrived)]
    assert 0 < len(arrived) == moved(grown)
    assert grown.bytes_sendfile + grown.bytes_spliced > 0
    assert grown.fallbacks == {}
    if got.source_at is not None:
        assert got.source_at == ahead + len(arrived)
        assert got.next_bytes == BIG[got.source_at :][:7]


@pytest.mark.parametrize("name", ["buffered", "random"])
def test_copyfileobj_leaves_what_was_read_ahead_and_not_delivered(open_bench, name):
    """The receiver is stuck from the beginning, so that the read-ahead meets the timeout."""
    with open_bench() as test, counting() as grown:
        source = test.keep(kind_named(SOURCES, name).make(test, BIG))
        read_before(source, 10)
        sender, _ = plug(test, tcp=False)
        sender.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sender.sendall(BIG)
        sink = test.keep(sender.makefile("wb", 0))
        with pytest.raises(TimeoutError):
            shutil.copyfileobj(source, sink)
        assert source.tell() == 10
        assert source.read(7) == BIG[10:17]
    assert moved(grown) == 0


@pytest.mark.parametrize("to", ["buffered", "socket", "pipe, FileObjectPosix"])
@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
def test_copyfileobj_from_a_sender_that_stops(open_bench, buffering, to):
    """Both time out, and neither file can be read after that."""

    def attempt(function: Callable[..., Any], test: Bench) -> tuple[Outcome, Outcome, Any]:
        ours, theirs = test.pair()
        theirs.sendall(CONTENT[:FITS])
        ours.settimeout(0.02)
        source = test.keep(ours.makefile("rb", buffering))
        sink, collect = kind_named(SINKS, to).make(test)
        test.keep(sink)
        first, second = Outcome(), Outcome()
        first.call(function, source, sink)
        second.call(function, source, sink)
        sink.close()
        return first, second, collect()

    with open_bench() as test:
        wanted = attempt(unpatched_copyfileobj, test)
    with open_bench() as test, counting() as grown:
        got = attempt(shutil.copyfileobj, test)
    assert got[:2] == wanted[:2]
    assert got[0].error == (TimeoutError, None)
    assert got[1].error == (OSError, None)
    assert got[2] == CONTENT[:FITS]  # the original loses what its last read() had got
    assert grown.fallbacks == {"timed_out": 1}
    assert moved(grown) == FITS
    assert grown.pipes_in_use == 0


@pytest.mark.parametrize("to", [SOCKET, PIPE])
@pytest.mark.parametrize("name", ["buffered", "socket", "pipe"])
def test_copyfileobj_to_somebody_who_has_gone(open_bench, name, to):
    def attempt(function: Callable[..., Any], test: Bench) -> Outcome:
        source = test.keep(kind_named(SOURCES, name).make(test, CONTENT[: 200 * KiB]))
        if to == PIPE:
            read_end, write_end = os.pipe()
            os.close(read_end)
            sink = open(write_end, "wb", 0)
        else:
            ours, theirs = test.pair()
            theirs.close()
            sink = ours.makefile("wb", 0)
        outcome = Outcome()
        outcome.call(function, source, test.keep(sink))
        return outcome

    with open_bench() as test:
        wanted = attempt(unpatched_copyfileobj, test)
    with open_bench() as test, counting() as grown:
        got = attempt(shutil.copyfileobj, test)
    assert got == wanted
    assert got.error == (BrokenPipeError, errno.EPIPE)
    assert grown.pipes_in_use == 0
    assert moved(grown) == 0
    assert grown.fallbacks == ({"file_to_pipe": 1} if (name, to) == ("buffered", PIPE) else {})


@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
@pytest.mark.parametrize("sink_at", [0, 50 * KiB])
def test_copyfileobj_onto_the_same_file(open_bench, sink_at, buffering):
    """Two file objects on one file are the original's business."""

    def attempt(function: Callable[..., Any], test: Bench) -> Outcome:
        path = test.path(CONTENT[: 300 * KiB])
        source, sink = test.keep(open(path, "rb")), test.keep(open(path, "r+b", buffering))
        source.seek(100 * KiB)
        sink.seek(sink_at)
        outcome = Outcome()
        outcome.call(function, source, sink)
        outcome.source_at, outcome.sink_at = position(source), position(sink)
        sink.close()
        outcome.arrived = path.read_bytes()
        return outcome

    with open_bench() as test:
        wanted = attempt(unpatched_copyfileobj, test)
    with open_bench() as test, counting() as grown:
        assert attempt(shutil.copyfileobj, test) == wanted
    assert grown.fallbacks == {"same_file": 1}
    assert moved(grown) == 0
