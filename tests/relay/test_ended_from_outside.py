"""A relay whose greenlet is killed, or whose sockets another greenlet closes."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import weakref
from pathlib import Path

import gevent
import gevent.socket
import gevent.ssl
import greenlet
import pytest
from conftest import (
    open_descriptors,
    receiver,
    some_bytes,
)
from ends import GUARD, KiB, MiB, is_waited_for, until
from relayed import Relayed, feed, reset
from switches import EXCEPTIONS, Stop, exception_at_switch, quickly
from victims import Victim

import gsplice

pytestmark = pytest.mark.usefixtures("quiet")


def attempt(number: int, exception: BaseException) -> bool:
    """Relay with *exception* in the caller at its *number*-th switch; say whether it got there."""
    forth, back = some_bytes(200 * KiB), some_bytes(150 * KiB, seed=1)
    relayed = Relayed("unix-to-unix", buffers=8 * KiB)
    with contextlib.closing(relayed), exception_at_switch(number, exception) as watched:
        watched.append(relayed.start())
        arrived = [receiver(relayed.server), receiver(relayed.client)]
        feeders = [
            gevent.spawn(feed, relayed.client, forth),
            gevent.spawn(feed, relayed.server, back),
        ]
        relayed.relay.join(GUARD)
        assert relayed.relay.dead
        failed = relayed.relay.exception is not None or isinstance(
            relayed.relay.value, greenlet.GreenletExit
        )
        if failed:
            ended = relayed.relay.exception or relayed.relay.value
            assert ended is exception
            counts = ended.relayed
            for sock in (relayed.a, relayed.b):
                assert sock._read_event.callback is None
                assert sock._write_event.callback is None
        else:
            counts = relayed.relay.value
        assert gsplice.stats().pipes_in_use == 0
        for sock in (relayed.a, relayed.b):
            with contextlib.suppress(OSError):  # both directions have ended well
                sock.shutdown(socket.SHUT_WR)
        received = [each.get(timeout=GUARD) for each in arrived]
        gevent.killall(feeders)
    assert [len(each) for each in received] == list(counts)
    assert forth.startswith(received[0])
    assert back.startswith(received[1])
    assert failed or counts == (len(forth), len(back))
    return failed


@pytest.mark.parametrize("exception", EXCEPTIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_exception_at_a_switch_ends_both_directions(exception: str, every: bool) -> None:
    attempt(1 << 30, Stop())
    before = open_descriptors()
    numbers = iter(range(1, 10_000)) if every else quickly(1, 1000)
    failed = 0
    while attempt(next(numbers), EXCEPTIONS[exception]()):
        failed += 1
        assert open_descriptors() <= before + gsplice.stats().pipes_idle * 2
    assert failed > 5


def test_killed_before_the_other_direction_has_begun() -> None:
    relayed = Relayed()
    with contextlib.closing(relayed):
        started = gevent.spawn(gsplice.relay, relayed.a, relayed.b)
        with exception_at_switch(1, Stop()) as watched:
            watched.append(started)
            started.join(GUARD)
        assert isinstance(started.exception, Stop)
        relayed.server.sendall(b"not for the dead")
        for _ in range(10):
            gevent.sleep(0)
        assert relayed.b.recv(100) == b"not for the dead"


def test_a_relay_leaves_nothing_behind() -> None:
    """No cycle keeps the sockets, whether it ended well, with an error, or was killed."""
    gc.collect()
    gc.disable()
    try:
        for end in ("well", "error", "idle", "killed"):
            relayed = Relayed(idle_timeout=0.05 if end == "idle" else None)
            relayed.start()
            relayed.client.sendall(b"x")
            assert relayed.server.recv(1) == b"x"
            relayed.waiting()
            if end == "well":
                relayed.client.shutdown(socket.SHUT_WR)
                relayed.server.shutdown(socket.SHUT_WR)
            elif end == "error":
                reset(relayed.server)
            elif end == "killed":
                relayed.relay.kill()
            relayed.relay.join(GUARD)
            assert relayed.relay.dead
            refs = [weakref.ref(relayed.a), weakref.ref(relayed.b), weakref.ref(relayed.relay)]
            relayed.close()
            del relayed
            gevent.sleep(0.01)
            assert [ref() for ref in refs] == [None] * 3, end
    finally:
        gc.enable()


# ---- closed by another greenlet


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_socket_closed_while_the_other_takes_no_more(tmp_path: Path, side: str) -> None:
    """The number of the closed one is taken at once, and is not touched."""
    with Relayed("unix-to-unix", buffers=4 * KiB) as relayed:
        sending = gevent.spawn(relayed.client.sendall, bytes(2 * MiB))
        until(lambda: is_waited_for(relayed.b))
        sock = getattr(relayed, side)
        number = sock.fileno()
        sock.close()
        until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
        victim = Victim(tmp_path, number)
        arrived = receiver(relayed.server)
        error = relayed.error()
        assert error.errno == errno.EBADF
        victim.check()
        relayed.b.close()
        relayed.a.close()
        assert len(arrived.get(timeout=GUARD)) == error.relayed.a_to_b
        sending.kill()


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_socket_closed_when_its_direction_has_ended(tmp_path: Path, side: str) -> None:
    """Nobody waits for it then: the next byte for it finds it closed."""
    with Relayed("unix-to-unix") as relayed:
        peer, other = relayed.client, relayed.server
        if side == "b":
            peer, other = other, peer
        peer.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        sock = getattr(relayed, side)
        number = sock.fileno()
        sock.close()
        until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
        victim = Victim(tmp_path, number)
        other.sendall(b"not for the victim")
        assert relayed.error().errno == errno.EBADF
        victim.check()
