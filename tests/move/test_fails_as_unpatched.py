"""Errors are those of the unpatched function on the same ends."""

from __future__ import annotations

import errno
import select
import shutil
import socket
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    receive_all,
    receiver,
    some_bytes,
)
from ends import GUARD, Ends, MiB, is_waited_for, until
from gevent.exceptions import ConcurrentObjectUseError
from gevent.monkey import get_original
from pairs import outcome
from unpatched import unpatched_copyfileobj

import gsplice

Scenario = Callable[[Ends, Callable[..., Any], str], Any]


#: For each name the patched function and the unpatched one.
SENDERS = {
    "sendfile": (
        lambda src, dst: dst.sendfile(src),
        lambda src, dst: get_original("gevent._socket3.socket", "sendfile")(dst, src),
    ),
    "copyfileobj": (
        lambda src, dst: shutil.copyfileobj(src, dst),
        unpatched_copyfileobj,
    ),
}


class Sending:
    """A transfer to a peer that does not read, under way and waiting for it."""

    def __init__(self, ends: Ends, sender: str, send: Callable[..., Any]) -> None:
        self.src = ends.source("file", some_bytes(4 * MiB))
        self.sock, self.peer = ends.connect()
        self.dst = self.sock
        if sender == "copyfileobj":
            self.dst = ends.enter_context(self.sock.makefile("wb", buffering=0))
        self.greenlet = ends.spawn(outcome, send, self.src, self.dst)
        # An acknowledgement that is late makes room once more: then it goes on, closed or not.
        until(lambda: is_waited_for(self.sock) and not select.select([], [self.sock], [], 0)[1])

    def close(self) -> None:
        self.dst.close()
        self.sock.close()

    def result(self) -> Any:
        return self.greenlet.get(timeout=GUARD)


def reset(sock: Any) -> None:
    """Close *sock* in a way that its peer meets ECONNRESET."""
    linger_not = b"\1\0\0\0\0\0\0\0"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
    sock.close()


@pytest.mark.parametrize(
    "happening",
    [
        lambda sending: reset(sending.peer),
        lambda sending: sending.peer.close(),
        lambda sending: sending.close(),
        lambda sending: sending.sock.shutdown(socket.SHUT_WR),
    ],
    ids=["peer resets", "peer closes early", "socket closed", "socket shut down"],
)
@pytest.mark.parametrize("sender", SENDERS)
def test_a_broken_send_fails_as_unpatched(
    small_ends: Ends, sender: str, happening: Callable[[Sending], None]
) -> None:
    results = []
    with counting() as grown:
        for send in SENDERS[sender]:
            sending = Sending(small_ends, sender, send)
            happening(sending)
            results.append(sending.result())
    assert results[0] == results[1]
    assert issubclass(results[0][0], OSError)
    assert grown.bytes_spliced > 0


@pytest.mark.parametrize("sender", SENDERS)
def test_the_file_closed_under_way_fails_as_unpatched(small_ends: Ends, sender: str) -> None:
    results = []
    for send in SENDERS[sender]:
        sending = Sending(small_ends, sender, send)
        sending.src.close()
        small_ends.callback(receiver(sending.peer).kill)
        results.append(sending.result())
        sending.close()
    assert results[0] == results[1] == (ValueError, None)


@pytest.mark.parametrize("sender", SENDERS)
def test_a_peer_that_never_reads_runs_into_the_timeout(small_ends: Ends, sender: str) -> None:
    results, sent = [], []
    for send in SENDERS[sender]:
        src = small_ends.source("file", some_bytes(4 * MiB))
        sock, peer = small_ends.connect()
        sock.settimeout(0.05)
        dst = sock if sender == "sendfile" else sock.makefile("wb", buffering=0)
        results.append(outcome(send, src, dst))
        dst.close()
        sock.close()
        sent.append((src.tell(), len(receive_all(peer))))
    assert results[0] == results[1] == (TimeoutError, None)
    assert sent[0][0] == sent[0][1]


