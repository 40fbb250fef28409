"""The pool: where pipes come from, where they go, and that none is lost on the way."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fcntl import F_GETFD, F_GETFL, F_GETPIPE_SZ, FD_CLOEXEC, fcntl
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import counting, receiver, run_program, some_bytes
from pool import assert_balanced, in_thread, inode, is_open, lend

import gsplice
from gsplice import pipes
from gsplice._pool import idle, lending
from gsplice._pool.idle import LOW_WATER
from gsplice._pool.pipe import alive
from gsplice.pipes import IDLE, UNKNOWN, Pipe, acquire, release

KiB = 1024
MiB = 1024 * KiB


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
    assert lending._local.idle == [pipe]


def test_a_pipe_whose_hub_is_gone_goes_to_all(limits: Callable[..., None]) -> None:
    lent: list[Pipe] = []
    in_thread(lambda: lent.append(lend()))
    release(lent[0])
    assert idle.shared == lent
    assert acquire() is lent[0]
    release(lent[0])
    assert lending._local.idle == lent


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
    assert lent[0] in lending._local.idle
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


# What the kernel grants, and refuses


def test_capacity_is_what_the_kernel_granted_and_steps_down(limits: Callable[..., None]) -> None:
    limits(max_pipes=70)
    lent = [lend() for _ in range(70)]
    assert [pipe.capacity for pipe in lent] == [MiB] * 16 + [256 * KiB] * 48 + [64 * KiB] * 6
    assert [fcntl(pipe.write_fd, F_GETPIPE_SZ) for pipe in lent] == [p.capacity for p in lent]


@pytest.mark.parametrize(
    ("asked", "granted"),
    [(0, 4 * KiB), (1, 4 * KiB), (100_000, 128 * KiB), (MiB, MiB), (1 << 30, MiB)],
)
def test_the_capacity_that_is_set_is_asked_for(
    asked: int, granted: int, limits: Callable[..., None]
) -> None:
    limits(pipe_size=asked)
    pipe = lend()
    assert pipe.capacity == fcntl(pipe.read_fd, F_GETPIPE_SZ) == granted


def test_both_ends_are_nonblocking_and_closed_on_exec(limits: Callable[..., None]) -> None:
    pipe = lend()
    for fd in (pipe.read_fd, pipe.write_fd):
        assert fcntl(fd, F_GETFL) & os.O_NONBLOCK
        assert fcntl(fd, F_GETFD) & FD_CLOEXEC
    with pytest.raises(BlockingIOError):
        os.read(pipe.read_fd, 1)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe.write_fd, bytes(MiB))


#: For programs of their own: a transfer that delivers all, and the counters.
PROGRAM = """
import contextlib, gc, os, resource, sys, threading
from fcntl import F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl
import gevent, gevent.socket, gsplice
from gsplice import pipes
from gsplice._pool import idle, lending
from gsplice._pool.pipe import alive, keys
from gsplice._pool.idle import LOW_WATER
from gsplice.config import settings
from gsplice.pipes import acquire, release
MiB = 1 << 20

def descriptors():
    return len(os.listdir('/proc/self/fd')) - 1

def balanced():
    figures = gsplice.stats()
    in_use, kept = figures.pipes_in_use, figures.pipes_idle
    assert figures.pipes_created == figures.pipes_closed + in_use + kept, figures
    assert min(in_use, kept, figures.pipes_closed, figures.acquired_local) >= 0, figures
    assert len(alive) == in_use + kept, figures
    return figures

def transfer(ends, size=3 * MiB):
    source, sender, sink, target = ends
    data = os.urandom(size)
    def receive():
        received = bytearray()
        while len(received) < size:
            received += target.recv(1 << 16)
        return received
    receiving = gevent.spawn(receive)
    sending = gevent.spawn(lambda: (source.sendall(data), source.shutdown(1)))
    with sender.makefile('rb', 0) as src, sink.makefile('wb') as dst:
        gsplice.copyfileobj(src, dst)
    sending.get()
    assert receiving.get() == data

def sockets():
    return *gevent.socket.socketpair(), *gevent.socket.socketpair()

def close(ends):
    for end in ends:
        end.close()
