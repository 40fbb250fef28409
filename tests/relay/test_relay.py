"""relay(): the set of Go's TestSplice, each way an end can end, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import greenlet
import pytest
from conftest import (
    counting,
    digest,
    ended_with,
    open_descriptors,
    receive_all,
    receiver,
    run_program,
    some_bytes,
)
from ends import GUARD, KiB, MiB, connection, is_waited_for, until
from paths import PYTHONPATH
from relayed import BIG, KINDS, Relayed, exchange, reset, send_and_end
from switches import EXCEPTIONS, Stop, exception_at_switch, quickly
from victims import Victim

import gsplice
from gsplice._relay.direction import READ
from gsplice.config import settings


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relays that fail in their greenlets need not fill the log."""
    monkeypatch.setattr(gevent.get_hub(), "print_exception", lambda *args: None)


# ---- the set of Go's TestSplice (src/net/splice_test.go)


@pytest.mark.parametrize("kinds", KINDS)
def test_simple(kinds: str) -> None:
    with Relayed(kinds) as relayed, counting() as grown:
        relayed.client.sendall(b"forth")
        assert relayed.server.recv(100) == b"forth"
        relayed.server.sendall(b"and back")
        assert relayed.client.recv(100) == b"and back"
        relayed.client.shutdown(socket.SHUT_WR)
        relayed.server.shutdown(socket.SHUT_WR)
        assert relayed.result() == (5, 8)
        assert relayed.result().a_to_b == 5
    assert (grown.bytes_copied, grown.transfers, grown.fallbacks) == (13, 2, {})


@pytest.mark.parametrize("kinds", KINDS)
def test_multiple_writes(kinds: str) -> None:
    with Relayed(kinds) as relayed:
        for number in range(100):
            message = b"%d" % number * (1 + number % 7)
            relayed.client.sendall(message)
            assert relayed.server.recv(1000) == message
            relayed.server.sendall(message[::-1])
            assert relayed.client.recv(1000) == message[::-1]
        exchange_rest = some_bytes(100 * KiB)
        arrived = receiver(relayed.server)
        relayed.client.sendall(exchange_rest)
        relayed.client.shutdown(socket.SHUT_WR)
        assert digest(arrived.get(timeout=GUARD)) == digest(exchange_rest)
        relayed.server.shutdown(socket.SHUT_WR)
        relayed.result()


@pytest.mark.parametrize("kinds", KINDS)
def test_big(kinds: str) -> None:
    with Relayed(kinds) as relayed, counting() as grown:
        exchange(relayed, some_bytes(BIG), some_bytes(BIG + 1, seed=1))
    assert grown.bytes_spliced + grown.bytes_copied == 2 * BIG + 1
    assert grown.bytes_spliced > BIG
    assert grown.fallbacks == {}


@pytest.mark.long
@pytest.mark.parametrize("kinds", KINDS)
def test_big_of_1_gib(kinds: str) -> None:
    piece = some_bytes(8 * MiB)
    with Relayed(kinds) as relayed:
        sums = []

        def send(sock: Any) -> None:
            for _ in range(128):
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)

        def receive(sock: Any) -> None:
            at = 0
            while data := sock.recv(1 << 20):
                while data:
                    part = data[: len(piece) - at]
                    assert part == piece[at : at + len(part)]
                    at, data = (at + len(part)) % len(piece), data[len(part) :]
            sums.append(at)

        work = [gevent.spawn(send, s) for s in (relayed.client, relayed.server)]
        work += [gevent.spawn(receive, s) for s in (relayed.client, relayed.server)]
        gevent.joinall(work, timeout=100, raise_error=True)
        assert relayed.result() == (1 << 30, 1 << 30)
        assert sums == [0, 0]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("limit", [1, 1000, 200_000])