@pytest.mark.parametrize("sender", SENDERS)
def test_one_greenlet_at_a_time_may_wait_for_a_socket(small_ends: Ends, sender: str) -> None:
    for send in SENDERS[sender]:
        sending = Sending(small_ends, sender, send)
        others = some_bytes(1 * MiB, seed=1)
        other = small_ends.source("file", others)
        assert outcome(send, other, sending.dst) == (ConcurrentObjectUseError, None)
        arrived = receiver(sending.peer)
        assert sending.result()[0] == "returned"
        sending.close()
        received = arrived.get(timeout=GUARD)
        if send is SENDERS[sender][0]:  # unpatched, a file may stand where it was read to
            # On Linux 6.1 a socket that poll(2) does not call writable may take some bytes more.
            sent = others[: other.tell()]
            before, _, after = received.partition(sent) if sent else (received, b"", b"")
            assert len(received) == 4 * MiB + len(sent)
            assert digest(before + after) == digest(some_bytes(4 * MiB))


def start_receiving(
    ends: Ends, copy: Callable[..., Any], buffering: int = -1
) -> tuple[Any, Any, Any, gevent.Greenlet]:
    """Start *copy* from a peer that has sent something; return when it waits for more."""
    sock, peer = ends.connect()
    peer.sendall(b"x" * 1000)
    path = ends.path()
    dst = ends.enter_context(path.open("wb", buffering=0))
    src = sock.makefile("rb", buffering=buffering)
    receiving = ends.spawn(outcome, copy, src, dst)
    until(lambda: path.exists() and path.stat().st_size == 1000)
    until(lambda: is_waited_for(sock, "read"))
    return sock, peer, (src, dst), receiving


COPIES = [lambda src, dst: shutil.copyfileobj(src, dst), unpatched_copyfileobj]


@pytest.mark.parametrize(
    "happening",
    [
        lambda sock, peer, files: reset(peer),
        lambda sock, peer, files: (files[0].close(), sock.close()),
        lambda sock, peer, files: sock.shutdown(socket.SHUT_RD),
    ],
    ids=["peer resets", "socket closed", "socket shut down"],
)
@pytest.mark.parametrize("buffering", [0])
def test_a_broken_receive_fails_as_unpatched(
    ends: Ends, happening: Callable[..., None], buffering: int
) -> None:
    results = []
    for copy in COPIES:
        sock, peer, files, receiving = start_receiving(ends, copy, buffering)
        happening(sock, peer, files)
        results.append(receiving.get(timeout=GUARD))
        assert files[1].closed or files[1].tell() == 1000
    assert results[0] == results[1]


def test_a_destination_closed_while_the_source_is_waited_for(ends: Ends) -> None:
    results = []
    for copy in COPIES:
        _, peer, (_, dst), receiving = start_receiving(ends, copy, 0)
        dst.close()
        peer.sendall(b"more")
        peer.close()
        results.append(receiving.get(timeout=GUARD))
    assert results[0] == results[1] == (ValueError, None)


@pytest.mark.parametrize("end", ["file", "socket"])
def test_a_socket_closed_while_a_pipe_is_waited_for(ends: Ends, end: str) -> None:
    """Neither end has been asked since when the bytes come."""
    results = []
    for copy in [*COPIES, lambda src, dst: gsplice.copy(src, dst)]:
        if end == "socket" and copy in COPIES:
            continue  # knows file objects only
        src, feeder = ends.pipe(buffering=0)
        sock, _ = ends.connect()
        dst = sock.makefile("wb", buffering=0) if end == "file" else sock
        copying = ends.spawn(outcome, copy, src, dst)
        gevent.sleep(0)  # it runs until it waits for the pipe
        dst.close()
        sock.close()
        feeder.write(b"more")
        feeder.close()
        results.append(copying.get(timeout=GUARD))
    assert set(results) == {(ValueError, None) if end == "file" else (OSError, errno.EBADF)}


def test_a_timed_out_socket_file_refuses_reads_as_unpatched(ends: Ends) -> None:
    for copy in COPIES:
        sock, _ = ends.connect()
        sock.settimeout(0.05)
        src = sock.makefile("rb", buffering=0)
        dst, _ = ends.sink("file")
        assert outcome(copy, src, dst) == (TimeoutError, None)
        assert outcome(copy, src, dst) == (OSError, None)
        assert outcome(src.read, 1) == (OSError, None)