"""


@pytest.mark.parametrize("left", [0, 1])
def test_no_descriptors_left_is_no_error(left: int) -> None:
    run_program(
        PROGRAM
        + f"""
ends = sockets()
gevent.sleep(0)
before = descriptors()
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))) + 1,) * 2)
# Fill the holes below the limit, and leave some.
filled = []
with contextlib.suppress(OSError):
    while True:
        filled.append(os.dup(0))
for fd in filled[:{left}]:
    os.close(fd)
assert acquire() is None
assert acquire() is None
figures = balanced()
assert (figures.pipes_created, figures.acquired_new, figures.pipes_closed) == (0, 0, 0)
transfer(ends)
assert gsplice.stats().fallbacks['no_pipe'] == 1
for fd in filled[{left}:]:
    os.close(fd)
assert descriptors() <= before, (descriptors(), before)
close(ends)
with gevent.Timeout(30):
    while (pipe := acquire()) is None:  # the kernel is not asked again at once
        gevent.sleep(0.01)
pipe.close()
"""
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("fault", ["ENFILE", "ENOMEM"])
def test_a_system_without_descriptors_or_memory_is_no_error(fault: str, tmp_path: Path) -> None:
    program = (
        PROGRAM
        + """
ends = sockets()
pipes.REFUSED_PERIOD = 3600
assert [acquire() for _ in range(10)] == [None] * 10
figures = balanced()
assert (figures.pipes_created, figures.acquired_new, figures.pipes_closed) == (0, 0, 0)
transfer(ends)
assert gsplice.stats().fallbacks['no_pipe'] == 1
close(ends)
"""
    )

    def trace(what: str, program: str) -> subprocess.CompletedProcess[str]:
        command = ["strace", "-f", "-qq", "-o", tmp_path / "log", "-e", what]
        return subprocess.run(
            [*command, sys.executable, "-c", program], capture_output=True, text=True, timeout=100
        )

    trace("trace=pipe2", "import gevent; gevent.sleep(0)")
    loops_own = (tmp_path / "log").read_text().count("pipe2(")
    done = trace(f"inject=pipe2:error={fault}:when={loops_own + 1}+", program)
    assert (done.stderr, done.returncode) == ("", 0)
    refused = (tmp_path / "log").read_text().count(fault)
    assert refused == 1  # it is not asked again at once


def test_a_user_without_pipe_room_gets_small_pipes_and_then_none() -> None:
    run_program(
        PROGRAM
        + """
ends, more_ends = sockets(), sockets()
gevent.sleep(0)
if os.getuid() == 0:  # who is exempt
    os.setuid(100_000 + os.getpid())
before = descriptors()
taken = []
def take(size=0):
    taken.extend(os.pipe())
    return fcntl(taken[-1], F_SETPIPE_SZ, size) if size else fcntl(taken[-1], F_GETPIPE_SZ)
for _ in range(63):
    take(MiB)
take()
pipe = acquire()
assert pipe.capacity == 64 * 1024  # and no more was granted
release(pipe)
transfer(ends)
assert gsplice.stats().bytes_spliced == 3 * MiB
assert gsplice.stats().acquired_new == 1
lending._local.idle.pop().close()
while take() > 8192:
    pass
now = descriptors()
assert acquire() is None
assert acquire() is None
assert descriptors() == now
figures = balanced()
assert figures.pipes_in_use == figures.pipes_idle == 0
assert figures.pipes_created == figures.acquired_new == 1
transfer(more_ends)
assert gsplice.stats().fallbacks['no_pipe'] == 1
assert descriptors() == now
for fd in taken:
    os.close(fd)
assert descriptors() == before
with gevent.Timeout(30):
    while (pipe := acquire()) is None:  # the kernel is not asked again at once
        gevent.sleep(0.01)
assert pipe.capacity == MiB
close(ends + more_ends)
"""
    )


# Pipes that do not come back


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


# Reclamation


@pytest.mark.parametrize("kept", [16, 300])
def test_a_burst_is_reclaimed_by_collections(kept: int) -> None:
    run_program(
        PROGRAM
        + """
