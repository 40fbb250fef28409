"""relay(): the set of Go's TestSplice, each way an end can end, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
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
from ends import GUARD, KiB, MiB
from paths import PYTHONPATH
from relayed import BIG, KINDS, Relayed, exchange, send_and_end

import gsplice
from gsplice._relay.direction import READ
from gsplice.config import settings

pytestmark = pytest.mark.usefixtures("quiet")


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
