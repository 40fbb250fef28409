"""How long a relay waits: ``idle_timeout``, and the timeouts of the sockets."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from conftest import (
    digest,
    receiver,
    some_bytes,
)
from ends import KiB, MiB, is_waited_for, until
from relayed import OwnRecv, Relayed, exchange, send_and_end

import gsplice

pytestmark = pytest.mark.usefixtures("quiet")


def test_an_idle_relay_ends() -> None:
    with Relayed(idle_timeout=0.1) as relayed:
        relayed.client.sendall(b"x")
        error = relayed.error()
        assert isinstance(error, TimeoutError)
        assert "0.1 seconds" in str(error)
        assert error.relayed == (1, 0)


class Clock:
    """The clock that idle relays look at, every hundredth of a real second in these tests."""

    TIMEOUT = 0.08

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now

    def pass_most_of_the_timeout(self) -> None:
        """Let time pass, and have it looked at before and after."""
        for seconds in (0.0, 0.9 * self.TIMEOUT):
            self.now += seconds
            before = self.looks
            until(lambda before=before: self.looks >= before + 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sys.modules["gsplice._relay.relay"], "monotonic", made)
    return made


@pytest.mark.parametrize("side", ["client", "server"])
def test_one_direction_keeps_a_relay_from_being_idle(clock: Clock, side: str) -> None:
    with Relayed(idle_timeout=clock.TIMEOUT) as relayed:
        sock = getattr(relayed, side)
        other = relayed.client if side == "server" else relayed.server
        for _ in range(5):
            sock.sendall(b"x")
            assert other.recv(1) == b"x"
            clock.pass_most_of_the_timeout()
        assert not relayed.relay.dead
        clock.now += clock.TIMEOUT
        assert isinstance(relayed.error(), TimeoutError)


@pytest.mark.parametrize("ended", [False, True])
def test_a_slow_reader_that_still_drains_is_not_idle(clock: Clock, ended: bool) -> None:
    data = some_bytes(64 * KiB)
    with Relayed("unix-to-unix", buffers=4 * KiB, idle_timeout=clock.TIMEOUT) as relayed:
        gevent.spawn(send_and_end, relayed.client, data)
        if ended:  # only one direction is left
            relayed.server.shutdown(socket.SHUT_WR)
            assert relayed.client.recv(1) == b""
        received, slow = bytearray(), 0
        while piece := relayed.server.recv(8 * KiB):
            received += piece
            gevent.sleep(0.001)
            if not relayed.relay.dead and is_waited_for(relayed.b):
                clock.pass_most_of_the_timeout()
                slow += 1
        assert slow >= 3
        assert digest(received) == digest(data)
        relayed.server.close()
        assert relayed.result() == (len(data), 0)


def test_a_stalled_reader_is_idle() -> None:
    with Relayed("unix-to-unix", buffers=4 * KiB, idle_timeout=0.1) as relayed:
        gevent.spawn(relayed.client.sendall, bytes(8 * MiB))
        error = relayed.error()
        assert isinstance(error, TimeoutError)
        assert 0 < error.relayed.a_to_b < 8 * MiB


@pytest.mark.parametrize("idle_timeout", [0, -1, float("nan")])
def test_an_idle_timeout_that_makes_no_sense(unix: Any, idle_timeout: float) -> None:
    (a, _), (b, _) = unix(), unix()
    with pytest.raises(ValueError, match="idle_timeout"):
        gsplice.relay(a, b, idle_timeout=idle_timeout)


def test_an_idle_timeout_without_end() -> None:
    with Relayed(idle_timeout=float("inf")) as relayed:
        exchange(relayed, b"forth", b"back")


def locals_of(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield from frame.f_locals.values()
        frame = frame.f_back


@pytest.mark.parametrize("kind", ["plain", "subclass"])
def test_an_idle_relay_holds_no_bytes(kind: str) -> None:
    with Relayed() as relayed:
        if kind == "subclass":
            relayed.relay.kill()
            own = OwnRecv(fileno=relayed.a.detach())
            relayed.callback(own.close)
            relayed.a = own
            relayed.start()
        relayed.waiting()
        relayed.client.sendall(bytes(60_000))
        received = 0
        while received < 60_000:
            received += len(relayed.server.recv(60_000))
        relayed.waiting()
        held = [each for each in locals_of(relayed.relay.gr_frame) if isinstance(each, bytes)]
        assert max(map(len, held), default=0) == 0


def test_what_methods_have_sent_is_counted_piece_by_piece() -> None:
    """An idle timeout would end a relay whose bytes are moving."""
    relayed = Relayed("unix-to-unix", buffers=4 * KiB)
    own = OwnRecv(fileno=relayed.b.detach())
    relayed.callback(own.close)
    relayed.b = own
    relayed.options = {"initial": (bytes(1 * MiB), b"")}
    with relayed:
        received = 0
        while received < 100_000:
            received += len(relayed.server.recv(10_000))
        relayed.relay.kill()
        assert relayed.relay.dead
        result = relayed.relay.value.relayed if relayed.relay.value else None
        assert result is not None and received - 16 * KiB <= result.a_to_b < 1 * MiB


def test_the_timeouts_of_the_sockets_apply_to_each_wait() -> None:
    """As in recv(): one direction that waits for too long ends both, though the other moves."""
    relayed = Relayed()
    relayed.b.settimeout(0.2)
    with relayed:

        def keep_talking() -> None:
            with contextlib.suppress(OSError):
                while True:
                    relayed.client.sendall(b"x")
                    gevent.sleep(0.01)

        talking = gevent.spawn(keep_talking)
        error = relayed.error()
        talking.kill()
        assert isinstance(error, TimeoutError)
        assert str(error) == "timed out"
        assert error.relayed.a_to_b > 0


def test_both_sockets_time_out_at_once() -> None:
    """Of timers due at the same time libuv keeps a list on the hub's stack: it crashed here."""
    with contextlib.ExitStack() as stack:
        relays = []
        for _ in range(50):
            relayed = Relayed("unix-to-unix")
            relayed.a.settimeout(0.05)
            relayed.b.settimeout(0.05)
            relays.append(stack.enter_context(relayed))
        for relayed in relays:
            assert isinstance(relayed.error(), TimeoutError)


def test_the_timeout_of_a_socket_that_takes_no_more() -> None:
    relayed = Relayed("unix-to-unix", buffers=4 * KiB)
    relayed.b.settimeout(0.1)
    with relayed:
        arrived = receiver(relayed.client)
        relayed.callback(arrived.kill)

        def keep_talking() -> None:  # so that the other direction does not wait for too long
            while True:
                relayed.server.sendall(b"x")
                gevent.sleep(0.01)

        talking = gevent.spawn(keep_talking)
        sending = gevent.spawn(relayed.client.sendall, bytes(8 * MiB))
        error = relayed.error()
        talking.kill()
        sending.kill()
        assert isinstance(error, TimeoutError)
        assert error.relayed.b_to_a > 0