hub = gevent.get_hub()
before = descriptors()
lent = [acquire() for _ in range(300)]
assert None not in lent and descriptors() == before + 600
while lent:
    release(lent.pop())
kept = balanced().pipes_idle
assert kept == min(300, settings.max_idle_hub + settings.max_idle)
assert descriptors() == before + 2 * kept
gc.collect()
assert balanced().pipes_idle == kept  # used since the last collection
for _ in range(2):
    gc.collect()
assert balanced().pipes_idle == LOW_WATER
assert descriptors() == before + 2 * LOW_WATER
""",
        GSPLICE_MAX_PIPES=300,
        GSPLICE_MAX_IDLE_HUB=kept,
    )


WITHOUT_GC = """
gc.disable()
def wait_until_reclaimed(seconds):
    with gevent.Timeout(seconds):
        while balanced().pipes_idle > LOW_WATER:
            gevent.sleep(0.02)
    assert balanced().pipes_idle == LOW_WATER
"""
BURST_WITHOUT_GC = (
    WITHOUT_GC
    + """
hub = gevent.get_hub()
def burst():
    lent = [acquire() for _ in range(300)]
    assert None not in lent
    while lent:
        release(lent.pop())
"""
)


def test_a_burst_is_reclaimed_by_the_hub() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
before = descriptors()
for _ in range(2):
    burst()
    wait_until_reclaimed(30)
    assert descriptors() == before + 2 * LOW_WATER
    gevent.sleep(0.2)
""",
        GSPLICE_MAX_PIPES=300,
    )


@pytest.mark.long
def test_a_burst_is_reclaimed_within_thirty_seconds() -> None:
    run_program(
        PROGRAM + BURST_WITHOUT_GC + "before = descriptors(); burst(); wait_until_reclaimed(30);"
        "assert descriptors() == before + 2 * LOW_WATER",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_reclaims_pipes_that_another_hub_made() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
def other():
    burst()
    gevent.get_hub().destroy()
thread = threading.Thread(target=other)
thread.start()
thread.join()
pipe = acquire()
assert gsplice.stats().acquired_global == 1
release(pipe)
wait_until_reclaimed(10)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_reclaims_pipes_that_its_predecessor_made() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
burst()
hub.destroy(destroy_loop=True)
del hub
gevent.sleep(0)
release(acquire())
wait_until_reclaimed(10)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_pipes_released_where_no_hub_could_reclaim_them_are_not_kept() -> None:
    run_program(
        PROGRAM
        + """
gc.disable()
def work():
    lent = [acquire() for _ in range(300)]
    while lent:
        release(lent.pop())
    assert gevent._hub_local.get_hub_if_exists() is None
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert balanced().pipes_idle == LOW_WATER
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_pipes_lent_before_the_main_thread_has_a_hub_are_reclaimed() -> None:
    run_program(
        PROGRAM
        + WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
assert gevent._hub_local.get_hub_if_exists() is None
lent = [acquire() for _ in range(300)]
while lent:
    release(lent.pop())
assert balanced().pipes_idle == settings.max_idle_hub + settings.max_idle
wait_until_reclaimed(30)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_that_has_used_the_pool_reclaims_what_others_leave_later() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
release(acquire())
gevent.sleep(0.2)
def other():
    gevent.get_hub()
    burst()
    gevent.get_hub().destroy()
thread = threading.Thread(target=other)
thread.start()
thread.join()
assert balanced().pipes_idle > LOW_WATER
wait_until_reclaimed(30)
""",
        GSPLICE_MAX_PIPES=301,
    )


def test_without_descriptors_and_without_a_hub_there_is_no_pipe() -> None:
    run_program(
        PROGRAM
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), descriptors()))
assert acquire() is None
"""
    )


def test_many_hubs_look_no_more_often_than_one() -> None:
    """A pipe lives as long as the README says, however many hubs there are."""
    run_program(
        PROGRAM
        + """
import time
gc.disable()
idle.RECLAIM_PERIOD = 0.2
looks = []
look = idle.reclaim
idle.reclaim = lambda: (looks.append(time.monotonic()), look())
done = threading.Event()
def other():
    release(acquire())
    lent = [acquire() for _ in range(2)]
    while not done.is_set():
        gevent.sleep(0.01)
    while lent:
        release(lent.pop())
    gevent.get_hub().destroy()
