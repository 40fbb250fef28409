"""Pipes as the kernel grants them, or refuses them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fcntl import F_GETFD, F_GETFL, F_GETPIPE_SZ, FD_CLOEXEC, fcntl
from pathlib import Path

import pytest
from conftest import run_program
from ends import KiB, MiB
from pool import PROGRAM, lend


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
lending._local.keeper.home.idle.pop().close()
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
