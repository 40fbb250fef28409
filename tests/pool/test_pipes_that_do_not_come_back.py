"""Pipes that are closed instead of lent again."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import counting
from pool import assert_balanced, in_thread, inode, is_open, lend

import gsplice
from gsplice.pipes import UNKNOWN, Pipe, acquire, release


@pytest.mark.parametrize("pending", [1, 5, UNKNOWN])
@pytest.mark.parametrize("holds", [b"", b"other"])
def test_a_pipe_not_known_to_be_empty_is_closed(
    pending: int, holds: bytes, limits: Callable[..., None]
) -> None:
    pipe = lend()
    number = inode(pipe)
    if holds:
        os.write(pipe.write_fd, holds)
    pipe.pending = pending
    with counting() as grown:
        release(pipe)
    assert (grown.pipes_closed, grown.pipes_in_use, grown.pipes_idle) == (1, -1, 0)
    assert (pipe.read_fd, pipe.write_fd, pipe.pending) == (-1, -1, UNKNOWN)
    assert not is_open(number)
    assert acquire() is not pipe


@pytest.mark.parametrize("room", [0, 1])
def test_releasing_twice_is_refused(room: int, limits: Callable[..., None]) -> None:
    limits(max_idle_hub=room)
    pipe = lend()
    release(pipe)
    with pytest.raises(ValueError, match="twice"):
        release(pipe)
    assert acquire() is pipe
    assert acquire() is not pipe


def test_releasing_in_two_threads_is_refused(limits: Callable[..., None]) -> None:
    pipe = lend()
    release(pipe)

    def again() -> str:
        with pytest.raises(ValueError, match="twice") as caught:
            release(pipe)
        return str(caught.value)

    assert "belongs to the pool" in in_thread(again)
    assert gsplice.stats().pipes_idle == 1


def test_releasing_a_closed_pipe_does_nothing(limits: Callable[..., None]) -> None:
    pipe = lend()
    pipe.close()
    with counting() as grown:
        release(pipe)
    assert (grown.pipes_closed, grown.pipes_idle) == (0, 0)
    assert lend().read_fd >= 0
    assert_balanced()


def test_a_pipe_closed_after_its_release_is_not_lent(limits: Callable[..., None]) -> None:
    pipe = lend()
    with contextlib.closing(pipe):
        release(pipe)
    assert_balanced()
    assert lend().read_fd >= 0


def test_closing_again_leaves_alone_whoever_has_the_descriptors_now(
    limits: Callable[..., None],
) -> None:
    pipe = lend()
    numbers = (pipe.read_fd, pipe.write_fd)
    pipe.close()
    theirs = os.pipe()
    assert theirs == numbers
    pipe.close()
    pipe.__del__()
    del pipe
    for fd in theirs:
        os.close(fd)  # EBADF if closed before


def test_closed_once_by_many_threads(limits: Callable[..., None]) -> None:
    threads, rounds = 6, 100
    lent = []
    barrier = threading.Barrier(threads, action=lambda: lent.append(lend()))
    opened: list[int] = []

    def close() -> None:
        for _ in range(rounds):
            barrier.wait()
            lent[-1].close()
            opened.extend(os.pipe())  # with the numbers that the first to close gave back

    with counting() as grown:
        closers = [threading.Thread(target=close) for _ in range(threads)]
        for thread in closers:
            thread.start()
        for thread in closers:
            thread.join()
    assert grown.pipes_closed == grown.pipes_created == rounds
    assert len(set(opened)) == len(opened) == 2 * threads * rounds
    for fd in opened:
        os.close(fd)


def close_interrupted(pipe: Pipe, at: int) -> bool:
    """Close *pipe*; at line *at* of that, somebody else closes it too and opens another."""
    theirs: list[int] = []
    lines = 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != inspect.getfile(Pipe):
            return None
        lines += event == "line"
        if lines == at and not theirs:
            pipe.close()
            theirs.extend(os.pipe())
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pipe.close()
    finally:
        sys.settrace(before)
    for fd in theirs:
        os.close(fd)  # EBADF if closed before
    return bool(theirs)


def test_closed_once_whenever_another_close_comes_in_between(limits: Callable[..., None]) -> None:
    interrupted = 0
    while close_interrupted(lend(), interrupted + 1):
        interrupted += 1
    assert interrupted >= 5
    assert_balanced()


def test_dropping_the_last_reference_closes(limits: Callable[..., None]) -> None:
    pipe = lend()
    number = inode(pipe)
    with counting() as grown:
        del pipe
    assert not is_open(number)
    assert (grown.pipes_closed, grown.pipes_in_use) == (1, -1)
    assert_balanced()


def test_a_pipe_in_a_cycle_is_closed_by_a_collection(limits: Callable[..., None]) -> None:
    cycle: list[Any] = [lend()]
    number = inode(cycle[0])
    cycle.append(cycle)
    del cycle
    assert is_open(number)
    gc.collect()
    assert not is_open(number)
    assert_balanced()
