"""The pool: where pipes come from, where they go, and that none is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest
from conftest import counting, receiver, some_bytes
from ends import MiB
from pool import in_thread, inode, is_open, lend

import gsplice
from gsplice._pool import idle, lending
from gsplice.pipes import IDLE, UNKNOWN, Pipe, acquire, release

# Acquiring and releasing


def test_a_pipe_comes_from_the_hub_then_from_all_then_from_the_kernel(
    limits: Callable[..., None],
) -> None:
    left: list[int] = []

    def leave_one() -> None:
        pipe = lend()
        left.append(inode(pipe))
        release(pipe)

    mine = lend()
    in_thread(leave_one)
    release(mine)
    with counting() as first:
        assert acquire() is mine
    with counting() as second:
        shared = lend()
    assert [inode(shared)] == left
    with counting() as third:
        new = lend()
    assert (first.acquired_local, first.acquired_global, first.acquired_new) == (1, 0, 0)
    assert (second.acquired_local, second.acquired_global, second.acquired_new) == (0, 1, 0)
    assert (third.acquired_local, third.acquired_global, third.acquired_new) == (0, 0, 1)
    assert third.pipes_created == 1
    for pipe in (mine, shared, new):
        release(pipe)


def test_a_pipe_goes_back_to_the_hub_that_acquired_it(limits: Callable[..., None]) -> None:
    pipe = lend()
    in_thread(lambda: release(pipe))
    assert lending._local.keeper.home.idle == [pipe]


def test_a_pipe_whose_hub_is_gone_goes_to_all(limits: Callable[..., None]) -> None:
    lent: list[Pipe] = []
    in_thread(lambda: lent.append(lend()))
    release(lent[0])
    assert idle.shared == lent
    assert acquire() is lent[0]
    release(lent[0])
    assert lending._local.keeper.home.idle == lent


def test_the_newest_pipe_comes_first(limits: Callable[..., None]) -> None:
    limits(max_idle_hub=3)
    lent = [lend() for _ in range(6)]
    for pipe in lent:
        release(pipe)
    assert [acquire() for _ in range(6)] == [*lent[2::-1], *lent[:2:-1]]


def test_a_released_pipe_goes_to_the_hub_then_to_all_then_away(limits: Callable[..., None]) -> None:
    limits(max_idle_hub=1, max_idle=2)
    lent = [lend() for _ in range(4)]
    inodes = list(map(inode, lent))
    with counting() as grown:
        for pipe in lent:
            release(pipe)
    assert [pipe.pending for pipe in lent] == [IDLE, IDLE, IDLE, UNKNOWN]
    assert (grown.pipes_idle, grown.pipes_closed, grown.pipes_in_use) == (3, 1, -4)
    assert lent[0] in lending._local.keeper.home.idle
    assert lent[1:3] == idle.shared
    assert list(map(is_open, inodes)) == [True, True, True, False]


def test_a_hub_that_may_keep_none_shares_all(limits: Callable[..., None]) -> None:
    limits(max_idle_hub=0, max_idle=1)
    pipe = lend()
    release(pipe)
    with counting() as grown:
        assert acquire() is pipe
    assert grown.acquired_global == 1


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_than_max_pipes(most: int, limits: Callable[..., None]) -> None:
    limits(max_pipes=most)
    with counting() as grown:
        lent = [lend() for _ in range(most)]
        assert acquire() is None
        assert acquire() is None
    assert grown.pipes_created == grown.acquired_new == most
    for pipe in lent:
        release(pipe)
    if most:
        again = acquire()
        assert again is lent[-1]
        release(again)


def test_a_closed_pipe_makes_room_for_another(limits: Callable[..., None]) -> None:
    limits(max_pipes=1)
    pipe = lend()
    pipe.close()
    other = lend()
    assert other is not pipe
    assert acquire() is None


def test_without_pipes_a_transfer_delivers_and_says_so(
    limits: Callable[..., None], tcp: Callable[[], Any]
) -> None:
    limits(max_pipes=0)
    (source, sender), (sink, target) = tcp(), tcp()
    data = some_bytes(3 * MiB)
    arriving = receiver(target)
    with counting() as grown:
        sending = gevent.spawn(lambda: (source.sendall(data), source.close()))
        with sender.makefile("rb", 0) as src, sink.makefile("wb") as dst:
            gsplice.copyfileobj(src, dst)
        sink.close()
        sending.get()
    assert arriving.get() == data
    assert grown.fallbacks == {"no_pipe": 1}
    assert grown.bytes_spliced == grown.pipes_created == 0
