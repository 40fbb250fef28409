"""What goes first, what is copied and what is spliced."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from conftest import (
    counting,
    digest,
    receiver,
    some_bytes,
)
from ends import GUARD, KiB, MiB, is_waited_for, until
from relayed import BIG, KINDS, Relayed

import gsplice
from gsplice.config import settings

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("sizes", [(5, 0), (0, 5), (7, 9), (2 * MiB, 3 * MiB)])
def test_initial_bytes_go_first_and_count(kinds: str, sizes: tuple[int, int]) -> None:
    initial = some_bytes(sizes[0]), some_bytes(sizes[1], seed=1)
    with Relayed(kinds, buffers=16 * KiB, initial=initial) as relayed:
        arrived = [receiver(relayed.server), receiver(relayed.client)]
        relayed.client.sendall(b"then this")
        relayed.client.shutdown(socket.SHUT_WR)
        relayed.server.shutdown(socket.SHUT_WR)
        received = [each.get(timeout=GUARD) for each in arrived]
        assert [digest(each) for each in received] == [
            digest(initial[0] + b"then this"),
            digest(initial[1]),
        ]
        assert relayed.result() == (sizes[0] + 9, sizes[1])


def test_initial_may_be_any_bytes_and_may_change_afterwards(unix: Any) -> None:
    (client, a), (b, server) = unix(), unix()
    buffer = bytearray(b"header")
    relaying = gevent.spawn(gsplice.relay, a, b, initial=(buffer, memoryview(b"answer")[2:]))
    assert server.recv(100) == b"header"
    assert client.recv(100) == b"swer"
    buffer += b"more"  # not locked
    client.close()
    server.close()
    assert relaying.get(timeout=GUARD) == (6, 4)


@pytest.mark.parametrize("initial", [b"", b"ab", (b"",), ("a", b""), (5, b""), None])
def test_initial_that_is_no_pair_of_bytes(unix: Any, initial: Any) -> None:
    (a, _), (b, _) = unix(), unix()
    with pytest.raises((TypeError, ValueError)):
        gsplice.relay(a, b, initial=initial)


# ---- which way the bytes go


def test_small_messages_are_copied_and_streams_spliced_in_turns() -> None:
    with Relayed() as relayed:
        for turn in range(3):
            with counting() as grown:
                for _ in range(20):
                    relayed.client.sendall(b"x" * 100)
                    assert len(relayed.server.recv(1000)) == 100
            assert grown.bytes_spliced <= 200  # two short fills end a stream
            assert grown.bytes_spliced + grown.bytes_copied == 2000
            data = some_bytes(BIG, seed=turn)
            with counting() as grown:
                sending = gevent.spawn(relayed.client.sendall, data)
                received = bytearray()
                while len(received) < BIG:
                    received += relayed.server.recv(1 << 20)
                assert digest(received) == digest(data)
                sending.get(timeout=GUARD)
                until(lambda: is_waited_for(relayed.a, "read"))
            assert grown.bytes_spliced > BIG // 2
            assert grown.bytes_spliced + grown.bytes_copied == BIG


def test_idle_relays_hold_no_pipe_and_a_burst_goes_through_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(settings.__dict__, "max_pipes", 4)
    number = 50
    most = max(4, gsplice.stats().pipes_idle)  # those that other tests have left
    with contextlib.ExitStack() as stack, counting() as grown:
        relays = [stack.enter_context(Relayed("unix-to-unix")) for _ in range(number)]
        data = some_bytes(1 * MiB)
        for relayed in relays:
            relayed.client.sendall(b"hello")
            assert relayed.server.recv(10) == b"hello"
        until(lambda: all(is_waited_for(relayed.a, "read") for relayed in relays))
        assert gsplice.stats().pipes_in_use == 0
        senders = [gevent.spawn(relayed.client.sendall, data) for relayed in relays]
        until(lambda: all(is_waited_for(relayed.b, "write") for relayed in relays))  # all stalled
        assert gsplice.stats().pipes_in_use <= most
        for relayed in relays:
            received = bytearray()
            while len(received) < len(data):
                received += relayed.server.recv(1 << 20)
            assert digest(received) == digest(data)
        gevent.joinall(senders, timeout=GUARD, raise_error=True)
        until(lambda: all(is_waited_for(relayed.a, "read") for relayed in relays))
        assert gsplice.stats().pipes_in_use == 0
    assert grown.fallbacks["no_pipe"] > 0
    assert grown.bytes_spliced > 0
    assert grown.bytes_spliced + grown.bytes_copied == number * (len(data) + 5)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 1000), (1000, 1000), (600_000, 600_000)])
def test_urgent_data_is_not_the_end(before: int, after: int, inline: bool) -> None:
    """At TCP's urgent mark splice() answers 0, or EAGAIN, while the socket is readable."""
    data = some_bytes(before + after)
    with Relayed("tcp-to-unix") as relayed:
        if inline:
            relayed.a.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        arrived = receiver(relayed.server)
        relayed.client.sendall(data[:before])
        relayed.client.send(b"!", socket.MSG_OOB)
        relayed.client.sendall(data[before:])
        relayed.client.shutdown(socket.SHUT_WR)
        expected = data[:before] + b"!" * inline + data[before:]
        assert digest(arrived.get(timeout=GUARD)) == digest(expected)
        relayed.server.close()
        relayed.result()


def test_a_stream_that_never_waits_gives_way(monkeypatch: pytest.MonkeyPatch, unix: Any) -> None:
    (client, a), (b, server) = unix(), unix()
    total, left, turns = 64 * MiB, 64 * MiB, 0
    moved_since = longest = 0
    splice = os.splice

    def spliced(*args: Any, **kwargs: Any) -> int:
        nonlocal left, moved_since, longest
        with contextlib.suppress(BlockingIOError):
            while left:
                left -= client._sock.send(bytes(min(left, 64 * KiB)))
            client._sock.shutdown(socket.SHUT_WR)
        number = splice(*args, **kwargs)
        moved_since += number
        longest = max(longest, moved_since)
        with contextlib.suppress(BlockingIOError):
            while server._sock.recv(1 << 20):
                pass
        return number

    def take_turns() -> None:
        nonlocal turns, moved_since
        while True:
            turns += 1
            moved_since = 0
            gevent.sleep(0)

    monkeypatch.setattr(os, "splice", spliced)
    others = gevent.spawn(take_turns)
    relaying = gevent.spawn(gsplice.relay, a, b)
    client.sendall(bytes(128 * KiB))
    server.shutdown(socket.SHUT_WR)
    assert relaying.get(timeout=GUARD) == (total + 128 * KiB, 0)
    others.kill()
    assert longest <= 10 * MiB  # in and out of the pipe, and one piece more
    assert turns >= 2 * total // (10 * MiB)
