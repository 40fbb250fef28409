"""One direction of a relay ends: the other goes on after an end, and not after an error."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import sys
import termios
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from conftest import (
    digest,
    receive_all,
    receiver,
    some_bytes,
)
from ends import GUARD, KiB, MiB, connection, is_waited_for, until
from relayed import BIG, KINDS, OwnRecv, Relayed, reset

import gsplice
from gsplice._ends.stream import unread

pytestmark = pytest.mark.usefixtures("quiet")


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


def not_acknowledged(sock: Any) -> int:
    """Return how many bytes that were sent the other end does not have yet (tcp(7), SIOCOUTQ)."""
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


ANSWER = b"HTTP/1.1 413 Content Too Large\r\n\r\n" + some_bytes(1 * MiB)


@pytest.mark.few(6)
@pytest.mark.parametrize("through_methods", [False, True])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("kinds", KINDS)
def test_an_early_answer_arrives_whole(kinds: str, side: str, through_methods: bool) -> None:
    """A server answers, and closes its end, while the client goes on uploading."""
    relayed = Relayed(kinds, buffers=16 * KiB)
    with contextlib.closing(relayed):
        if through_methods:
            for name in ("a", "b"):
                own = OwnRecv(fileno=getattr(relayed, name).detach())
                relayed.callback(own.close)
                setattr(relayed, name, own)
        answering = getattr(relayed, side)
        uploading = relayed.client if side == "server" else relayed.server
        relayed.start()

        def upload() -> None:
            with contextlib.suppress(OSError):
                while True:
                    uploading.sendall(bytes(64 * KiB))

        def answer() -> None:
            assert answering.recv(1000)
            answering.sendall(ANSWER)
            until(lambda: unread(answering.fileno()) > 0)  # so that the close resets
            until(lambda: not_acknowledged(answering) == 0)  # which drops what has not been sent
            answering.close()

        sender, answerer = gevent.spawn(upload), gevent.spawn(answer)
        received = bytearray()
        while len(received) < len(ANSWER):
            received += uploading.recv(50_000)
        assert received == ANSWER
        answerer.get(timeout=GUARD)
        error = relayed.error()
        assert isinstance(error, ConnectionResetError | BrokenPipeError)
        there, back = error.relayed
        assert (back if side == "server" else there) == len(ANSWER)
        sender.kill()


def test_the_error_of_sending_waits_for_the_other_direction() -> None:
    """The peer takes no more, but is not done with its answer."""
    with Relayed("unix-to-unix") as relayed:
        relayed.waiting()
        relayed.server.shutdown(socket.SHUT_RD)  # sending to it is EPIPE now
        relayed.client.sendall(b"x")
        until(lambda: not is_waited_for(relayed.a, "read"))  # that direction has ended
        assert not relayed.relay.dead
        relayed.server.sendall(b"an answer")
        assert relayed.client.recv(100) == b"an answer"
        relayed.server.close()
        error = relayed.error()
        assert isinstance(error, BrokenPipeError)
        assert error.relayed == (0, 9)


def test_two_errors_and_the_first_is_raised() -> None:
    with Relayed("tcp-to-tcp") as relayed:
        relayed.waiting()
        relayed.a.shutdown(socket.SHUT_WR)  # sending to the client is EPIPE now
        relayed.server.sendall(b"x")
        until(lambda: not is_waited_for(relayed.b, "read"))
        assert not relayed.relay.dead
        reset(relayed.client)
        error = relayed.error()
        assert isinstance(error, BrokenPipeError)
        assert isinstance(error.__cause__, ConnectionResetError)
        assert error.relayed == (0, 0)


def test_an_idle_timeout_ends_what_an_error_of_sending_has_left() -> None:
    with Relayed("unix-to-unix", idle_timeout=0.05) as relayed:
        relayed.server.shutdown(socket.SHUT_RD)
        relayed.client.sendall(b"x")
        error = relayed.error()
        assert isinstance(error, BrokenPipeError)
        assert isinstance(error.__cause__, TimeoutError)


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
