"""Threads with a hub each, hubs that end, and interpreters that end, with transfers under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ended_with, run_program

#: For programs of their own: a transfer with bytes of its own, and the work of a thread.
PROGRAM = """
import faulthandler; faulthandler.dump_traceback_later(90, exit=True)
import contextlib, gc, hashlib, os, random, sys, tempfile, threading
import gevent, gevent.socket, gsplice
from gsplice import pipes
MiB = 1 << 20
gsplice.patch_all()

def data_of(seed, size):
    return random.Random(seed).randbytes(size)

def receive(sock, size):
    received = bytearray()
    while len(received) < size and (data := sock.recv(1 << 16)):
        received += data
    return bytes(received)

def transfer(seed, size=MiB):
    data = data_of(seed, size)
    kind = seed % 4
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        sink, target = map(enter, gevent.socket.socketpair())
        file = enter(tempfile.TemporaryFile(buffering=0))
        receiving = gevent.spawn(receive, target, size)
        if kind == 0:
            file.write(data)
            file.seek(0)
            assert sink.sendfile(file) == size
        else:
            ours, feeder = map(enter, gevent.socket.socketpair())
            feeding = gevent.spawn(lambda: (feeder.sendall(data), feeder.shutdown(1)))
            if kind == 1:
                assert gsplice.copy(ours, sink) == size
            else:
                assert gsplice.copy(ours, file) == size
                file.seek(0)
                assert gsplice.copy(file, sink) == size
            feeding.get()
        assert receiving.get() == data
        return size

def balanced():
    figures = gsplice.stats()
    in_use, idle = figures.pipes_in_use, figures.pipes_idle
    assert in_use == 0, figures
    assert figures.pipes_created == figures.pipes_closed + idle, figures
    return figures

def in_threads(works):
    failed = []
    def run(work):
        try:
            work()
        except BaseException as err:
            failed.append(err)
            raise
        finally:
            gevent.get_hub().destroy(destroy_loop=True)
    gevent.get_hub()  # libuv's default loop: gevent crashes if several threads are the first to ask
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
"""


def work(threads: int, at_once: int, size: int, more: str = "") -> str:
    return (
        PROGRAM
        + more
        + f"""
def work(number):
    def run():
        for first in range(0, 12, {at_once}):
            moving = [
                gevent.spawn(transfer, number * 100 + first + each, {size})
                for each in range({at_once})
            ]
            for greenlet in moving:
                assert greenlet.get() == {size}
    return run
in_threads([work(number) for number in range({threads})])
figures = balanced()
assert figures.transfers >= 12
assert figures.bytes_spliced >= 6 * {size}
"""
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("offload", ["auto", "always"])
def test_eight_threads_with_a_hub_each(offload: str) -> None:
    run_program(work(8, 4, 300_000), GSPLICE_OFFLOAD=offload)


def test_eight_threads_that_share_few_pipes() -> None:
    run_program(work(8, 6, 200_000), GSPLICE_MAX_PIPES=6, GSPLICE_MAX_IDLE_HUB=1)


def test_a_collection_at_every_turn() -> None:
    """And a finalizer that uses the pool at any of them."""
    run_program(
        work(
            3,
            4,
            100_000,
            """
class Owner:
    def __init__(self):
        self.me = self
    def __del__(self):
        pipe = acquire()
        if pipe is not None:
            pipes.release(pipe)
acquire = pipes.acquire
def with_garbage():
    Owner()
    return acquire()
pipes.acquire = with_garbage
gc.set_threshold(1, 1, 1)
""",
        )
    )


def test_pipes_released_on_another_hub_than_they_came_from() -> None:
    run_program(
        PROGRAM
        + """
import queue
lent = queue.SimpleQueue()
def lend():
    for number in range(200):
        pipe = pipes.acquire()
        os.write(pipe.write_fd, b'%6d' % os.fstat(pipe.read_fd).st_ino)
        lent.put(pipe)
        gevent.sleep(0)
    transfer(2, 100_000)
def give_back():
    for number in range(200):
        pipe = lent.get()
        ino = os.fstat(pipe.read_fd).st_ino
        assert os.read(pipe.read_fd, 100) == b'%6d' % ino
        if number % 3 == 0:
            pipe.pending = pipes.UNKNOWN
        pipes.release(pipe)
        pipe = None
        transfer(number, 1000)
