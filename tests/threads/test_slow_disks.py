"""The hub never waits for a disk: real files that are cold, and a filesystem that takes its time.

While a test holds back the reads (or writes) of the filesystem, its own greenlet runs only if the
hub does not wait for them; :meth:`SlowFS.release` fails if nobody came to let them go.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from fcntl import F_SETPIPE_SZ, LOCK_EX, fcntl, lockf
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from cold import drop
from conftest import (
    counting,
    digest,
    ended_with,
    file_of,
    no_pipe_to_be_had,
    open_descriptors,
    run_program,
    some_bytes,
)
from ends import GUARD, Ends, KiB, MiB, is_waited_for, threads_done, until
from gevent.monkey import get_original
from slowfs import SlowFS
from victims import Victim, assert_clean

import gsplice
from gsplice._ends.small import SMALL_FILE as SMALL
from gsplice._threads import descriptor, job
from gsplice._threads.threads import Threads, threads
from gsplice.config import settings

unpatched_copyfileobj = get_original("shutil", "copyfileobj")

#: How many jobs of one filesystem are done at once.
LANE = (settings.threads + 1) // 2


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowFS]:
    with SlowFS(tmp_path_factory.mktemp("slow")) as filesystem:
        yield filesystem


@pytest.fixture
def slow(mounted: SlowFS) -> Iterator[SlowFS]:
    yield mounted
    mounted.let_go()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of a file that no other test has."""
    return "".join(char if char.isalnum() else "_" for char in request.node.name)


@pytest.fixture(autouse=True)
def threads_idle(no_pipe_lost: None) -> Iterator[None]:
    """Nothing is left to a thread after a test."""
    yield
    threads_done()
    until(lambda: gsplice.stats().pipes_in_use == 0)


def cold(path: Path, size: int, seed: int = 0) -> Path:
    """Return the path of a file of known bytes that is not in the page cache."""
    with file_of(path, size, seed).open("rb+") as file:
        drop(file.fileno())
    return path


class ReadAhead(AssertionError):
    """The kernel had the file ready before it was asked for, so there was no disk to wait for."""


def needed_a_thread(grown: Any) -> None:
    if not grown.offloads:
        raise ReadAhead


def with_a_cold_file(test: Callable[..., None]) -> Callable[..., None]:
    """Have *test* done again where the disk was as fast as this process: it may have other work."""

    @functools.wraps(test)
    def until_cold(**fixtures: Any) -> None:
        for _ in range(20):
            with contextlib.suppress(ReadAhead):
                return test(**fixtures)
        return test(**fixtures)

    return until_cold


def hub_threads() -> Threads:
    ours = threads()
    assert ours is not None
    return ours


class Clock:
    """A greenlet that counts the turns it gets."""

    def __init__(self) -> None:
        self.turns = 0
        self.greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            self.turns += 1
            gevent.sleep(0.001)

    def goes_on(self) -> None:
        """Wait until it has had some more turns."""
        enough = self.turns + 10
        until(lambda: self.turns >= enough)


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock()
    yield made
    made.greenlet.kill()


def moved(grown: Any) -> int:
    """Return how many bytes have gone any way that is counted."""
    return sum(number for name, number in vars(grown).items() if name.startswith("bytes_"))


def unpatched_sendfile(src: Any, sock: Any) -> int:
    return get_original("gevent._socket3.socket", "sendfile")(sock, src)  # type: ignore[no-any-return]


def copy_to_socket(copy: Callable[..., Any], src: Any, sock: Any) -> Any:
    with sock.makefile("wb") as dst:  # without a buffer, the original may lose bytes
        return copy(src, dst)


#: From a file to a socket, or to a file: the patched function, and the one to compare it with.
TO_SOCKET: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sendfile": (
        lambda src, sock: sock.sendfile(src),
        unpatched_sendfile,
    ),
    "copyfileobj to socket": (
        lambda src, sock: copy_to_socket(gsplice.copyfileobj, src, sock),
        lambda src, sock: copy_to_socket(unpatched_copyfileobj, src, sock),
    ),
    "copy": (gsplice.copy, unpatched_sendfile),
}
TO_FILE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "copyfileobj to file": (gsplice.copyfileobj, unpatched_copyfileobj),
}
TO_ANY = TO_SOCKET | TO_FILE


def sink_for(ends: Ends, way: str) -> tuple[Any, Callable[[], bytes]]:
    return ends.sink("file" if way in TO_FILE else "bare_unix")


def outcome(
    directory: Path, way: str, move: Callable[..., Any], path: Path, position: int = 0
) -> tuple[Any, str, int]:
    """Move *path* from *position* on; return the result (or the error), what arrived, and where
    the file stands afterwards."""
    with Ends(directory) as ends, path.open("rb") as src:
        dst, finish = sink_for(ends, way)
        src.seek(position)
        try:
            result = move(src, dst)
        except OSError as err:
            result = (type(err), err.errno)
        where = src.tell()
        return result, digest(finish()), where


