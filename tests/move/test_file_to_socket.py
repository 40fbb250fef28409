"""A file in the page cache goes to a socket by splice(2), and holds no pipe while it waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import counting, digest, file_of, receiver, some_bytes
from ends import GUARD, KiB, MiB, connection, is_waited_for, until

import gsplice
from gsplice._pool import pipe as pool_pipe

SIZE = 20 * MiB + 7


def by_copyfileobj(sock: Any, file: Any) -> int:
    with sock.makefile("wb") as dst:
        gsplice.copyfileobj(file, dst)
    return SIZE


WAYS: dict[str, Callable[[Any, Any], int]] = {
    "sendfile": gsplice.sendfile,
    "_sendfile_use_sendfile": lambda sock, file: sock._sendfile_use_sendfile(file),
    "copyfileobj": by_copyfileobj,
    "copy": lambda sock, file: gsplice.copy(file, sock),
}


@pytest.mark.parametrize("family", ["tcp", "unix"])
@pytest.mark.parametrize("way", WAYS)
def test_a_hot_file_is_spliced(tmp_path: Path, way: str, family: str) -> None:
    path = file_of(tmp_path / "hot", SIZE)
    ours, theirs = connection(family)
    arrived = receiver(theirs)
    with path.open("rb") as file, counting() as grown, gevent.Timeout(GUARD):
        assert WAYS[way](ours, file) == SIZE
        ours.close()
    assert digest(arrived.get()) == digest(some_bytes(SIZE))
    assert grown.bytes_spliced >= 0.95 * SIZE
    assert grown.bytes_sendfile == 0
    assert grown.fallbacks == {}
    assert grown.acquired_local + grown.acquired_global + grown.acquired_new > 0
    assert gsplice.stats().pipes_in_use == 0


def test_slow_readers_hold_no_pipe_and_cost_none(tmp_path: Path) -> None:
    """The pipe goes back before each wait, and the same one is lent again after it."""
    path = file_of(tmp_path / "hot", 4 * MiB)
    pairs = [connection("unix") for _ in range(40)]
    gsplice.pipes.release(gsplice.pipes.acquire())

    def serve(sock: Any) -> int:
        with path.open("rb") as file, sock:
            return gsplice.sendfile(sock, file)

    with counting() as grown:
        serving = [gevent.spawn(serve, ours) for ours, _ in pairs]
        for _ in range(10):
            until(lambda: all(is_waited_for(ours) for ours, _ in pairs))
            assert gsplice.stats().pipes_in_use == 0
            for _, client in pairs:
                assert client.recv(64 * KiB)
        receiving = [receiver(client) for _, client in pairs]
        gevent.joinall([*serving, *receiving], timeout=GUARD, raise_error=True)
    assert {each.get() for each in serving} == {4 * MiB}
    assert grown.bytes_spliced == len(pairs) * 4 * MiB
    assert grown.pipes_created == grown.pipes_closed == 0


def test_what_a_socket_did_not_take_goes_nowhere_but_to_dev_null(tmp_path: Path) -> None:
    """A program may close descriptors that it does not know, and get their numbers for its own."""
    path = file_of(tmp_path / "hot", 2 * MiB)
    pool_pipe._null()
    [null] = pool_pipe._nulls
    with (tmp_path / "own").open("wb") as own:
        os.dup2(own.fileno(), null)
        ours, theirs = connection("unix")
        with path.open("rb") as file:
            sending = gevent.spawn(gsplice.sendfile, ours, file)
            until(lambda: is_waited_for(ours))
            arrived = receiver(theirs)
            assert sending.get(timeout=GUARD) == 2 * MiB
            ours.close()
        assert digest(arrived.get()) == digest(some_bytes(2 * MiB))
        assert null not in pool_pipe._nulls
        assert os.fstat(null).st_ino == os.fstat(own.fileno()).st_ino  # it was not closed
        os.close(null)
    assert (tmp_path / "own").read_bytes() == b""