def test_bounded_copy(kinds: str, limit: int) -> None:
    """What copy() with a count leaves in the socket is what a relay begins with."""
    relayed = Relayed(kinds)
    data = some_bytes(300 * KiB)
    with contextlib.closing(relayed):
        arrived = receiver(relayed.server)
        sending = gevent.spawn(relayed.client.sendall, data)
        assert gsplice.copy(relayed.a, relayed.b, limit) == limit
        relayed.start()
        sending.get(timeout=GUARD)
        relayed.client.shutdown(socket.SHUT_WR)
        assert digest(arrived.get(timeout=GUARD)) == digest(data)
        relayed.server.shutdown(socket.SHUT_WR)
        assert relayed.result() == (len(data) - limit, 0)


@pytest.mark.parametrize("kinds", KINDS)
def test_bounded_copy_at_its_limit(kinds: str) -> None:
    relayed = Relayed(kinds)
    data = some_bytes(100 * KiB)
    with contextlib.closing(relayed):
        arrived = receiver(relayed.server)
        sending = gevent.spawn(relayed.client.sendall, data)
        assert gsplice.copy(relayed.a, relayed.b, len(data)) == len(data)
        sending.get(timeout=GUARD)
        relayed.start()
        relayed.client.shutdown(socket.SHUT_WR)
        relayed.server.shutdown(socket.SHUT_WR)
        assert relayed.result() == (0, 0)
        assert digest(arrived.get(timeout=GUARD)) == digest(data)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("size", [0, 1, READ, BIG])
def test_reader_at_eof(kinds: str, size: int) -> None:
    """The client has ended before the relay begins."""
    relayed = Relayed(kinds)
    data = some_bytes(size)
    with contextlib.closing(relayed):
        arrived = receiver(relayed.server)
        sending = gevent.spawn(send_and_end, relayed.client, data)
        if size <= READ:
            sending.get(timeout=GUARD)
        relayed.start()
        assert digest(arrived.get(timeout=GUARD)) == digest(data)
        relayed.server.sendall(b"answer")
        assert relayed.client.recv(100) == b"answer"
        relayed.server.shutdown(socket.SHUT_WR)
        assert relayed.client.recv(100) == b""
        assert relayed.result() == (size, 6)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("kinds", KINDS)
def test_issue_25985(kinds: str, side: str) -> None:
    """One side is closed, by another greenlet, while both directions wait."""
    with Relayed(kinds) as relayed:
        relayed.client.sendall(b"before")
        assert relayed.server.recv(100) == b"before"
        relayed.waiting()
        getattr(relayed, side).close()
        error = relayed.error()
        assert isinstance(error, OSError)
        assert error.errno == errno.EBADF
        assert error.relayed == (6, 0)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("kinds", KINDS)
def test_a_peer_that_closes_while_the_other_waits(kinds: str, side: str) -> None:
    with Relayed(kinds) as relayed:
        relayed.waiting()
        getattr(relayed, side).close()
        other = relayed.client if side == "server" else relayed.server
        assert other.recv(100) == b""
        other.close()
        assert relayed.result() == (0, 0)


# ---- system calls that fail, by strace, in a process of its own