# ---- cold files of a disk


@pytest.mark.few
@pytest.mark.parametrize("position", [0, 1000])
@pytest.mark.parametrize("size", [5000, SMALL, 3 * MiB + 5])
@pytest.mark.parametrize("way", TO_ANY)
@with_a_cold_file
def test_a_cold_file(tmp_path: Path, way: str, size: int, position: int) -> None:
    patched, unpatched = TO_ANY[way]
    path = cold(tmp_path / "cold", size)
    with counting() as grown:
        got = outcome(tmp_path, way, patched, path, position)
    if size <= SMALL:  # it may have come by the time it is asked for again
        assert moved(grown) in (0, size - position)
    else:
        assert moved(grown) == size - position
        needed_a_thread(grown)
        assert grown.bytes_copied == 0
        fast = "bytes_copy_file_range" if way in TO_FILE else "bytes_spliced"
        assert getattr(grown, fast) > 0
    assert got[1:] == (digest(some_bytes(size)[position:]), size)
    # gevent's own sendfile is wrong about where the file stands then
    assert got[:2] == outcome(tmp_path, way, unpatched, path, position)[:2]


@pytest.mark.parametrize("way", TO_ANY)
@pytest.mark.parametrize("size", [5000, 3 * MiB + 5])
def test_a_warm_file_needs_no_thread(tmp_path: Path, way: str, size: int) -> None:
    """But for writing what is copied."""
    path = file_of(tmp_path / "warm", size)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(size)), size)
    if way not in TO_FILE:
        assert grown.offloads == 0


@pytest.mark.few
@pytest.mark.parametrize("count", [1, SMALL, 1 * MiB + 1])
@pytest.mark.parametrize("offset", [0, 4097])
@pytest.mark.parametrize("function", ["sendfile", "copy", "_sendfile_use_sendfile"])
@with_a_cold_file
def test_a_part_of_a_cold_file(tmp_path: Path, function: str, offset: int, count: int) -> None:
    path = cold(tmp_path / "cold", 3 * MiB)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        if function == "copy":
            src.seek(offset)
            sent = gsplice.copy(src, dst, count)
        else:
            sent = getattr(dst, function)(src, offset, count)
        assert sent == count
        assert src.tell() == offset + count
        assert digest(finish()) == digest(some_bytes(3 * MiB)[offset : offset + count])
    assert moved(grown) == count
    if count > SMALL:
        needed_a_thread(grown)


@with_a_cold_file
def test_a_cold_file_that_was_read_ahead(tmp_path: Path) -> None:
    path = cold(tmp_path / "cold", 3 * MiB)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        src.read(10)
        drop(src.fileno())
        assert dst.sendfile(src) == 3 * MiB - 10
        assert digest(finish()) == digest(some_bytes(3 * MiB)[10:])
    needed_a_thread(grown)