threads = [threading.Thread(target=other) for _ in range(8)]
for thread in threads:
    thread.start()
    time.sleep(0.025)
hub = gevent.get_hub()
release(acquire())
while len(looks) < 6:
    gevent.sleep(0.01)
done.set()
for thread in threads:
    thread.join()
assert all(later - earlier > 0.17 for earlier, later in zip(looks, looks[1:])), looks
"""
    )


def test_a_pipe_in_steady_use_is_kept() -> None:
    run_program(
        PROGRAM
        + """
hub = gevent.get_hub()
lent = [acquire() for _ in range(LOW_WATER + 4)]
while lent:
    release(lent.pop())
for _ in range(5):
    lent = [acquire() for _ in range(LOW_WATER + 2)]
    while lent:
        release(lent.pop())
    gc.collect()
figures = balanced()
assert figures.acquired_new == LOW_WATER + 4
assert figures.pipes_idle == LOW_WATER + 2, figures
"""
    )


def test_idle_pipes_keep_no_hub_running() -> None:
    run_program(
        PROGRAM
        + """
idle.RECLAIM_PERIOD = 3600
gevent.get_hub()
release(acquire())
assert gevent.get_hub().join(timeout=30) is True
"""
    )


@pytest.mark.few
@pytest.mark.parametrize("destroyed", [True, False])
@pytest.mark.parametrize("collecting", [True, False])
def test_hubs_that_came_and_went_leave_their_pipes_to_all(
    destroyed: bool, collecting: bool
) -> None:
    run_program(
        PROGRAM
        + f"""
if not {collecting}:
    gc.disable()
gevent.get_hub()
inodes = set()
def work():
    lent = [acquire() for _ in range(3)]
    gevent.sleep(0)
    inodes.update(os.fstat(pipe.read_fd).st_ino for pipe in lent)
    while lent:
        release(lent.pop())
    if {destroyed}:
        gevent.get_hub().destroy(destroy_loop=True)
for _ in range(10):
    # Each takes from the shared list what the one before has left.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
figures = balanced()
assert (figures.pipes_in_use, figures.pipes_idle, figures.pipes_created) == (0, 3, 3), figures
together = threading.Barrier(10)
def crowd():
    lent = [acquire() for _ in range(3)]
    inodes.update(os.fstat(pipe.read_fd).st_ino for pipe in lent)
    together.wait()
    while lent:
        release(lent.pop())
    together.wait()
    if {destroyed}:
        gevent.get_hub().destroy(destroy_loop=True)
threads = [threading.Thread(target=crowd) for _ in range(10)]
for thread in threads: thread.start()
for thread in threads: thread.join()
figures = balanced()
assert (figures.pipes_in_use, figures.pipes_idle, len(inodes)) == (0, 30, 30), figures
lent = [acquire() for _ in range(30)]
assert {{os.fstat(pipe.read_fd).st_ino for pipe in lent}} == inodes
assert gsplice.stats().acquired_global == figures.acquired_global + 30
assert gsplice.stats().acquired_new == 30
pipe = None
lent.clear()
assert balanced().pipes_closed == 30
links = set()
for fd in os.listdir('/proc/self/fd'):
    with contextlib.suppress(FileNotFoundError):
        links.add(os.readlink('/proc/self/fd/' + fd))