PROGRAM = """
import json, socket, sys
import gevent, gsplice
from conftest import open_descriptors, receiver, some_bytes
from relayed import Relayed, send_and_end

forth, back = some_bytes(3 << 20), some_bytes(2_000_000, seed=1)
gevent.sleep(0)
relayed = Relayed("unix-to-tcp")
with relayed, gevent.Timeout(50):
    for number in range(20):
        relayed.client.sendall(b"ping")
        assert relayed.server.recv(100) == b"ping"
    arrived = [receiver(relayed.server), receiver(relayed.client)]
    gevent.spawn(send_and_end, relayed.client, forth)
    gevent.spawn(send_and_end, relayed.server, back)
    assert [each.get() for each in arrived] == [forth, back]
    result = relayed.relay.get()
figures = gsplice.stats().as_dict()
print(json.dumps({"result": result, **figures}))
"""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("calls", "error", "when"),
    [
        ("splice", "EAGAIN", "1+2"),
        ("splice", "EAGAIN", "1..100"),
        ("splice,recvfrom,sendto", "EAGAIN", "1+2"),
        ("splice,recvfrom,sendto", "EAGAIN", "2+3"),
        ("splice,recvfrom,sendto", "EINTR", "1+2"),
        ("splice", "EINVAL", "1"),
        ("splice", "ENOSYS", "4"),
        ("splice", "EINVAL", "1+1"),
    ],
)
def test_eagain_at_every_step(tmp_path: Path, calls: str, error: str, when: str) -> None:
    """Also EINTR, and a kernel that refuses to splice."""
    log = tmp_path / "strace.log"
    inject = [f"--inject={call}:error={error}:when={when}" for call in calls.split(",")]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", log, "-e", f"trace={calls}", *inject]
        + [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=GUARD * 3,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["result"] == [(3 << 20) + 80, 2_000_000]
    assert said["pipes_in_use"] == 0
    assert said["bytes_spliced"] + said["bytes_copied"] == sum(said["result"])
    trace = log.read_text()
    for call in calls.split(","):
        assert any(f" {call}(" in line and "INJECTED" in line for line in trace.splitlines())
    if error in ("EAGAIN", "EINTR"):
        assert said["fallbacks"] == {}
        assert said["bytes_spliced"] > 0
    else:
        assert 1 <= said["fallbacks"]["refused"] <= 2  # once in each direction


@pytest.mark.parametrize("kinds", KINDS)
def test_without_pipes_all_is_copied(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.__dict__, "max_pipes", 0)
    held = []  # what was idle
    while (pipe := gsplice.pipes.acquire()) is not None:
        held.append(pipe)
    with Relayed(kinds) as relayed, counting() as grown:
        exchange(relayed, some_bytes(BIG), some_bytes(1 * MiB, seed=1))
    for pipe in held:
        gsplice.pipes.release(pipe)
    assert grown.bytes_copied == BIG + 1 * MiB
    assert grown.fallbacks["no_pipe"] > 0


# ---- half-close


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("kinds", KINDS)
def test_the_other_direction_goes_on_after_a_half_close(kinds: str, first: str) -> None:
    second = "server" if first == "client" else "client"
    with Relayed(kinds) as relayed:
        ended, other = getattr(relayed, first), getattr(relayed, second)
        ended.sendall(b"request")
        ended.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b"request"
        arrived = receiver(ended)
        data = some_bytes(BIG)
        for at in range(0, len(data), 700_000):
            other.sendall(data[at : at + 700_000])
            gevent.sleep(0.001)
        assert not relayed.relay.dead
        other.shutdown(socket.SHUT_WR)
        assert digest(arrived.get(timeout=GUARD)) == digest(data)
        assert sorted(relayed.result()) == [7, BIG]


@pytest.mark.parametrize("kinds", KINDS)
def test_the_end_comes_after_the_last_byte(kinds: str) -> None:
    """The pipe is full of bytes when the source ends, and the reader is slow."""
    data = some_bytes(BIG)
    with Relayed(kinds, buffers=16 * KiB) as relayed:
        sending = gevent.spawn(lambda: (relayed.client.sendall(data), relayed.client.close()))
        until(lambda: is_waited_for(relayed.b, "write"))
        received = bytearray()
        while piece := relayed.server.recv(50_000):
            received += piece
        assert digest(received) == digest(data)
        sending.get(timeout=GUARD)
        relayed.server.close()
        assert relayed.result() == (BIG, 0)


def test_a_peer_that_has_reset_after_the_other_ended_is_no_error_of_the_half_close() -> None:
    """shutdown() says ENOTCONN of a connection that has been reset; nothing was left to send."""
    relayed = Relayed()
    with contextlib.closing(relayed):
        relayed.client.shutdown(socket.SHUT_WR)
        reset(relayed.server)
        relayed.start()
        error = relayed.error()  # of the direction that reads from it
        assert isinstance(error, ConnectionResetError)


# ---- errors


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("phase", ["idle", "small", "bulk", "stalled", "half-closed"])
def test_a_reset_ends_both_directions(phase: str, side: str) -> None:
    with Relayed(buffers=64 * KiB if phase == "stalled" else None) as relayed:
        breaking = getattr(relayed, side)
        other = relayed.client if side == "server" else relayed.server
        ours = relayed.a if side == "server" else relayed.b
        moved = 0
        if phase == "small":
            other.sendall(b"small")
            assert breaking.recv(100) == b"small"
            moved = 5
        elif phase in ("bulk", "stalled"):
            gevent.spawn(other.sendall, bytes(64 * MiB))
            if phase == "bulk":
                while moved < 2 * MiB:
                    moved += len(breaking.recv(1 << 20))
            else:
                away = relayed.b if side == "server" else relayed.a
                until(lambda: is_waited_for(away))
        elif phase == "half-closed":
            other.shutdown(socket.SHUT_WR)
            assert breaking.recv(100) == b""
        if phase in ("idle", "small"):
            relayed.waiting()
        reset(breaking)
        error = relayed.error()
        assert isinstance(error, ConnectionResetError | BrokenPipeError)
        there, back = error.relayed
        assert (there if side == "server" else back) >= moved
        assert (back if side == "server" else there) == 0
        # both sockets are the caller's still
        assert ours.fileno() >= 0
        ours.sendall(b"we are sorry")


def test_writing_to_a_peer_that_has_closed_is_a_broken_pipe_as_unpatched() -> None:
    def unpatched(a: Any, b: Any) -> None:
        while data := a.recv(65536):
            b.sendall(data)

    errors = []
    for forward in (unpatched, gsplice.relay):
        client, a = connection("unix")
        b, server = connection("unix")
        server.close()
        client.sendall(b"x")
        with pytest.raises(OSError, match="pipe") as caught:
            forward(a, b)
        errors.append((type(caught.value), caught.value.errno))
        for sock in (client, a, b):
            sock.close()
    assert errors[0] == errors[1] == (BrokenPipeError, errno.EPIPE)


# ---- time


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


class OwnRecv(gevent.socket.socket):
    """A socket that is used through its methods."""

    def recv(self, *args: Any) -> bytes:
        return super().recv(*args)


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


# ---- killed


def feed(sock: Any, data: bytes) -> None:
    """Send all of *data*, then end, if the other side lets us."""
    with contextlib.suppress(OSError):
        send_and_end(sock, data)


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


# ---- what has been received already


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
        assert gsplice.stats().pipes_in_use <= 4
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
    assert longest <= 8 * MiB
    assert turns >= 2 * total // (8 * MiB)


# ---- other sockets


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-keyout", path, "-out", path.with_suffix(".crt")],
        check=True,
        capture_output=True,
    )
    with path.open("ab") as file:
        file.write(path.with_suffix(".crt").read_bytes())
    return path