@with_a_cold_file
def test_cold_then_warm_then_cold(tmp_path: Path) -> None:
    """What is resident goes by sendfile(2), and what is not through a pipe."""
    size = 24 * MiB
    path = cold(tmp_path / "half", size)
    with path.open("rb") as src:
        os.posix_fadvise(src.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(src.fileno(), 14 * MiB, 0)
    with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        assert dst.sendfile(src) == size
        assert digest(finish()) == digest(some_bytes(size))
    assert grown.bytes_spliced >= 8 * MiB
    needed_a_thread(grown)
    assert moved(grown) == size


@with_a_cold_file
def test_a_cold_file_to_a_slow_reader(tmp_path: Path) -> None:
    """What the socket does not take is given up, with the pipe, and read again."""
    size = 2 * MiB
    path = cold(tmp_path / "cold", size)
    with Ends(tmp_path, buffers=16 * KiB) as ends, path.open("rb") as src, counting() as grown:
        sock, peer = ends.connect()
        moving = ends.spawn(sock.sendfile, src)
        received = bytearray()
        while len(received) < size:
            until(lambda: is_waited_for(sock) or moving.dead)
            assert gsplice.stats().pipes_in_use == 0
            received += peer.recv(256 * KiB)
        assert moving.get(timeout=GUARD) == size
    assert digest(bytes(received)) == digest(some_bytes(size))
    needed_a_thread(grown)
    assert moved(grown) == size


@pytest.mark.parametrize("way", TO_ANY)
@with_a_cold_file
def test_without_a_pipe(
    slow: SlowFS,
    tmp_path: Path,
    name: str,
    clock: Clock,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)
    with no_pipe_to_be_had(monkeypatch):
        for path in (slow.mount / name, cold(tmp_path / "cold", 1 * MiB)):
            with counting() as grown:
                moving = gevent.spawn(outcome, tmp_path, way, TO_ANY[way][0], path)
                if path.parent == slow.mount:
                    until(lambda: slow.begun(name))
                    clock.goes_on()
                    slow.release(name)
                got = moving.get(timeout=GUARD)
            assert got[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
            needed_a_thread(grown)
            assert grown.bytes_spliced == 0
            assert moved(grown) == 1 * MiB


# ---- a filesystem that keeps its answers back


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


@pytest.fixture
def many_held(slow: SlowFS, tmp_path: Path, name: str) -> Iterator[list[str]]:
    """More transfers than there are threads, all held."""
    names = [f"{name}{number}" for number in range(3 * settings.threads)]
    for number, one in enumerate(names):
        file_of(slow.directory / one, 100 * KiB, number)
        slow.hold(one)
    moving = [
        gevent.spawn(outcome, tmp_path / one, "copy", gsplice.copy, slow.mount / one)
        for one in names
    ]
    for one in names:
        (tmp_path / one).mkdir()
    until(lambda: sum(map(slow.begun, names)) == LANE)
    yield names
    assert not any(greenlet.dead for greenlet in moving)
    for one in names:
        slow.release(one)
    for number, greenlet in enumerate(moving):
        data = some_bytes(100 * KiB, number)
        assert greenlet.get(timeout=GUARD) == (len(data), digest(data), len(data))


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


# ---- killed, timed out or closed while a thread works


def kill(greenlet: gevent.Greenlet, *_: Any) -> None:
    greenlet.kill(timeout=GUARD)


def time_out(greenlet: gevent.Greenlet, *_: Any) -> None:
    greenlet.kill(gevent.Timeout(), timeout=GUARD)


#: Also what needs no pipe, or goes through memory.
INTERRUPTED = {way: (way, 1 * MiB) for way in TO_ANY} | {
    "sendfile of a small file": ("sendfile", 5000),
    "small file to file": ("copyfileobj to file", 5000),
}


def descriptors() -> int:
    """Count those that a transfer could have left."""
    return open_descriptors() - 2 * gsplice.stats().pipes_idle


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", [kill, time_out])
@pytest.mark.parametrize("transfer", INTERRUPTED)
def test_ended_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, transfer: str, end: Callable[..., None]
) -> None:
    way, size = INTERRUPTED[transfer]
    file_of(slow.directory / name, size)
    assert_clean(tmp_path)  # opens what is opened once
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        before = descriptors()
        slow.hold(name)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name))
        end(moving)
        assert moving.dead  # and the read is still held
        assert src.tell() == 0
        slow.release(name)
        threads_done()
        until(lambda: descriptors() <= before)
        until(lambda: gsplice.stats().pipes_in_use == 0)
        assert some_bytes(size).startswith(finish())  # the thread had its order to copy
        if way not in TO_FILE:
            assert src.tell() == 0
    assert_clean(tmp_path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("way", TO_ANY)
def test_killed_halfway(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    """The file stands where what was delivered ends."""
    size = 4 * MiB
    file_of(slow.directory / name, size)
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        slow.hold(name, beyond=3 * MiB)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name, beyond=3 * MiB))
        if way in TO_FILE:
            until(lambda: os.fstat(dst.fileno()).st_size >= 2 * MiB)
        else:
            until(lambda: gsplice.stats().pipes_in_use == 1)
        moving.kill(timeout=GUARD)
        assert moving.dead
        position = src.tell()
        slow.release(name)
        threads_done()
        arrived = finish()
        assert some_bytes(size).startswith(arrived)
        if way in TO_FILE:
            assert 0 < position <= len(arrived)
        else:
            assert position == len(arrived) > 0
        src.seek(position)
        rest, finish_rest = ends.sink("bare_unix")
        gsplice.copy(src, rest)
        assert digest(finish_rest()) == digest(some_bytes(size)[position:])


@pytest.mark.usefixtures("quiet")
def test_killed_in_the_queue(many_held: list[str], slow: SlowFS, tmp_path: Path) -> None:
    file_of(slow.directory / (last := many_held[0] + "last"), 1 * MiB)
    with Ends(tmp_path) as ends, (slow.mount / last).open("rb") as src, counting() as grown:
        dst, finish = ends.sink("bare_unix")
        before = descriptors()
        moving = ends.spawn(dst.sendfile, src)
        until(lambda: gsplice.stats().offloads > 0 and not moving.ready() and moving.started)
        gevent.sleep(0)
        moving.kill(timeout=GUARD)
        assert moving.dead
        assert src.tell() == 0
        until(lambda: descriptors() <= before)
        assert finish() == b""
    assert not slow.begun(last)
    assert moved(grown) == 0