assert not links & {{f'pipe:[{{number}}]' for number in inodes}}
"""
    )


def test_a_thread_without_a_hub_has_a_list_as_well(limits: Callable[..., None]) -> None:
    def work() -> bool:
        pipe = lend()
        release(pipe)
        return acquire() is pipe and release(pipe) is None

    with counting() as grown:
        assert in_thread(work)
    assert (grown.acquired_new, grown.acquired_local, grown.pipes_idle) == (1, 1, 1)


def test_a_thread_that_ends_hands_over_no_more_than_there_is_room_for(
    limits: Callable[..., None],
) -> None:
    limits(max_idle=2)

    def work() -> None:
        lent = [lend() for _ in range(5)]
        while lent:
            release(lent.pop())

    with counting() as grown:
        in_thread(work)
    assert (grown.pipes_created, grown.pipes_idle, grown.pipes_closed) == (5, 2, 3)


# Finalizers and interruptions


@pytest.mark.timeout(20)
def test_finalizers_and_reclamation_need_no_lock(limits: Callable[..., None]) -> None:
    plain, cycle = lend(), [lend()]
    cycle.append(cycle)  # type: ignore[arg-type]
    lent = [lend() for _ in range(LOW_WATER + 2)]
    while lent:
        release(lent.pop())
    with counting() as grown, lending._lock:
        del plain, cycle
        pipes.reclaim()
        pipes.reclaim()
        gc.collect()
        assert len(alive) == LOW_WATER
        lending._lock.release()  # counting() asks for it
        lending._lock.acquire()
    assert (grown.pipes_closed, grown.pipes_idle) == (4, -2)


#: Runs interrupt() once, at the first line of gsplice.pipes and gsplice._pipe that is reached, then
#: all over again at the second, and so on: as a collection, a signal or another thread might.
AT_EACH_LINE = """
class Interrupted:
    def __init__(self, at):
        self.at, self.passed, self.where = at, 0, None
    def __enter__(self):
        sys.settrace(self.trace)
    def __exit__(self, *error):
        sys.settrace(None)
    def trace(self, frame, event, arg):
        if '/_pool/' not in frame.f_code.co_filename:
            return None
        if event == 'line':
            self.passed += 1
            if self.passed == self.at:
                self.where = frame.f_code.co_name
                interrupt()
        return self.trace

def leave_two():
    lent = [acquire(), acquire()]
    while lent:
        release(lent.pop())

def use():
    lent = [acquire() for _ in range(5)]
    lent = [pipe for pipe in lent if pipe is not None]
    pipe = None
    assert all(pipe.read_fd >= 0 and pipe.pending == 0 for pipe in lent)
    lent[0].pending = pipes.UNKNOWN
    while lent:
        release(lent.pop())
    pipe = acquire()
    assert pipe.read_fd >= 0
    release(pipe)
    idle.hand_over(lending._local.idle)  # as when a hub is gone
    while idle.shared:
        idle.shared.pop().close()

failed = []
def go_on_interrupted():
    at = 0
    while True:
        at += 1
        leaving = threading.Thread(target=leave_two)  # for the shared list
        leaving.start()
        leaving.join()
        for pipe in idle.shared:
            pipe.uses_seen = pipe.uses  # one more look, and they are closed
        pipe = None
        interrupted = Interrupted(at)
        try:
            with interrupted:
                use()
        except Exception as err:
            failed.append((at, interrupted.where, repr(err)))
        balanced()
        if interrupted.where is None:
            break
        where.add(interrupted.where)

where = set()
gc.collect()
gc.freeze()
for _ in range(2):  # in the second thread nothing has been set up either
    thread = threading.Thread(target=go_on_interrupted)
    thread.start()
    thread.join()
assert not failed, failed
assert where >= {'acquire', 'release', '_acquire_elsewhere', '_release_elsewhere', '_keeper',
                 'hand_over', 'make', 'reserve', '__init__', 'close'}, where
assert balanced().pipes_in_use == 0
"""

INTERRUPTIONS = {
    "a cycle with a pipe is collected": """
def interrupt():
    pipe = pipes.Pipe(next(keys), *os.pipe())
    pipe.uses = 0
    cycle = [pipe]; cycle.append(cycle)
    del pipe, cycle
    gc.collect()
""",
    "reclaimed to the last": """
idle.LOW_WATER = 0
def interrupt():
    pipes.reclaim()
    pipes.reclaim()
""",
    "a pipe is dropped": """
def interrupt():
    pipe = pipes.Pipe(next(keys), *os.pipe())
    pipe.uses = 0
""",
    "another thread takes and leaves": """
def take_and_leave():
    if lending._lock.acquire(blocking=False):  # or the interrupted thread has it
        lending._lock.release()
        pipe = acquire()
        if pipe is not None:
            release(pipe)
