"""A file copied into a blocking pipe, as os.pipe() and subprocess make it: the hub never waits."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, digest, file_of, open_descriptors, run_program, some_bytes
from ends import GUARD, MOVERS, KiB, MiB, until
from gevent.monkey import get_original

import gsplice
from gsplice._ends.pipe import CallersPipe
from gsplice.config import settings

SIZE = 300 * KiB + 7
COPIES = [*MOVERS.values(), get_original("shutil", "copyfileobj")]


class BlockingPipe:
    """Both ends of a pipe, a count of what is written to it, and a file to be copied there."""

    def __init__(self, read_fd: int, write_fd: int, src: Any, monkeypatch: Any) -> None:
        self.read_fd = read_fd
        self.src = src
        self.dst = open(write_fd, "wb")
        #: How many bytes each call has put into it, None if it failed.
        self.calls: list[int | None] = []
        for name, position in [("write", 0), ("pwritev", 0), ("splice", 1)]:
            monkeypatch.setattr(os, name, self._recorded(getattr(os, name), position))

    def _recorded(self, call: Callable[..., int], position: int) -> Callable[..., int]:
        def recorded(*args: Any, **kwargs: Any) -> int:
            if self.dst.closed or args[position] != self.dst.fileno():
                return call(*args, **kwargs)
            self.calls.append(None)
            self.calls[-1] = call(*args, **kwargs)
            return self.calls[-1]

        return recorded

    def is_full(self) -> bool:
        return self.holds() > fcntl.fcntl(self.read_fd, fcntl.F_GETPIPE_SZ) - 4 * KiB

    def holds(self) -> int:
        return CallersPipe(None, open(self.read_fd, "rb", 0, closefd=False)).available()

    def copying(self, copy: Callable[..., Any] = gsplice.copy) -> gevent.Greenlet:
        """Start to copy; return when the pipe is full and its room is waited for."""
        copying = gevent.spawn(copy, self.src, self.dst)
        until(self.is_full)  # which is not looked at before the copy waits
        return copying

    def reading(self) -> gevent.Greenlet:
        """Read in a greenlet until the pipe has ended."""

        def read() -> bytes:
            received = []
            while not received or received[-1]:
                gevent.socket.wait_read(self.read_fd)
                received.append(os.read(self.read_fd, 10_000))
            return b"".join(received)

        return gevent.spawn(read)

    def stop_reading(self) -> None:
        read_fd, self.read_fd = self.read_fd, -1
        if read_fd >= 0:
            os.close(read_fd)


@pytest.fixture(params=["pipe", "named", "named, without pipes of ours"])
def pipe(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BlockingPipe]:
    """A pipe, and one that takes no RWF_NOWAIT: so do all before Linux 6.4."""
    if request.param == "pipe":
        read_fd, write_fd = os.pipe()
    else:
        os.mkfifo(tmp_path / "fifo")
        read_fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        write_fd = os.open(tmp_path / "fifo", os.O_WRONLY)
        os.set_blocking(read_fd, True)
    idle: list[Any] = []
    if "without" in request.param:
        monkeypatch.setattr(settings, "max_pipes", 0)
        idle += iter(gsplice.pipes.acquire, None)
    with file_of(tmp_path / "file", SIZE).open("rb") as src:
        made = BlockingPipe(read_fd, write_fd, src, monkeypatch)
        yield made
        made.stop_reading()
        if not made.dst.closed:
            made.dst.raw.close()  # its buffer may hold what nobody reads
    for each in idle:
        gsplice.pipes.release(each)


@pytest.mark.parametrize("mover", MOVERS)
def test_what_fits_goes_in_few_calls(pipe: BlockingPipe, mover: str) -> None:
    fcntl.fcntl(pipe.read_fd, fcntl.F_SETPIPE_SZ, 1 * MiB)
    with counting() as grown:
        MOVERS[mover](pipe.src, pipe.dst)
    assert sum(filter(None, pipe.calls)) == SIZE
    if settings.max_pipes:
        assert [size for size in pipe.calls if size] == [64 * KiB] * 4 + [SIZE - 256 * KiB]
    assert grown.fallbacks == {"file_to_pipe": 1}
    assert (grown.transfers, grown.bytes_copied) == (1, SIZE)
    assert grown.bytes_spliced == grown.bytes_sendfile == 0
    assert os.read(pipe.read_fd, 1 * MiB) == some_bytes(SIZE)


@pytest.mark.parametrize("mover", MOVERS)
def test_a_stalled_reader_costs_nothing(pipe: BlockingPipe, mover: str) -> None:
    with counting() as grown:
        copying = pipe.copying(MOVERS[mover])
        before = len(pipe.calls)
        for _ in range(200):
            gevent.sleep(0)
        assert len(pipe.calls) == before
        assert os.get_blocking(pipe.dst.fileno())
        assert os.get_blocking(pipe.read_fd)
        reading = pipe.reading()
        copying.get(timeout=GUARD)
        assert os.get_blocking(pipe.dst.fileno())
        pipe.dst.close()
        assert digest(reading.get(timeout=GUARD)) == digest(some_bytes(SIZE))
    assert grown.bytes_copied == SIZE
    assert pipe.src.tell() == SIZE


def test_what_others_write_is_not_in_the_way(pipe: BlockingPipe) -> None:
    """Small pieces use up slots, so that less fits than there seems to be room for."""
    fcntl.fcntl(pipe.read_fd, fcntl.F_SETPIPE_SZ, 64 * KiB)
    other = os.dup(pipe.dst.fileno())
    for _ in range(7):
        os.write(other, b"x" * 4095)
        os.write(other, b"xx")
    held = pipe.holds()
    copying = gevent.spawn(gsplice.copy, pipe.src, pipe.dst)
    gevent.sleep(0)
    reading = pipe.reading()
    assert copying.get(timeout=GUARD) == SIZE
    os.close(other)
    pipe.dst.close()
    assert digest(reading.get(timeout=GUARD)) == digest(b"x" * held + some_bytes(SIZE))


@pytest.mark.parametrize("copy", MOVERS.values(), ids=MOVERS)
def test_a_reader_that_goes_away(pipe: BlockingPipe, copy: Callable[..., Any]) -> None:
    copying = pipe.copying(copy)
    delivered = pipe.holds()
    pipe.stop_reading()
    with pytest.raises(BrokenPipeError):
        copying.get(timeout=GUARD)
    assert pipe.src.tell() == delivered


def test_no_reader_at_all(pipe: BlockingPipe) -> None:
    pipe.stop_reading()
    for copy in COPIES:
        pipe.src.seek(0)
        with pytest.raises(BrokenPipeError):
            copy(pipe.src, pipe.dst)


@pytest.mark.parametrize("end", ["kill", "timeout"])
def test_a_copy_that_is_ended(pipe: BlockingPipe, end: str) -> None:
    gsplice.copy(pipe.src, pipe.dst, 1)
    os.read(pipe.read_fd, 1)
    before = open_descriptors()
    copying = pipe.copying()
    if end == "kill":
        copying.kill()
    else:
        gevent.kill(copying, gevent.Timeout())
        with pytest.raises(gevent.Timeout):
            copying.get(timeout=GUARD)
    assert pipe.src.tell() == 1 + pipe.holds()
    assert open_descriptors() <= before
    reading = pipe.reading()
    gsplice.copy(pipe.src, pipe.dst)
    pipe.dst.close()
    assert digest(reading.get(timeout=GUARD)) == digest(some_bytes(SIZE)[1:])


def test_a_pipe_closed_by_another_greenlet(pipe: BlockingPipe) -> None:
    copying = pipe.copying()
    delivered = pipe.holds()
    pipe.dst.close()
    assert digest(pipe.reading().get(timeout=GUARD)) == digest(some_bytes(SIZE)[:delivered])
    with pytest.raises(ValueError, match="closed"):
        copying.get(timeout=GUARD)
    assert pipe.src.tell() == delivered


def test_a_source_closed_by_another_greenlet() -> None:
    read_fd, write_fd = os.pipe()
    ours, theirs = gevent.socket.socketpair()
    with open(read_fd, "rb") as src, open(write_fd, "wb", 0) as feeder, ours, theirs:
        copying = gevent.spawn(gsplice.copy, src, ours)
        gevent.sleep(0)  # it runs until it waits
        src.close()
        feeder.write(b"more")
        with pytest.raises(ValueError, match="closed"):
            copying.get(timeout=GUARD)
        with pytest.raises(BrokenPipeError):
            feeder.write(b"nobody reads this")


def test_a_copy_under_way_is_the_parents(tmp_path: Path) -> None:
    program = """
import errno, os, sys, gevent, gevent.os, gevent.socket, gsplice
from gsplice._ends.pipe import CallersPipe as Pipe
read_fd, write_fd = os.pipe()
src, dst = open(sys.argv[1], 'rb'), open(write_fd, 'wb')
reader = Pipe(None, open(read_fd, 'rb', 0))
def copy():
    try:
        return gsplice.copy(src, dst)
    except OSError as err:
        return errno.errorcode[err.errno]
copying = gevent.spawn(copy)
with gevent.Timeout(30):
    while reader.available() < 60_000:
        gevent.sleep(0)
pid = gevent.os.fork_gevent()
if pid == 0:
    with gevent.Timeout(30, False):
        copying.join()
    os._exit(copying.value == 'ECANCELED')
received = 0
with gevent.Timeout(30):
    while received < os.path.getsize(sys.argv[1]):
        gevent.socket.wait_read(read_fd)
        received += len(os.read(read_fd, 10_000))
    assert copying.get() == received
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
for end in src, dst, reader.raw:
    end.close()
"""
    run_program(program, file_of(tmp_path / "file", SIZE))