def tls(certificate: Path, plain: Any, peer: Any) -> tuple[Any, Any]:
    """Wrap both ends of a connection: the first is the TLS client's."""
    server_side = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    client_side = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_mode = gevent.ssl.CERT_NONE
    shaking = gevent.spawn(
        server_side.wrap_socket, peer, server_side=True, suppress_ragged_eofs=False
    )
    client = client_side.wrap_socket(plain, suppress_ragged_eofs=False)
    return client, shaking.get(timeout=GUARD)


@pytest.mark.parametrize("first", ["plain", "tls"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_tls_on_one_side(certificate: Path, side: str, first: str) -> None:
    """No byte is lost, whoever ends first, and the TLS peer gets its close_notify."""
    relayed = Relayed()
    if side == "a":
        relayed.client, relayed.a = tls(certificate, relayed.client, relayed.a)
        encrypted, plain = relayed.client, relayed.server
    else:
        relayed.b, relayed.server = tls(certificate, relayed.b, relayed.server)
        encrypted, plain = relayed.server, relayed.client
    for sock in (relayed.a, relayed.b, encrypted):
        relayed.callback(sock.close)
    from_plain, from_tls = some_bytes(BIG), some_bytes(1 * MiB, seed=1)

    def speak_tls() -> bytes:
        received = bytearray()
        while len(received) < BIG:
            received += encrypted.recv(1 << 16)
        encrypted.sendall(from_tls)
        encrypted.unwrap()  # waits until the other side has said the same
        return bytes(received)

    with relayed, counting() as grown:
        speaking = gevent.spawn(speak_tls)
        arrived = receiver(plain)
        if first == "plain":
            send_and_end(plain, from_plain)
            assert digest(arrived.get(timeout=GUARD)) == digest(from_tls)
        else:
            plain.sendall(from_plain)
            assert digest(arrived.get(timeout=GUARD)) == digest(from_tls)
            assert not relayed.relay.dead
            plain.shutdown(socket.SHUT_WR)
        assert digest(speaking.get(timeout=GUARD)) == digest(from_plain)
        assert sorted(relayed.result()) == [len(from_tls), len(from_plain)]
    assert grown.fallbacks == {"socket_type": 1}


def test_tls_is_no_plain_bytes_after_a_half_close(certificate: Path) -> None:
    """gevent's shutdown() of a TLS socket ends decryption: recv() would give ciphertext."""
    relayed = Relayed()
    relayed.b, server = tls(certificate, relayed.b, relayed.server)
    with relayed, relayed.b, server:
        relayed.client.sendall(b"request")
        relayed.client.shutdown(socket.SHUT_WR)
        assert server.recv(100) == b"request"
        gevent.sleep(0.01)
        server.sendall(b"answer")
        assert relayed.client.recv(100) == b"answer"
        server.close()  # without close_notify
        assert isinstance(relayed.error(), OSError)  # gevent was told to tell such an end


def test_a_subclass_with_its_own_recv_gets_its_way(unix: Any) -> None:
    class Shouting(gevent.socket.socket):
        def recv(self, *args: Any) -> bytes:
            return super().recv(*args).upper()

    (client, a), (b, server) = unix(), unix()
    shouting = Shouting(fileno=a.detach())
    with shouting, counting() as grown:
        relaying = gevent.spawn(gsplice.relay, shouting, b, initial=(b"first ", b""))
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == b"first HELLO"
        server.sendall(b"quiet")
        server.close()
        assert receive_all(client) == b"quiet"
        assert relaying.get(timeout=GUARD) == (11, 5)
    assert grown.fallbacks == {"socket_type": 1}


def test_what_is_no_stream_socket_of_this_hub(unix: Any) -> None:
    sock, _ = unix()
    native, other = socket.socketpair()
    datagrams, _ = gevent.socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    non_blocking, _ = unix()
    non_blocking.setblocking(False)
    for wrong, error, message in (
        (native, TypeError, "b is a native socket"),
        (datagrams, TypeError, "b must be a stream socket"),
        (object(), TypeError, "b must be a socket"),
        (non_blocking, ValueError, "b has timeout 0"),
        (sock, ValueError, "same socket"),
    ):
        with pytest.raises(error, match=message):
            gsplice.relay(sock, wrong)
    for each in (native, other, datagrams):
        each.close()


def test_a_socket_of_another_threads_hub(unix: Any) -> None:
    sock, _ = unix()
    errors = []

    def run() -> None:
        ours, peer = gevent.socket.socketpair()
        try:
            gsplice.relay(ours, sock)
        except ValueError as err:
            errors.append(str(err))
        for each in (ours, peer):
            each.close()
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(GUARD)
    assert len(errors) == 1
    assert "another thread" in errors[0]


def test_a_closed_socket(unix: Any) -> None:
    (a, _), (b, _) = unix(), unix()
    b.close()
    with pytest.raises(OSError, match=r"Bad file|closed") as caught:
        gsplice.relay(a, b)
    assert caught.value.errno == errno.EBADF


def test_a_socket_that_somebody_reads_from_already(unix: Any) -> None:
    (a, _), (b, _) = unix(), unix()
    reading = gevent.spawn(b.recv, 1)
    until(lambda: is_waited_for(b, "read"))
    with pytest.raises(gevent.exceptions.ConcurrentObjectUseError):
        gsplice.relay(a, b)
    reading.kill()


# ---- threads and processes


def test_two_hubs_in_two_threads() -> None:
    results = []

    def run(seed: int) -> None:
        with Relayed() as relayed:
            exchange(relayed, some_bytes(BIG, seed), some_bytes(BIG, seed + 1))
            results.append(relayed.result())
        gevent.get_hub().destroy(destroy_loop=True)

    threads = [threading.Thread(target=run, args=(10 * n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert results == [(BIG, BIG)] * 2


INHERIT = """
import json, os, sys, gevent, gevent.os, gevent.socket, gsplice
a, b = (gevent.socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
stalled = sys.argv[3] == "stalled"
relaying = gevent.spawn(gsplice.relay, a, b)
event = b._write_event if stalled else a._read_event
with gevent.Timeout(30):
    while event.callback is None:
        gevent.sleep(0.001)
figures = gsplice.stats()
pid = gevent.os.fork_gevent()
if pid == 0:
    error = None
    try:
        with gevent.Timeout(30):
            relaying.join()
        error = getattr(relaying.exception, "errno", repr(relaying.exception))
    except BaseException as err:
        error = repr(err)
    grown = gsplice.stats()
    moved = grown.bytes_spliced + grown.bytes_copied
    moved -= figures.bytes_spliced + figures.bytes_copied
    os.write(1, json.dumps(["child", error, moved, grown.pipes_in_use]).encode() + b"\\n")
    os._exit(0)
os.write(1, b'"forked"\\n')
assert os.waitpid(pid, 0)[1] == 0
with gevent.Timeout(60):
    result = relaying.get()
os.write(1, json.dumps(["parent", *result, gsplice.stats().pipes_in_use]).encode() + b"\\n")
os._exit(0)
"""


@pytest.mark.parametrize("phase", ["stalled", "waiting"])
def test_a_relay_under_way_at_a_fork_ends_in_the_child(phase: str) -> None:
    """The child, which shares the sockets, moves nothing and half-closes nothing."""
    (client, a), (b, server) = (socket.socketpair() for _ in range(2))
    data = some_bytes(3 * MiB)
    command = [sys.executable, "-c", INHERIT, str(a.fileno()), str(b.fileno()), phase]
    with ended_with(command, pass_fds=(a.fileno(), b.fileno())) as process:
        a.close()
        b.close()
        assert process.stdout is not None

        def feed() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        feeder = threading.Thread(target=feed)
        if phase == "stalled":
            feeder.start()
        assert process.stdout.readline() == b'"forked"\n'
        if phase == "waiting":
            feeder.start()
        arrived = receive_all(server)
        server.sendall(b"thanks")
        server.close()
        assert receive_all(client) == b"thanks"
        reports = [json.loads(line) for line in process.stdout]
        feeder.join(GUARD)
    client.close()
    assert digest(arrived) == digest(data)
    assert reports == [["child", errno.ECANCELED, 0, 0], ["parent", len(data), 6, 0]]


def test_without_monkey_patching_and_without_patch_all() -> None:
    """relay() is a function like any other: nothing has to be patched for it."""
    program = """
import gevent, gevent.socket, gsplice
client, a = gevent.socket.socketpair()
b, server = gevent.socket.socketpair()
relaying = gevent.spawn(gsplice.relay, a, b)
client.sendall(b"x")
assert server.recv(1) == b"x"
client.close()
server.close()
print(relaying.get())
a.close()
b.close()
"""
    assert run_program(program) == "RelayResult(a_to_b=1, b_to_a=0)\n"