def interrupt():
    thread = threading.Thread(target=take_and_leave)
    thread.start()
    thread.join()
""",
}


@pytest.mark.few(1)
@pytest.mark.parametrize("what", INTERRUPTIONS)
@pytest.mark.parametrize("most", [4, 256])
def test_no_line_minds_being_interrupted(what: str, most: int) -> None:
    run_program(
        PROGRAM + INTERRUPTIONS[what] + AT_EACH_LINE,
        GSPLICE_MAX_IDLE_HUB=2,
        GSPLICE_MAX_IDLE=2,
        GSPLICE_MAX_PIPES=most,
    )


def test_no_line_minds_an_exception_from_a_signal_handler() -> None:
    """A time limit by SIGALRM may end a transfer anywhere: the pool is no smaller after it."""
    run_program(
        PROGRAM
        + """
class Stop(BaseException):
    pass
def interrupt():
    names = set()
    frame = sys._getframe()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    # Leaving a with block is Python's to protect; what finalizers raise, it prints.
    if not lending._lock._is_owned() and not names & {'__init__', 'close', '__del__', 'reclaim'}:
        raise Stop
"""
        + AT_EACH_LINE.replace(
            "        except Exception as err:",
            "        except Stop:\n            pass\n        except Exception as err:",
        ).replace("'hand_over', ", "")
        + """
for _ in range(3):
    gc.collect()
assert len(alive) == gsplice.stats().pipes_idle
""",
        GSPLICE_MAX_IDLE_HUB=2,
        GSPLICE_MAX_IDLE=2,
        GSPLICE_MAX_PIPES=6,
    )


def test_a_signal_handler_may_ask_for_the_counters_at_any_line() -> None:
    run_program(
        "import faulthandler; faulthandler.dump_traceback_later(20, exit=True)\n"
        + PROGRAM
        + "interrupt = gsplice.stats\n"
        + AT_EACH_LINE,
        GSPLICE_MAX_IDLE_HUB=2,
        GSPLICE_MAX_IDLE=2,
    )


def test_a_finalizer_may_release_its_pipe_while_the_same_thread_has_the_lock() -> None:
    run_program(
        "import faulthandler; faulthandler.dump_traceback_later(20, exit=True)\n"
        + PROGRAM
        + """
class Owner:
    def __init__(self):
        self.pipe = acquire()
        self.me = self
    def __del__(self):
        release(self.pipe)
Owner()
assert balanced().pipes_in_use == 1
with lending._lock:
    gc.collect()
assert balanced().pipes_in_use == 0
""",
        GSPLICE_MAX_IDLE_HUB=0,
    )


STRESS = """
import collections, random, time
gc.set_threshold(1)
going, passed, errors = True, 0, []
def work(seed):
    chance = random.Random(seed)
    mine, asked = [], 0
    hub = gevent.get_hub()
    try:
        for _ in range(4000):
            what = chance.random()
            if what < 0.5 or not mine:
                pipe = acquire()
                if pipe is not None:
                    assert pipe.read_fd >= 0 and pipe.pending == 0
                    # Nobody else's bytes, and nobody else reads ours.
                    os.write(pipe.write_fd, b'%d' % seed)
                    assert os.read(pipe.read_fd, 10) == b'%d' % seed
                    with book:
                        assert pipe not in lent
                        lent.add(pipe)
                    mine.append(pipe)
                    asked += 1
            else:
                pipe = mine.pop(chance.randrange(len(mine)))
                with book:
                    lent.discard(pipe)
                if what < 0.8:
                    release(pipe)
                elif what < 0.9:
                    pipe.pending = pipes.UNKNOWN
                    release(pipe)
                elif what < 0.95:
                    pipe = [pipe]; pipe.append(pipe)
            pipe = None
            if what < 0.01:
                pipes.reclaim()
        for pipe in mine:
            with book:
                lent.discard(pipe)
            release(pipe)
        counts.append(asked)
        hub.destroy(destroy_loop=True)
    except BaseException as err:
        errors.append(repr(err))
        raise
book, lent, counts = threading.Lock(), set(), []
def watch():
    global passed
    while going:
        passed = max(passed, len(alive))
        time.sleep(0)