@pytest.mark.parametrize("way", TO_ANY)
def test_the_file_closed_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, way: str
) -> None:
    """Nobody else's file gets the bytes, or is read, when it takes the number."""
    results = []
    for move in TO_ANY[way]:
        with Ends(tmp_path) as ends:
            file_of(slow.directory / name, 4 * MiB)
            src = (slow.mount / name).open("rb")
            dst, finish = sink_for(ends, way)
            if move is TO_ANY[way][0]:
                slow.hold(name)
            moving = ends.spawn(move, src, dst)
            if move is TO_ANY[way][0]:
                until(lambda: slow.begun(name))
            elif way in TO_FILE:
                continue  # the unpatched one lets nobody close it
            else:
                until(lambda moving=moving: moving.started and not moving.ready())
            number = src.fileno()
            src.close()
            victim = Victim(tmp_path, number)
            if move is TO_ANY[way][0]:
                slow.release(name)
            moving.join(GUARD)
            victim.check()
            results.append(type(moving.exception))
            assert some_bytes(4 * MiB).startswith(finish())
    assert set(results) == {ValueError}


@pytest.mark.parametrize("way", TO_SOCKET)
def test_the_socket_closed_while_a_thread_reads(
    slow: SlowFS, tmp_path: Path, name: str, way: str
) -> None:
    results = []
    file_of(slow.directory / name, 4 * MiB)
    patched = TO_SOCKET[way][0]
    for move in TO_SOCKET[way]:
        with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
            sock, _ = ends.connect("unix")
            if move is patched:
                slow.hold(name)
            moving = ends.spawn(move, src, sock)
            if move is patched:
                until(lambda: slow.begun(name))
            else:
                until(lambda sock=sock: is_waited_for(sock))
            number = sock.fileno()
            sock.close()
            if way == "copyfileobj to socket" and sock.fileno() == number:
                results.append("kept open by its file")
                moving.kill()
                if move is patched:
                    slow.release(name)
                continue
            until(lambda number=number: not os.path.exists(f"/proc/self/fd/{number}"))
            victim = Victim(tmp_path, number)
            if move is patched:
                slow.release(name)
            moving.join(GUARD)
            victim.check()
            # gevent's has a class of its own where somebody waited for the socket
            assert isinstance(moving.exception, OSError)
            results.append(moving.exception.errno)
            if move is patched:
                assert src.tell() == 0
    assert results[0] == results[1]
    assert_clean(tmp_path)


# ---- errors of the disk


@pytest.mark.few
@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
@pytest.mark.parametrize("beyond", [0, 1 * MiB])
@pytest.mark.parametrize("way", TO_ANY)
def test_an_error_of_the_disk(
    slow: SlowFS, tmp_path: Path, name: str, way: str, beyond: int, error: str
) -> None:
    size = 2 * MiB
    results = []
    for number, move in enumerate(TO_ANY[way]):
        one = f"{name}{number}"
        path = slow.mount / one
        file_of(slow.directory / one, size)
        slow.fail(error, one, beyond=beyond)
        with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
            dst, finish = sink_for(ends, way)
            with pytest.raises(OSError) as raised:
                move(src, dst)
            position = src.tell()
            arrived = finish()
        assert some_bytes(size).startswith(arrived)
        results.append((raised.type, raised.value.errno))
        if number == 0:
            assert position == len(arrived)
            assert bool(arrived) == bool(beyond)
            assert moved(grown) == len(arrived)
            assert grown.offloads > 0
    assert results[0] == results[1]


@pytest.mark.parametrize("way", TO_ANY)
def test_a_file_truncated_under_way(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    size, cut = 3 * MiB, 1 * MiB + 100
    file_of(slow.directory / name, size)
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        slow.hold(name, beyond=1 * MiB)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name, beyond=1 * MiB))
        os.truncate(slow.directory / name, cut)
        slow.release(name)
        moving.get(timeout=GUARD)
        arrived = finish()
        assert digest(arrived[:cut]) == digest(some_bytes(size)[:cut])
        # What had been asked for already, the kernel may have filled up with zeros.
        assert not any(arrived[cut:])
        assert src.tell() == len(arrived) < size


@pytest.mark.parametrize("way", TO_ANY)
def test_a_file_grown_under_way(slow: SlowFS, tmp_path: Path, name: str, way: str) -> None:
    size = 2 * MiB
    file_of(slow.directory / name, size)
    with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        slow.hold(name, beyond=1 * MiB)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name, beyond=1 * MiB))
        with (slow.mount / name).open("ab", 0) as more:
            more.write(some_bytes(100_000, seed=5))
        slow.release(name)
        moving.get(timeout=GUARD)
        assert digest(finish()) == digest(some_bytes(size) + some_bytes(100_000, seed=5))
        assert src.tell() == size + 100_000


# ---- writing


