"""Which thread does a job, and what belongs to it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    some_bytes,
)
from ends import GUARD, Ends, MiB, threads_done, until
from gevent.monkey import get_original
from slow_disks import LANE, cold, hub_threads

import gsplice
from gsplice._threads import job, workers
from gsplice._threads.threads import Threads

pytestmark = pytest.mark.usefixtures("threads_idle")


def test_where_no_thread_can_be_started_the_job_is_done_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(function: Any, args: Any) -> None:
        raise RuntimeError("can't start new thread")

    size = 3 * MiB
    threads_of_its_own = Threads(gevent.get_hub())
    monkeypatch.setitem(gevent.get_hub().__dict__, "_gsplice_threads", threads_of_its_own)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_start_thread", no_thread)
        path = cold(tmp_path / "cold", size)
        with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size
            assert digest(finish()) == digest(some_bytes(size))
    assert grown.offloads == 0
    assert threads_of_its_own._busy == 0
    assert not +threads_of_its_own._running
    assert threads_of_its_own.run((), lambda: 1, (), (), ()) == 1  # it has only this to do
    assert not len(threads_of_its_own._workers)


def test_one_filesystem_gets_half_of_the_threads_whatever_it_is_copied_to() -> None:
    ours, going = hub_threads(), []
    gate = get_original("threading", "Event")()

    def wait_for(devices: tuple[int, ...]) -> None:
        ours.run(devices, gate.wait, (), (GUARD,), ())

    try:
        going = [gevent.spawn(wait_for, (1,)) for _ in range(LANE)]
        going += [gevent.spawn(wait_for, (1, 2)) for _ in range(LANE)]
        until(lambda: ours._running[1] == LANE)
        assert ours.run((2,), lambda: "served", (), (), ()) == "served"
        assert ours._running[1] == LANE
    finally:
        gate.set()
        gevent.joinall(going, timeout=GUARD, raise_error=True)
    assert ours._busy == 0


def test_a_pipe_belongs_to_one_side_whenever_its_greenlet_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kill comes when the thread has done its job, and has not said so yet."""
    take, hub_thread = job._take, threading.get_ident()
    arrived, gate = get_original("threading", "Event")(), get_original("threading", "Event")()
    taken_by_thread: list[int] = []

    def take_slowly(tokens: list[None]) -> bool:
        if threading.get_ident() != hub_thread:
            taken_by_thread.append(1)
            if len(taken_by_thread) == 2:
                arrived.set()
                gate.wait(GUARD)
        return take(tokens)

    def transfer() -> None:
        pipe = gsplice.pipes.acquire()
        assert pipe is not None
        pipe.pending = gsplice.pipes.UNKNOWN

        def job() -> None:
            pipe.pending = 0

        try:
            hub_threads().run((), job, (), (), (pipe,))
        finally:
            gsplice.pipes.release(pipe)

    monkeypatch.setattr(job, "_take", take_slowly)
    going = gevent.spawn(transfer)
    until(arrived.is_set)
    going.kill()
    others = gsplice.pipes.acquire()
    assert others is not None
    gate.set()
    threads_done()
    assert others.read_fd >= 0
    gsplice.pipes.release(others)
