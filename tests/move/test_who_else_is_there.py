"""Objects that are not ours, blocking pipes, other threads, finalizers."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    counting,
    digest,
    file_of,
    run_program,
    some_bytes,
)
from ends import GUARD, MOVERS, Ends, KiB, MiB
from gevent.monkey import get_original

import gsplice


def test_what_is_copied_to_a_buffer_has_arrived_when_the_copy_returns(ends: Ends) -> None:
    path = ends.path()
    sock, peer = ends.connect()
    with path.open("wb") as file, sock.makefile("wb") as sock_file:
        assert gsplice.copy(io.BytesIO(b"x" * 5000), file) == 5000
        assert path.read_bytes() == b"x" * 5000
        assert gsplice.copy(io.BytesIO(b"x" * 5000), sock_file) == 5000
        assert len(peer.recv(5000, socket.MSG_WAITALL)) == 5000


def test_nothing_now_is_not_the_end(ends: Ends) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    with open(read_fd, "rb", buffering=0) as src, open(write_fd, "wb") as still_open:
        with pytest.raises(BlockingIOError):
            gsplice.copy(src, io.BytesIO())
        assert not still_open.closed


def test_a_copy_between_foreign_objects_gives_way() -> None:
    turns: list[int] = []

    def other() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0)

    running = gevent.spawn(other)
    assert gsplice.copy(io.BytesIO(bytes(16 * MiB)), io.BytesIO()) == 16 * MiB
    running.kill()
    assert len(turns) >= 7


@pytest.mark.parametrize("mover", MOVERS)
def test_a_file_into_a_full_blocking_pipe_waits_on_the_hub(tmp_path: Path, mover: str) -> None:
    data = some_bytes(300 * KiB)
    path = file_of(tmp_path / "file", len(data))
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0) as reader, path.open("rb") as src:

        def read_all() -> bytes:
            received = b""
            while len(received) < len(data):
                gevent.socket.wait_read(read_fd)
                received += reader.read(64 * KiB) or b""
            return received

        reading = gevent.spawn(read_all)  # runs only if the copy waits on the hub
        with open(write_fd, "wb") as dst, counting() as grown:
            MOVERS[mover](src, dst)
        assert digest(reading.get(timeout=GUARD)) == digest(data)
    assert grown.fallbacks == {"file_to_pipe": 1}


# ---- who else writes or reads


def test_a_standard_stream_is_left_to_the_original(tmp_path: Path) -> None:
    """A child that logs to it as well loses no line: only write(2) takes the position's lock."""
    file_of(tmp_path / "from", 1 * MiB)
    program = (
        "import sys, shutil, gevent, gsplice; gevent.get_hub(); gsplice.patch_all()\n"
        "shutil.copyfileobj(open(sys.argv[1], 'rb'), sys.stdout.buffer)\n"
        "print(dict(gsplice.stats().fallbacks), file=sys.stderr)"
    )
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "from"], stdout=log, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"{'standard_stream': 1}\n")
    assert (tmp_path / "log").read_bytes() == (tmp_path / "from").read_bytes()


def test_threads_without_a_hub_that_write_to_one_file_lose_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "from", 8 * MiB)
    pool = gevent.get_hub().threadpool
    with (tmp_path / "to").open("wb", buffering=0) as dst, counting() as grown:

        def copy() -> None:
            with path.open("rb") as src:
                shutil.copyfileobj(src, dst)

        gevent.joinall([pool.spawn(copy) for _ in range(4)], raise_error=True)
    assert (tmp_path / "to").stat().st_size == 4 * 8 * MiB
    assert grown.fallbacks == {"other_hub": 4}


def test_another_thread_that_reads_the_same_pipe_never_sees_nothing(tmp_path: Path) -> None:
    answers: list[Any] = []
    for number in range(30):
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb") as src, (tmp_path / str(number)).open("wb") as dst:
            os.write(write_fd, b"x" * 2000)

            def read(src: Any = src) -> None:
                while data := src.read(3):
                    answers.append(data)
                answers.append(data)

            thread = get_original("threading", "Thread")(target=read)
            thread.start()
            get_original("threading", "Timer")(0.002, os.close, [write_fd]).start()
            shutil.copyfileobj(src, dst)
            thread.join()
    assert None not in answers


def test_a_finalizer_may_copy_at_exit(tmp_path: Path) -> None:
    path = file_of(tmp_path / "from", 5 * MiB)
    run_program(
        """
import sys, shutil, gevent, gsplice
gevent.sleep(0)
gsplice.patch_all()
class Copies:
    def __init__(self, src, dst):
        self.ends = open(src, 'rb'), open(dst, 'wb')
    def __del__(self, copy=shutil.copyfileobj):
        copy(*self.ends)
        for end in self.ends:
            end.close()
copies = Copies(*sys.argv[1:])
""",
        path,
        tmp_path / "to",
    )
    assert digest((tmp_path / "to").read_bytes()) == digest(path.read_bytes())


@pytest.mark.few(2)
@pytest.mark.parametrize("loop", ["libev-cext", "libuv"])
@pytest.mark.parametrize("direction", ["from", "into"])
def test_a_blocking_pipe_is_left_blocking(loop: str, direction: str) -> None:
    """The process at its other end, or one that has inherited it, expects it to be."""
    run_program(
        """
import os, sys, gevent, gevent.socket, gsplice
read_fd, write_fd = os.pipe()
ours, theirs = gevent.socket.socketpair()
reader, writer = open(read_fd, 'rb'), open(write_fd, 'wb')
size = 300_000
if sys.argv[1] == 'from':
    copying = gevent.spawn(gsplice.copy, reader, ours, size)
    gevent.sleep(0.01)
    writer.write(b'x' * 1000)
    writer.flush()
    copied = len(theirs.recv(1000))
    assert os.get_blocking(read_fd)
    copying.kill()
else:
    copying = gevent.spawn(gsplice.copy, ours, writer, size)
    theirs.settimeout(0.01)
    try:
        theirs.sendall(bytes(size))  # more than the pipe takes
    except TimeoutError:
        pass
    gevent.sleep(0.01)
    assert os.get_blocking(write_fd)
    copying.kill()
assert os.get_blocking(read_fd) and os.get_blocking(write_fd)
for end in reader, writer, ours, theirs:
    end.close()
""",
        direction,
        GEVENT_LOOP=loop,
    )