@pytest.mark.parametrize("source", ["bare_unix", "unix", "pipe", "file"])
def test_the_hub_goes_round_while_a_write_is_held(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock, source: str
) -> None:
    data = some_bytes(1 * MiB)
    slow.hold(name, "write")
    with Ends(tmp_path) as ends, counting() as grown:
        src = ends.source(source, data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        clock.goes_on()
        assert not moving.dead
        slow.release(name, "write")
        assert moving.get(timeout=GUARD) == len(data)
        assert dst.tell() == len(data)
    assert digest((slow.directory / name).read_bytes()) == digest(data)
    assert grown.offloads > 0
    assert moved(grown) == len(data)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("end", [kill, time_out])
def test_ended_while_a_thread_writes(
    slow: SlowFS, tmp_path: Path, name: str, end: Callable[..., None]
) -> None:
    data = some_bytes(1 * MiB)
    assert_clean(tmp_path)
    with Ends(tmp_path) as ends:
        before = descriptors()
        src = ends.source("bare_unix", data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        slow.hold(name, "write")
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        end(moving)
        assert moving.dead
        taken = dst.tell()  # which a thread is still going to write
        slow.release(name, "write")
        threads_done()
        until(lambda: gsplice.stats().pipes_in_use == 0)
    until(lambda: descriptors() <= before)
    assert (slow.directory / name).read_bytes() == data[:taken] != b""
    assert_clean(tmp_path)


@pytest.mark.parametrize("copy", ["patched", "unpatched"])
def test_an_error_of_writing(slow: SlowFS, tmp_path: Path, name: str, copy: str) -> None:
    data = some_bytes(1 * MiB)
    slow.fail("ENOSPC", name, "write", beyond=256 * KiB)
    move = gsplice.copyfileobj if copy == "patched" else unpatched_copyfileobj
    with Ends(tmp_path) as ends:
        src = ends.source("unix", data)
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        with pytest.raises(OSError) as raised:
            move(src, dst)
        assert raised.value.errno == errno.ENOSPC
        written = (slow.directory / name).read_bytes()
        assert dst.tell() == len(written) <= 256 * KiB
        assert data.startswith(written)


def test_a_file_closed_while_a_thread_writes(slow: SlowFS, tmp_path: Path, name: str) -> None:
    with Ends(tmp_path) as ends:
        src = ends.source("bare_unix", some_bytes(1 * MiB))
        dst = (slow.mount / name).open("wb", 0)
        slow.hold(name, "write")
        moving = ends.spawn(gsplice.copy, src, dst)
        until(lambda: slow.begun(name, "write"))
        number = dst.fileno()
        dst.close()
        victim = Victim(tmp_path, number)
        slow.release(name, "write")
        with pytest.raises(ValueError, match="closed file"):
            moving.get(timeout=GUARD)
        victim.check()
    assert some_bytes(1 * MiB).startswith((slow.directory / name).read_bytes())


@pytest.mark.parametrize("size", [3000, 256 * KiB])
@pytest.mark.parametrize("source", ["socket", "pipe", "file"])
def test_big_pieces_are_written_to_a_disk_on_a_thread(
    tmp_path: Path, source: str, size: int
) -> None:
    data = some_bytes(size)
    with Ends(tmp_path) as ends:
        dst, finish = ends.sink("file")
        if source == "socket":
            src, peer = ends.connect("unix")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * size)
            assert peer._sock.send(data) == size  # all of it is there from the start
            peer.close()
        elif source == "pipe":
            read_fd, write_fd = os.pipe()
            src = ends.enter_context(open(read_fd, "rb", 0))
            fcntl(write_fd, F_SETPIPE_SZ, 2 * size)
            assert os.write(write_fd, data) == size
            os.close(write_fd)
        else:
            src = ends.source("file", data)
        with counting() as grown:
            assert gsplice.copy(src, dst) == size
        assert dst.tell() == size
        assert digest(finish()) == digest(data)
    assert (grown.offloads > 0) == (size > SMALL)
    assert moved(grown) == size


def test_what_is_written_to_memory_needs_no_thread(tmp_path: Path) -> None:
    data = some_bytes(2 * MiB)
    with Ends(tmp_path) as ends, counting() as grown:
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        dst = ends.enter_context(open(fd, "wb", 0))
        assert gsplice.copy(ends.source("bare_unix", data), dst) == len(data)
        assert digest(os.pread(fd, 3 * MiB, 0)) == digest(data)
        src = ends.enter_context(open(os.dup(fd), "rb"))
        src.seek(0)
        sock, finish = ends.sink("bare_unix")
        assert sock.sendfile(src) == len(data)
        assert digest(finish()) == digest(data)
    assert grown.offloads == 0
    assert grown.bytes_spliced == 2 * len(data)


@pytest.mark.parametrize("place", ["disk", "slow"])
def test_two_writers_to_one_file(slow: SlowFS, tmp_path: Path, name: str, place: str) -> None:
    """Each piece lands in one piece, behind what the other has written."""
    path = (slow.mount if place == "slow" else tmp_path) / name
    records = [bytes([65 + who]) * 99 + b"\n" for who in range(2)]
    with Ends(tmp_path) as ends, counting() as grown:
        dst = ends.enter_context(path.open("wb", 0))
        moving = []
        for record in records:
            ours, theirs = ends.connect("unix")
            ends.spawn(lambda peer, data: (peer.sendall(data), peer.close()), theirs, record * 9000)
            moving.append(ends.spawn(gsplice.copyfileobj, ours.makefile("rb", 0), dst))
        gevent.joinall(moving, timeout=GUARD, raise_error=True)
        assert dst.tell() == 2 * 9000 * 100
    assert grown.offloads > 0
    written = path.read_bytes()
    assert len(written) == 2 * 9000 * 100
    for who in range(2):
        assert written.count(bytes([65 + who])) == 9000 * 99
    assert written.count(b"\n") == 2 * 9000


def test_two_writers_one_of_whom_is_killed(
    slow: SlowFS, tmp_path: Path, name: str, clock: Clock
) -> None:
    """The other one waits until the thread has written, and then writes behind that."""
    first, second = some_bytes(100 * KiB), some_bytes(3000, seed=1)
    with Ends(tmp_path) as ends:
        dst = ends.enter_context((slow.mount / name).open("wb", 0))
        ours, theirs = ends.connect("unix")
        theirs.sendall(first)
        slow.hold(name, "write")
        killed = ends.spawn(gsplice.copyfileobj, ours.makefile("rb", 0), dst)
        until(lambda: slow.begun(name, "write"))
        other, feeder = ends.connect("unix")
        feeder.sendall(second)
        feeder.close()
        writing = ends.spawn(gsplice.copyfileobj, other.makefile("rb", 0), dst)
        clock.goes_on()
        killed.kill(timeout=GUARD)
        assert killed.dead
        slow.release(name, "write")
        writing.get(timeout=GUARD)
        threads_done()
        assert dst.tell() == len(first + second)
    assert (slow.directory / name).read_bytes() == first + second


# ---- processes, hubs and threads

#: Starts to send a held file, and then does what comes after this.
SENDING = """
import hashlib, json, os, sys, gevent, gevent.os, gevent.socket, gsplice
gsplice.patch_all()
path, log = sys.argv[1:]
ours, theirs = gevent.socket.socketpair()
src = open(path, 'rb')

def descriptors():
    fds = os.listdir('/proc/self/fd')
    return sum(os.path.realpath(f'/proc/self/fd/{fd}') == path for fd in fds)

sending = gevent.spawn(ours.sendfile, src)
with gevent.Timeout(30):
    begun = ''
    while f'begun read {os.path.basename(path)} ' not in begun:
        gevent.sleep(0.001)
        with open(log) as file:
            begun = file.read()
assert descriptors() == 2
"""

FORKS = (
    SENDING
    + """
before = gsplice.stats()
pid = gevent.os.fork_gevent()  # without a watcher, so that the child is ours to wait for
if pid == 0:
    left = descriptors()
    sending.join(30)
    error = getattr(sending.exception, 'errno', repr(sending.exception))
    after = gsplice.stats()
    moved = after.bytes_spliced + after.bytes_copied + after.bytes_sendfile
    gevent.sleep(0)
    print(json.dumps([left, error, moved, after.pipes_in_use]), flush=True)
    # A thread of its own serves the child.
    print(gsplice._threads.threads.threads().run((), lambda: 'served', (), (), ()), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print('forked', flush=True)
received = b''
with gevent.Timeout(30):
    while len(received) < os.path.getsize(path):
        received += theirs.recv(1 << 20)
    sent = sending.get()
print(json.dumps([sent, src.tell(), hashlib.sha256(received).hexdigest()]), flush=True)
"""
)


def test_a_fork_while_a_thread_works(slow: SlowFS, name: str) -> None:
    data = file_of(slow.directory / name, 1 * MiB).read_bytes()
    slow.hold(name)
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    with ended_with([*command, str(slow.mount / name), str(slow.control / "log")]) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == [1, errno.ECANCELED, 0, 0]
        assert process.stdout.readline() == b"served\n"
        assert process.stdout.readline() == b"forked\n"
        slow.release(name)
        sha = hashlib.sha256(data).hexdigest()
        assert json.loads(process.stdout.readline()) == [len(data), len(data), sha]
    assert process.returncode == 0


#: So that nothing is to be warned of but what gsplice leaves.
CLOSING = """
import atexit
for end in ours, theirs, src:
    atexit.register(end.close)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "sending.kill()"])
def test_the_interpreter_ends_while_a_thread_waits(slow: SlowFS, name: str, end: str) -> None:
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)
    assert run_program(SENDING + CLOSING + end, slow.mount / name, slow.control / "log") == ""
    slow.release(name)  # and not before


def in_thread(function: Callable[[], Any]) -> Any:
    """Run *function* in a thread with a hub of its own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as err:  # noqa: BLE001 - handed on
            results.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: not thread.is_alive())
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("way", TO_ANY)
def test_a_hub_in_another_thread(
    slow: SlowFS, tmp_path: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are its own, and end when they are idle."""
    monkeypatch.setattr(gevent.config, "threadpool_idle_task_timeout", 0.05)
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)

    def work() -> Any:
        hub, clock = gevent.get_hub(), Clock()
        try:
            moving = gevent.spawn(outcome, tmp_path, way, TO_ANY[way][0], slow.mount / name)
            until(lambda: slow.begun(name))
            clock.goes_on()
            assert not moving.dead
            slow.release(name)
            got = moving.get(timeout=GUARD)
            assert hub.__dict__["_gsplice_threads"] is not main
            return got
        finally:
            clock.greenlet.kill()  # under libuv gevent could not destroy its hub
            hub.destroy(destroy_loop=True)

    gevent.get_hub()
    assert hub_threads().run((), lambda: 1, (), (), ()) == 1
    main = gevent.get_hub().__dict__["_gsplice_threads"]
    before = native_threads()
    with counting() as grown:
        assert in_thread(work)[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
    assert grown.offloads > 0
    until(lambda: native_threads() <= before)


def test_a_hub_is_destroyed_while_a_thread_works(
    slow: SlowFS, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gevent.config, "threadpool_idle_task_timeout", 0.05)
    file_of(slow.directory / name, 1 * MiB)
    before, started = descriptors(), native_threads()
    slow.hold(name)

    def work() -> None:
        hub = gevent.get_hub()
        with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
            moving = ends.spawn(gsplice.copy, src, ends.sink("bare_unix")[0])
            until(lambda: slow.begun(name))
            moving.kill()
        # Under libuv, gevent waits for the thread; under libev, the thread finds no hub.
        threading.Timer(0.1, slow.let_go).start()
        hub.destroy(destroy_loop=True)

    in_thread(work)
    until(lambda: native_threads() <= started)
    until(lambda: descriptors() <= before)
    until(lambda: gsplice.stats().pipes_in_use == 0)


# ---- settings


@pytest.mark.parametrize("way", TO_ANY)
def test_never(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offload", "never")
    path = cold(tmp_path / "cold", 1 * MiB)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
    assert moved(grown) == 1 * MiB
    assert grown.bytes_copied == 0
    assert grown.offloads == 0


@pytest.mark.parametrize("size", [5000, 1 * MiB])
@pytest.mark.parametrize("way", TO_ANY)
def test_always(tmp_path: Path, way: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offload", "always")
    path = file_of(tmp_path / "warm", size)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(size)), size)
    assert moved(grown) == size
    assert grown.offloads > 0
    assert grown.bytes_sendfile == 0


#: Starts a dozen transfers of held files.
DOZEN = """
import os, sys, gevent, gevent.socket, gsplice
gsplice.patch_all()
pairs = [gevent.socket.socketpair() for _ in sys.argv[1:]]
sending = [
    gevent.spawn(ours.sendfile, open(path, 'rb'))
    for path, (ours, theirs) in zip(sys.argv[1:], pairs)
]
for _ in range(20):
    gevent.sleep(0.001)
print(gsplice.stats().offloads, flush=True)
gevent.joinall(sending, raise_error=True)
print(gsplice.stats().offloads, len(os.listdir('/proc/self/task')), flush=True)
"""


@pytest.mark.few
@pytest.mark.parametrize(
    ("policy", "offloads"), [("auto", True), ("always", True), ("never", False)]
)
@pytest.mark.parametrize("threads", [1, 4])
def test_the_variables(slow: SlowFS, name: str, threads: int, policy: str, offloads: bool) -> None:
    names = [f"{name}{number}" for number in range(12)]
    for one in names:
        file_of(slow.directory / one, 5000)
        if offloads:
            slow.hold(one)
    lane = (threads + 1) // 2
    with ended_with(
        [sys.executable, "-c", DOZEN, *(str(slow.mount / one) for one in names)],
        env=os.environ | {"GSPLICE_THREADS": str(threads), "GSPLICE_OFFLOAD": policy},
    ) as process:
        assert process.stdout is not None
        assert (int(process.stdout.readline()) > 0) == offloads
        if offloads:
            until(lambda: sum(map(slow.begun, names)) == lane)
            for one in names:
                slow.release(one)
        total, tasks = map(int, process.stdout.readline().split())
        assert (total > 0) == offloads
        assert tasks <= 1 + threads
    assert process.returncode == 0


# ---- what the duplicates of descriptors must not do


@pytest.mark.parametrize("end", ["source", "sink"])
def test_a_lock_outlives_a_copy(tmp_path: Path, end: str) -> None:
    """Closing any descriptor of a file drops the locks that the process has on it: fcntl(2)."""
    path = cold(tmp_path / "from", 3 * MiB)
    with path.open("rb+") as src, (tmp_path / "to").open("wb") as dst, counting() as grown:
        locked = src if end == "source" else dst
        lockf(locked, LOCK_EX)
        gsplice.copyfileobj(src, dst)
        other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'rb+'), 6)  # LOCK_EX | LOCK_NB"
        refused = subprocess.run([sys.executable, "-c", other, locked.name], capture_output=True)
        assert b"BlockingIOError" in refused.stderr
        kept = len(descriptor._kept_for_locks)
    assert grown.offloads > 0
    assert kept == 1
    with path.open("rb") as src, (tmp_path / "to2").open("wb") as dst:
        gsplice.copyfileobj(src, dst)  # closes what was kept
    assert not descriptor._kept_for_locks


@pytest.mark.parametrize("times", [1, 3])
def test_a_locked_file_costs_one_descriptor_however_often_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    path = file_of(tmp_path / "from", 300 * KiB)
    monkeypatch.setattr(settings, "offload", "always")
    with path.open("rb+") as src, counting() as grown:
        lockf(src, LOCK_EX)
        for _ in range(times):
            src.seek(0)
            with Ends(tmp_path) as ends:
                sock, finish = ends.sink("bare_unix")
                assert sock.sendfile(src) == 300 * KiB
                assert digest(finish()) == digest(some_bytes(300 * KiB))
        until(lambda: len(descriptor._kept_for_locks) == 1)
    assert grown.offloads >= times


def test_a_lock_outlives_a_read_of_a_fuse_file(tmp_path: Path) -> None:
    """mmap.mmap() makes a duplicate, too, and closes it."""
    size = 300 * KiB
    with SlowFS(tmp_path) as slow:
        file_of(slow.directory / "file", size)
        with (slow.mount / "file").open("rb+") as src, counting() as grown, Ends(tmp_path) as ends:
            lockf(src, LOCK_EX)
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size
            assert digest(finish()) == digest(some_bytes(size))
            other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'rb+'), 6)"
            refused = subprocess.run([sys.executable, "-c", other, src.name], capture_output=True)
            assert b"BlockingIOError" in refused.stderr
        with (slow.mount / "file").open("rb") as src, Ends(tmp_path) as ends:
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size  # closes what was kept
            finish()
            threads_done()
    assert grown.offloads > 0
    assert grown.bytes_spliced == size


def test_what_must_not_be_cached_is_read_anew(tmp_path: Path) -> None:
    size = 300 * KiB
    with SlowFS(tmp_path, "--direct-io") as slow:
        file_of(slow.directory / "file", size)
        with (slow.mount / "file").open("rb") as src, counting() as grown:
            for seed in (0, 1):
                file_of(slow.directory / "file", size, seed)
                src.seek(0)
                with Ends(slow.control) as ends:
                    sock, finish = ends.sink("bare_unix")
                    assert sock.sendfile(src) == size
                    assert digest(finish()) == digest(some_bytes(size, seed))
    assert grown.bytes_copied == 2 * size
    assert grown.offloads > 0


@pytest.mark.parametrize("place", ["same", "across"])
def test_two_files_copied_into_one_leave_no_hole(tmp_path: Path, place: str) -> None:
    size = 5 * MiB
    with contextlib.ExitStack() as stack:
        where = tmp_path
        if place == "across":
            where = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        paths = [file_of(where / str(seed), size, seed) for seed in range(2)]
        with (tmp_path / "to").open("wb", 0) as dst, counting() as grown:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            copying = [gevent.spawn(gsplice.copyfileobj, src, dst) for src in files]
            gevent.joinall(copying, timeout=GUARD, raise_error=True)
    got = (tmp_path / "to").read_bytes()
    assert len(got) == 2 * size
    pieces = [got[at : at + MiB] for at in range(0, len(got), MiB)]
    contents = (some_bytes(size, seed) for seed in range(2))
    assert sorted(pieces) == sorted(
        data[at : at + MiB] for data in contents for at in range(0, size, MiB)
    )
    assert grown.offloads > 0


def test_where_no_thread_can_be_started_the_job_is_done_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(pool: Any) -> None:
        raise RuntimeError("can't start new thread")

    size = 3 * MiB
    threads_of_its_own = Threads(gevent.get_hub())
    monkeypatch.setitem(gevent.get_hub().__dict__, "_gsplice_threads", threads_of_its_own)
    with monkeypatch.context() as patch:
        patch.setattr(gevent.threadpool.ThreadPool, "_add_thread", no_thread)
        path = cold(tmp_path / "cold", size)
        with Ends(tmp_path) as ends, path.open("rb") as src, counting() as grown:
            sock, finish = ends.sink("bare_unix")
            assert sock.sendfile(src) == size
            assert digest(finish()) == digest(some_bytes(size))
    assert grown.offloads == 0
    assert threads_of_its_own._busy == 0
    assert not +threads_of_its_own._running
    threads_of_its_own._pool.adjust()  # for what was left in its queue: nothing is done twice
    until(lambda: not len(threads_of_its_own._pool))


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