in_threads([lend, give_back, lend, give_back])
balanced()
""",
        GSPLICE_MAX_PIPES=500,
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "transferring"])
def test_hubs_that_are_destroyed(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on, and their pipes are theirs.

    Python never takes apart a greenlet that waits in a thread that has ended, so its sockets and
    the pipe it has borrowed stay open, whatever it does: who destroys a hub kills its greenlets.
    """
    # Under libuv a hub is not destroyed while one of its greenlets sleeps.
    monkeypatch.setenv("GEVENT_LOOP", "libev-cext")
    run_program(
        PROGRAM
        + f"""
kept = []
def come_and_go():
    transfer(1, 100_000)
    if {busy}:
        ends = [*gevent.socket.socketpair(), *gevent.socket.socketpair()]
        moving = gevent.spawn(gsplice.copy, ends[0], ends[2])
        feeding = gevent.spawn(ends[1].sendall, bytes(MiB))
        while ends[2]._write_event.callback is None:
            gevent.sleep(0.001)
        kept.append((moving, feeding, ends))
def others():
    for seed in range(20):
        transfer(seed, 200_000)
for _ in range(5):
    in_threads([come_and_go, others, come_and_go])
    for moving, feeding, ends in kept:
        for end in ends:
            end._sock.close()
    moving = feeding = ends = end = None
    kept.clear()
gc.collect()
gevent.get_hub()
transfer(1, 100_000)
figures = gsplice.stats()
in_use, idle = figures.pipes_in_use, figures.pipes_idle
assert in_use <= {10 * busy}, figures
assert figures.pipes_created == figures.pipes_closed + in_use + idle, figures
"""
    )


def test_reinit_with_transfers_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked child, where gevent.reinit() belongs: those of the parent end, new ones work."""
    run_program(
        PROGRAM
        + """
import warnings; warnings.simplefilter('ignore', DeprecationWarning)  # of forking with threads
ends = [*gevent.socket.socketpair(), *gevent.socket.socketpair()]
ours, feeder, sink, target = ends
moving = gevent.spawn(gsplice.copy, ours, sink)
feeder.sendall(b'before')
assert target.recv(6) == b'before'
gevent.sleep(0)
pid = os.fork()
gevent.reinit()
gevent.reinit()
if pid == 0:
    for seed in range(8):
        transfer(seed, 200_000)
    moving.kill()
    balanced()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
feeder.sendall(b'after')
assert target.recv(5) == b'after'
feeder.close()
assert moving.get() == 11
for seed in range(8):
    transfer(seed, 200_000)
balanced()
for end in ends:
    end.close()
"""
    )


#: Programs that end, each in its own way, while transfers are under way.
UNDER_WAY = (
    PROGRAM
    + """
import signal, time
faulthandler.cancel_dump_traceback_later()
ends = []
for seed in range(6):
    ours, feeder = gevent.socket.socketpair()
    sink, target = gevent.socket.socketpair()
    file = tempfile.TemporaryFile()
    file.truncate(MiB * 40)
    ends += [ours, feeder, sink, target, file]
    gevent.spawn(gsplice.copy, ours, sink)
    gevent.spawn(feeder.sendall, bytes(MiB))
    other, there = gevent.socket.socketpair()
    ends += [other, there]
    gevent.spawn(other.sendfile, file)
    gevent.spawn(gsplice.copy, file, tempfile.TemporaryFile())
while gsplice.stats().pipes_in_use < 6:
    gevent.sleep(0)
"""
)

ENDINGS = {
    "the end of the program": ("", 0),
    "sys.exit": ("sys.exit(7)", 7),
    "sys.exit in a greenlet": ("gevent.spawn(sys.exit, 7).join()", 7),
    "os._exit": ("os._exit(7)", 7),
    "the hub destroyed": ("gevent.get_hub().destroy()", 0),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "in a finalizer": (
        "class End:\n    def __del__(self):\n        pipes.acquire()\nend = End()",
        0,
    ),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("offload", ["always", pytest.param("auto", marks=pytest.mark.long)])
def test_the_interpreter_ends_with_transfers_under_way(
    ending: str, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback, no hang, and the exit code that was asked for."""
    how, code = ENDINGS[ending]
    if (
        ending == "the hub destroyed"
    ):  # which gevent does not manage under libuv with watchers active
        monkeypatch.setenv("GEVENT_LOOP", "libev-cext")
    environ = os.environ | {"GSPLICE_OFFLOAD": offload}
    with ended_with(
        [sys.executable, "-c", UNDER_WAY + how], stderr=subprocess.PIPE, env=environ
    ) as process:
        said = process.communicate(timeout=60)
    # gevent tells of a SystemExit in a greenlet, and so the program does unpatched
    assert (process.returncode, said[0]) == (code, b"")
    if ending != "sys.exit in a greenlet":
        assert said[1] == b""