watcher = threading.Thread(target=watch)
watcher.start()
sys.setswitchinterval(1e-5)
gevent.sleep(0)  # libuv's first loop opens descriptors that stay
before = descriptors()
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
going = False
watcher.join()
assert not errors, errors
gc.collect()
figures = balanced()
assert figures.pipes_in_use == 0, figures
assert descriptors() == before + 2 * figures.pipes_idle
assert figures.acquired_local + figures.acquired_global + figures.acquired_new == sum(counts)
assert min(figures.acquired_local, figures.acquired_global, figures.acquired_new) > 0, figures
assert 3 <= passed <= settings.max_pipes, passed
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("most", [6, 64])
def test_four_threads_and_a_collection_at_every_turn(most: int) -> None:
    run_program(
        PROGRAM + STRESS,
        GSPLICE_MAX_PIPES=most,
        GSPLICE_MAX_IDLE_HUB=3,
        GSPLICE_MAX_IDLE=3,
        GSPLICE_PIPE_SIZE=65536,
    )


# Memory, and the end


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("hub_room", "calls"), [(16, 100_000), (0, 100_000)], ids=["own list", "shared list"]
)
def test_no_memory_is_kept_by_acquiring_and_releasing(
    hub_room: int, calls: int, limits: Callable[..., None]
) -> None:
    limits(max_idle_hub=hub_room)
    assert blocks_kept(calls) < calls // 1000  # what other threads do counts as well


def test_no_memory_is_kept_by_opening_and_closing(limits: Callable[..., None]) -> None:
    limits(max_idle_hub=0, max_idle=0, pipe_size=4096)
    assert blocks_kept(20_000) < 50


def blocks_kept(calls: int) -> int:
    """Return how many more blocks of memory there are after so many calls."""

    def some(number: int) -> None:
        for _ in range(number):
            release(acquire())  # type: ignore[arg-type]

    some(100)
    gc.collect()
    before = sys.getallocatedblocks()
    some(calls)
    gc.collect()
    return sys.getallocatedblocks() - before


@pytest.mark.few
@pytest.mark.parametrize("hub", ["", "gevent.get_hub()"])
@pytest.mark.parametrize(
    "left",
    [
        "release(acquire())",
        "lent = acquire()",
        "lent = acquire(); cycle = [lent]; cycle.append(cycle); del lent, cycle",
        "lent = [acquire() for _ in range(40)]; half = lent[::2]; del lent\n"
        "while half: release(half.pop())",
        "class A: lent = acquire()\nrelease(acquire())",
        "import atexit; atexit.register(lambda: release(acquire()))",
        "import atexit; atexit.register(gc.collect); release(acquire())",
        "a = acquire(); sys.modules['gsplice.kept'] = a; release(acquire())",
        "gc.callbacks.append(lambda *info: None); release(acquire()); gc.disable()",
        "hub = gevent.get_hub(); release(acquire()); hub.destroy(destroy_loop=True)",
        "release(acquire()); del sys.modules['gsplice.pipes'], gsplice.pipes, pipes",
        "gevent.spawn(lambda: (acquire(), gevent.sleep(0))).join()",
        "kept = gevent.spawn(lambda: (acquire(), gevent.sleep(100))); gevent.sleep(0)",
    ],
)
def test_the_interpreter_ends_silently(left: str, hub: str) -> None:
    run_program(PROGRAM + hub + "\n" + left)


@pytest.mark.few
@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("hub", [True, False])
def test_the_interpreter_ends_silently_with_threads_alive(daemon: bool, hub: bool) -> None:
    run_program(
        PROGRAM
        + f"""
import time
ready, release_all = threading.Event(), threading.Event()
def work():
    if {hub}:
        gevent.get_hub()
    lent = [acquire() for _ in range(8)]
    for pipe in lent[:4]:
        release(pipe)
    ready.set()
    if not {daemon}:
        threading.main_thread().join()
    else:
        while True:
            release(acquire())
for _ in range(3):
    ready.clear()
    threading.Thread(target=work, daemon={daemon}).start()
    ready.wait()
release(acquire())
lent = acquire()
"""
    )
