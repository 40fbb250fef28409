"""A filesystem keeps its answers back: the hub goes round, and others are served."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from cold import with_a_cold_file
from conftest import (
    counting,
    digest,
    ended_with,
    file_of,
    open_descriptors,
    some_bytes,
)
from ends import GUARD, Ends, MiB, threads_done, until
from gevent.monkey import get_original
from slow_disks import (
    LANE,
    TO_ANY,
    TO_SOCKET,
    Clock,
    cold,
    hub_threads,
    moved,
    needed_a_thread,
    outcome,
)
from slowfs import SlowFS

import gsplice

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.parametrize("size", [5000, 1 * MiB])
@pytest.mark.parametrize("way", TO_ANY)
def test_the_hub_goes_round_while_a_read_is_held(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock, way: str, size: int
) -> None:
    file_of(slow.directory / name, size)
    slow.hold(name)
    with counting() as grown:
        moving = gevent.spawn(outcome, tmp_path, way, TO_ANY[way][0], slow.mount / name)
        until(lambda: slow.begun(name))
        clock.goes_on()
        assert not moving.dead
        slow.release(name)
        assert moving.get(timeout=GUARD)[1:] == (digest(some_bytes(size)), size)
    assert grown.offloads > 0
    assert moved(grown) == size


def test_a_file_read_by_another_client_is_waited_for_on_a_thread(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock
) -> None:
    """Its pages are in the page cache, but they are not read yet."""
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)
    clients = [
        gevent.spawn(outcome, tmp_path, "copy", gsplice.copy, slow.mount / name) for _ in range(2)
    ]
    until(lambda: slow.begun(name))
    clock.goes_on()
    slow.release(name)
    for client in clients:
        assert client.get(timeout=GUARD)[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)


def test_those_that_queue_for_a_thread_hold_no_pipe(many_held: list[str]) -> None:
    assert len(many_held) > LANE
    assert gsplice.stats().pipes_in_use == LANE


def test_dns_is_not_delayed(many_held: list[str], slow: SlowFS) -> None:
    hub = gevent.get_hub()
    with gevent.Timeout(GUARD):
        assert hub.threadpool.apply(lambda: "done") == "done"
        assert gevent.socket.getaddrinfo("localhost", 80)
    assert sum(map(slow.begun, many_held)) == LANE


@with_a_cold_file
def test_a_fast_filesystem_is_served_meanwhile(
    many_held: list[str], slow: SlowFS, tmp_path: Path
) -> None:
    path = cold(tmp_path / "fast", 3 * MiB)
    with counting() as grown, gevent.Timeout(GUARD):
        got = outcome(tmp_path, "sendfile", TO_SOCKET["sendfile"][0], path)
    assert got == (3 * MiB, digest(some_bytes(3 * MiB)), 3 * MiB)
    needed_a_thread(grown)
    assert sum(map(slow.begun, many_held)) == LANE


def test_a_slow_filesystem_serves_in_the_order_of_asking(
    slow: SlowFS, tmp_path: Path, name: str
) -> None:
    names = [f"{name}{number}" for number in range(3 * LANE)]
    moving = []
    for one in names:
        file_of(slow.directory / one, 5000)
        (tmp_path / one).mkdir()
        slow.hold(one)
        moving.append(gevent.spawn(outcome, tmp_path / one, "copy", gsplice.copy, slow.mount / one))
        gevent.sleep(0)  # it asks now

    def order() -> list[str]:
        return [one for one in slow.order() if one in names]

    until(lambda: len(order()) == LANE)
    assert sorted(order()) == sorted(names[:LANE])
    for done in range(len(names) - LANE):
        slow.release(names[done])
        until(lambda done=done: len(order()) > LANE + done)
        assert order()[LANE:] == names[LANE : LANE + done + 1]
    for one in names[-LANE:]:
        slow.release(one)
    for greenlet in moving:
        assert greenlet.get(timeout=GUARD)[1] == digest(some_bytes(5000))


class Held:
    """Jobs for threads that are held back; who has begun, in order."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self._gates: dict[Any, Any] = {}

    def job(self, who: Any) -> Any:
        gate = self._gates[who] = get_original("_thread", "allocate_lock")()
        gate.acquire()
        self.begun.append(who)
        gate.acquire()
        return who

    def release(self, who: Any) -> None:
        until(lambda: who in self._gates)
        self._gates[who].release()


def test_who_has_had_a_turn_queues_behind_those_who_wait() -> None:
    held = Held()

    def two_jobs(number: int) -> None:
        for turn in range(2):
            assert hub_threads().run((1,), held.job, (), ((turn, number),), ()) == (turn, number)

    workers = [gevent.spawn(two_jobs, number) for number in range(LANE + 3)]
    until(lambda: len(held.begun) == LANE)
    for done in range(3):
        held.release((0, done))
        until(lambda done=done: len(held.begun) > LANE + done)
    begun = held.begun[LANE:]
    released = [(0, number) for number in range(3)]
    for who in [(turn, number) for turn in range(2) for number in range(LANE + 3)]:
        if who not in released:
            gevent.spawn(held.release, who)
    gevent.joinall(workers, timeout=GUARD, raise_error=True)
    assert begun == [(0, LANE), (0, LANE + 1), (0, LANE + 2)]
    assert all(worker.dead for worker in workers)


