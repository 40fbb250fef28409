"""Pipes of the pool: lent, counted, and known by their inodes."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

import gsplice
from gsplice._pool import idle, lending
from gsplice._pool.pipe import alive
from gsplice.config import settings
from gsplice.pipes import Pipe, acquire, release


def empty_the_pool() -> None:
    """Close every idle pipe."""
    for pipes in idle.idle_lists():
        while pipes:
            pipes.pop().close()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Start with an empty pool; the fixture's value sets its limits until the end of the test."""

    def limit(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(settings, name, value)
        monkeypatch.setattr(lending._keeper().home, "room", settings.max_idle_hub)

    gevent.get_hub()
    lending._keeper().watch()
    release(lend())  # the thread has its list now
    empty_the_pool()
    yield limit
    gc.collect()  # what pytest.raises() has kept
    empty_the_pool()


def lend() -> Pipe:
    pipe = acquire()
    assert pipe is not None
    return pipe


def in_thread(function: Callable[[], Any]) -> Any:
    """Run *function* in a native thread to the thread's end and return what it returned."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results.pop()


def open_pipes() -> set[str]:
    """Return the names of the pipes that this process has open."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
    return links


def is_open(pipe_inode: int) -> bool:
    return f"pipe:[{pipe_inode}]" in open_pipes()


def inode(pipe: Pipe) -> int:
    return os.fstat(pipe.read_fd).st_ino


def assert_balanced() -> None:
    figures = gsplice.stats()
    in_use, kept = figures.pipes_in_use, figures.pipes_idle
    assert figures.pipes_created == figures.pipes_closed + in_use + kept
    assert min(in_use, kept, figures.pipes_closed, figures.acquired_local) >= 0
    assert len(alive) == in_use + kept


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
