"""A filesystem that takes its time, files that are cold, and the ways that their bytes go.

While a test holds back the reads (or writes) of the filesystem, its own greenlet runs only if the
hub does not wait for them; :meth:`SlowFS.release` fails if nobody came to let them go.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from cold import ReadAhead, drop
from conftest import (
    digest,
    file_of,
    open_descriptors,
    some_bytes,
)
from ends import GUARD, Ends, KiB, threads_done, until
from gevent.monkey import get_original
from slowfs import SlowFS
from unpatched import unpatched_copyfileobj

import gsplice
from gsplice._threads.threads import Threads, threads
from gsplice.config import settings

#: How many jobs of one filesystem are done at once.
LANE = (settings.threads + 1) // 2


@pytest.fixture(scope="session")
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


@pytest.fixture
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


def needed_a_thread(grown: Any) -> None:
    if not grown.offloads:
        raise ReadAhead


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


@contextlib.contextmanager
def held_beyond(
    beyond: int, slow: SlowFS, name: str, directory: Path, way: str, size: int
) -> Iterator[tuple[Ends, Any, Any, Callable[[], bytes], gevent.Greenlet]]:
    """A copy of a file of *size* bytes, whose reads are held from *beyond* on.

    Gives the ends, source, destination, how to get what arrives, and the greenlet that copies.
    """
    file_of(slow.directory / name, size)
    with Ends(directory) as ends, (slow.mount / name).open("rb") as src:
        dst, finish = sink_for(ends, way)
        slow.hold(name, beyond=beyond)
        moving = ends.spawn(TO_ANY[way][0], src, dst)
        until(lambda: slow.begun(name, beyond=beyond))
        yield ends, src, dst, finish, moving


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


def kill(greenlet: gevent.Greenlet, *_: Any) -> None:
    greenlet.kill(timeout=GUARD)


def time_out(greenlet: gevent.Greenlet, *_: Any) -> None:
    greenlet.kill(gevent.Timeout(), timeout=GUARD)


def descriptors() -> int:
    """Count those that a transfer could have left."""
    return open_descriptors() - 2 * gsplice.stats().pipes_idle


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