# ---- no page cache, one thread, nobody who could tell


@pytest.mark.parametrize("size", [5000, 1 * MiB])
def test_without_a_page_cache(tmp_path: Path, clock: Clock, size: int) -> None:
    with SlowFS(tmp_path, "--direct-io") as slow:
        for way, (patched, unpatched) in TO_ANY.items():
            name = "".join(filter(str.isalpha, way))
            path = slow.mount / name
            file_of(slow.directory / name, size)
            slow.hold(name)
            with counting() as grown:
                moving = gevent.spawn(outcome, tmp_path, way, patched, path)
                until(lambda name=name: slow.begun(name))
                clock.goes_on()
                slow.release(name)
                got = moving.get(timeout=GUARD)
            assert got[1:] == (digest(some_bytes(size)), size)
            assert grown.offloads > 0
            assert got == outcome(tmp_path, way, unpatched, path)


def test_a_file_whose_size_nobody_knows(tmp_path: Path, clock: Clock) -> None:
    """As in /proc, where 0 is said to be the size of everything."""
    with SlowFS(tmp_path, "--direct-io", "--sizeless") as slow:
        file_of(slow.directory / "file", 5000)
        for way, (patched, unpatched) in TO_ANY.items():
            slow.hold("file")
            moving = gevent.spawn(outcome, tmp_path, way, patched, slow.mount / "file")
            clock.goes_on()
            slow.release("file")
            got = moving.get(timeout=GUARD)
            assert got[1] == digest(some_bytes(5000))
            assert got == outcome(tmp_path, way, unpatched, slow.mount / "file")


def test_killed_in_the_queue_of_a_filesystem_that_does_nothing_else(
    tmp_path: Path, clock: Clock
) -> None:
    """Even to close a file it has to be waited for."""
    with SlowFS(tmp_path, "--single-threaded") as slow, Ends(tmp_path) as ends:
        names = [f"file{number}" for number in range(LANE + 1)]
        for one in names:
            file_of(slow.directory / one, 1 * MiB)
        files = [ends.enter_context((slow.mount / one).open("rb")) for one in names]
        for one in names:
            slow.hold(one)
        sinks = [ends.sink("bare_unix") for _ in names]
        before = open_descriptors()
        moving = [
            ends.spawn(gsplice.copy, file, dst) for file, (dst, _) in zip(files, sinks, strict=True)
        ]
        until(lambda: sum(map(slow.begun, names)) >= 1)
        clock.goes_on()
        moving[-1].kill()  # in the queue
        moving[0].kill()  # at work
        clock.goes_on()
        for one in names:
            slow.release(one)
        for greenlet, (_, finish) in zip(moving[1:-1], sinks[1:-1], strict=True):
            assert greenlet.get(timeout=GUARD) == 1 * MiB
            assert digest(finish()) == digest(some_bytes(1 * MiB))
        threads_done()
        assert open_descriptors() <= before + 2 * gsplice.stats().pipes_idle


#: What a user who neither owns the file nor may write it sees of it.
STRANGER = """
import ctypes, os, sys, gevent, gevent.socket, gevent.threadpool, gsplice
from gsplice._os.linux import in_core
from gsplice._ends.page_cache import Residency, learn_filesystems_and_run
gsplice.patch_all()
path, = sys.argv[1:]
ours, theirs = gevent.socket.socketpair()
src = open(path, 'rb')
if os.getuid() == 0:
    os.setuid(65534)
size = os.fstat(src.fileno()).st_size
assert in_core(src.fileno(), 0, size), 'the kernel has told the truth'
status = os.fstat(src.fileno())
learn_filesystems_and_run((status.st_dev,), lambda fd: None, src.fileno())
assert Residency(status).cached(src.fileno(), 0, size) == 0
sending = gevent.spawn(ours.sendfile, src)
for _ in range(20):
    gevent.sleep(0.001)
assert not sending.dead
print('goes round', flush=True)
received = 0
while received < size:
    received += len(theirs.recv(1 << 20))
assert sending.get() == size
print(gsplice.stats().offloads, flush=True)
"""


def test_a_file_of_somebody_else(slow: SlowFS, name: str) -> None:
    """Of which the kernel says that all its pages are resident (mincore(2), Linux 5.2)."""
    assert os.geteuid() == 0, "only root can become somebody else"
    path = file_of(slow.directory / name, 1 * MiB)
    path.chmod(0o644)
    slow.hold(name)
    with ended_with([sys.executable, "-c", STRANGER, str(slow.mount / name)]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"goes round\n"
        slow.release(name)
        assert int(child.stdout.read()) > 0
    assert child.returncode == 0
