"""A hot transfer lets others run, and many slow ones hold next to nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, file_of, no_pipe_to_be_had, some_bytes
from ends import GUARD, Ends, KiB, MiB, is_waited_for, until

import gsplice

HOT = 256 * MiB
#: Two turns of the loop for one that waits, 4 MiB each, counted as they go into the pipe and out of
#: it, and one piece more.
MOST_BETWEEN_TURNS = 20 * MiB


class Others:
    """A greenlet that takes every turn it can get, and how many bytes moved between its turns.

    It either is always ready, or waits for a byte, of which one comes with the next piece.
    """

    def __init__(self, waits: bool) -> None:
        self.ours, self._theirs = gevent.socket.socketpair()
        self._waits = waits
        self.turns = 0
        self.longest = 0
        self.since_turn = 0
        self.greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            self.turns += 1
            self.longest = max(self.longest, self.since_turn)
            self.since_turn = 0
            if self._waits:
                self.ours.recv(1 << 16)
            else:
                gevent.sleep(0)

    def moved(self, number: int) -> None:
        if self._waits and not self.since_turn:
            self._theirs._sock.send(b"x")
        self.since_turn += number
        self.longest = max(self.longest, self.since_turn)

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()

    def check(self) -> None:
        assert self.longest <= MOST_BETWEEN_TURNS
        assert self.turns >= HOT // MOST_BETWEEN_TURNS


@pytest.fixture(params=["always ready", "waits"])
def others(request: pytest.FixtureRequest) -> Iterator[Others]:
    made = Others(request.param == "waits")
    yield made
    made.greenlet.kill()
    made.close()


def drain(peer: Any) -> None:
    """Take everything that *peer* has, without waiting."""
    try:
        while peer._sock.recv(1 << 20):
            pass
    except BlockingIOError:
        pass


def top_up(peer: Any, left: list[int]) -> None:
    """Give *peer* everything that it takes, without waiting."""
    try:
        while left[0]:
            left[0] -= peer._sock.send(bytes(min(left[0], 64 * KiB)))
        peer._sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have something happen before and after each call of a function of os: a perfect peer."""

    def wrap(name: str, before: Callable[[], Any], after: Callable[[int], Any]) -> None:
        call = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> int:
            before()
            number = call(*args, **kwargs)
            after(number)
            return number

        monkeypatch.setattr(os, name, wrapped)

    return wrap


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.few(1)
def test_a_hot_sendfile_gives_way(tmp_path: Path, unix: Any, around: Any, others: Others) -> None:
    """The receiver is as fast as can be: the sender never meets EAGAIN."""
    sock, peer = unix()
    filled = itertools.cycle([False, True])  # and drained

    def after(number: int) -> None:
        if next(filled):
            others.moved(number)
            drain(peer)

    around("splice", lambda: None, after)
    with sparse(tmp_path / "hot", HOT).open("rb") as src, counting() as grown:
        assert sock.sendfile(src) == HOT
    assert grown.bytes_spliced == HOT
    others.check()


def test_a_hot_socket_to_socket_copy_gives_way(unix: Any, around: Any, others: Others) -> None:
    src, feeder = unix()
    dst, peer = unix()
    left = [HOT]
    moved = 0

    def after(number: int) -> None:
        nonlocal moved
        moved += number
        others.moved(number)
        drain(peer)

    around("splice", lambda: top_up(feeder, left), after)
    with counting() as grown:
        assert gsplice.copy(src, dst) == HOT
    assert grown.bytes_spliced == HOT
    assert moved == 2 * HOT  # in and out: the fills count as well
    others.check()


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_hot_file_to_file_copy_gives_way(tmp_path: Path, buffering: int) -> None:
    """Each piece is copied on a thread; whoever spins on the hub would starve that of the GIL."""
    turns: list[int] = []

    def take_turns() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0.0001)

    others = gevent.spawn(take_turns)
    with (
        sparse(tmp_path / "hot", HOT).open("rb", buffering) as src,
        (tmp_path / "copy").open("wb", buffering) as dst,
        counting() as grown,
    ):
        gsplice.copyfileobj(src, dst)
    others.kill()
    assert grown.bytes_copy_file_range == HOT
    assert grown.offloads >= HOT // MOST_BETWEEN_TURNS
    assert turns


@pytest.mark.parametrize(
    ("call", "source", "sink"),
    [
        ("splice", "file", "unix"),
        ("sendfile", "file", "unix"),
        ("splice", "unix", "file"),
        ("copy_file_range", "file", "file"),
    ],
)
def test_no_single_call_asks_for_more_than_a_few_mib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, source: str, sink: str
) -> None:
    asked: list[int] = []
    original = getattr(os, call)

    def recorded(*args: Any, **kwargs: Any) -> int:
        asked.append(args[3] if call == "sendfile" else args[2])
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, recorded)
    with contextlib.ExitStack() as stack:
        if call == "sendfile":
            stack.enter_context(no_pipe_to_be_had(monkeypatch))
        ends = stack.enter_context(Ends(tmp_path))
        gsplice.copy(ends.source(source, bytes(20 * MiB)), ends.sink(sink)[0])
    assert asked
    assert max(asked) <= 4 * MiB


# ---- a thousand slow clients

CLIENTS = 1000
BIG = 4 * MiB


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CLIENTS
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident() -> int:
    """Return how much memory this process has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.few(1)
@pytest.mark.parametrize("function", ["sendfile", "copyfileobj"])
@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_slow_clients(tmp_path: Path, unix: Any, function: str) -> None:
    clients = CLIENTS if function == "sendfile" else CLIENTS // 5
    path = file_of(tmp_path / "big", BIG)
    expected = some_bytes(BIG)

    def serve(sock: Any) -> None:
        with path.open("rb") as src, sock:
            if function == "sendfile":
                assert sock.sendfile(src) == BIG
            else:
                with sock.makefile("wb") as dst:
                    gsplice.copyfileobj(src, dst)
                    assert src.tell() == BIG

    pairs = [unix() for _ in range(clients)]
    held = resident()
    with counting() as grown:
        servers = [gevent.spawn(serve, ours) for ours, _ in pairs]
        until(lambda: all(is_waited_for(ours) for ours, _ in pairs))
        positions = [0] * clients
        most_pipes = 0
        for _ in range(5):
            for number, (_, client) in enumerate(pairs):
                data = client.recv(KiB)
                at = positions[number]
                assert data == expected[at : at + len(data)]
                positions[number] += len(data)
            gevent.sleep(0)
            most_pipes = max(most_pipes, gsplice.stats().pipes_in_use)
        assert most_pipes <= 16
        assert resident() - held < clients * 256 * KiB
        assert not any(server.dead for server in servers)

        for number, (_, client) in enumerate(pairs):
            at = positions[number]
            while data := client.recv(1 << 20):
                assert data == expected[at : at + len(data)]
                at += len(data)
            assert at == BIG
        gevent.joinall(servers, timeout=GUARD, raise_error=True)
    assert grown.bytes_spliced == clients * BIG
    assert grown.transfers == clients
    assert gsplice.stats().pipes_in_use == 0
