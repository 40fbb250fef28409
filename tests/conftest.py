"""What every test can use: connected sockets, files with known bytes, and counters."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.hub
import gevent.socket
import pytest
from gevent.threadpool import ThreadPool

import gsplice
from gsplice._ends import page_cache
from gsplice._os.linux import filesystem_type

#: Fixtures of several rooms.
pytest_plugins = [
    "example_file_server",
    "pairs",
    "pool",
    "processes",
    "recognising",
    "responses",
    "sameness",
    "slow_disks",
    "wsgi",
]

#: The name of a socket pair, and the same through a real connection.
Pair = tuple[gevent.socket.socket, gevent.socket.socket]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as thorough all but a few of the cases of the tests that say so."""
    tests: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("long"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        for item in spare(cases, *cases[0].get_closest_marker("few").args):
            item.add_marker(pytest.mark.thorough)


def spare(cases: list[Any], most: int = sys.maxsize) -> list[Any]:
    """Return what is left when each value of each parameter has been tried, or *most* cases."""
    # One object stands for a value in all cases, and need be neither hashable nor comparable.
    values = [{(name, id(value)) for name, value in each.callspec.params.items()} for each in cases]
    untried = set().union(*values)
    left = dict(enumerate(values))
    while untried and len(cases) - len(left) < most:
        best = max(left, key=lambda case: len(left[case] & untried))
        untried -= left.pop(best)
    return [cases[case] for case in left]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What greenlets of these tests end with need not fill the log."""
    monkeypatch.setattr(gevent.get_hub(), "print_exception", lambda *args: None)


@pytest.fixture(autouse=True, scope="session")
def patched() -> Iterator[gsplice.PatchResult]:
    """All names patched; gevent.monkey.get_original() has the originals."""
    gevent.get_hub()  # without one, nobody could run meanwhile, and files go to the originals
    yield gsplice.patch_all()
    gsplice.unpatch_all()


@pytest.fixture(scope="session")
def some_types() -> dict[int, tuple[int | None, float]]:
    """Types of filesystems that stay mounted, believed for ever."""
    with tempfile.TemporaryFile() as disk, tempfile.TemporaryFile(dir="/dev/shm") as memory:
        memfd = os.memfd_create("filesystem")
        fds = [disk.fileno(), memory.fileno(), memfd]
        types = {os.fstat(fd).st_dev: (filesystem_type(fd), float("inf")) for fd in fds}
        os.close(memfd)
    return types


@pytest.fixture(autouse=True)
def filesystems_known(some_types: dict[int, tuple[int | None, float]]) -> None:
    """What a thread learns in the course of a first transfer is known in every test."""
    page_cache._types.clear()
    page_cache._types.update(some_types)


@pytest.fixture(autouse=True)
def no_pipe_lost() -> Iterator[None]:
    """No test leaves a pipe lent out, but for one that a thread is about to close."""
    yield
    with gevent.Timeout(10):
        while gsplice.stats().pipes_in_use:
            gevent.sleep(0.001)


@pytest.fixture(autouse=True, scope="session")
def hubs_of_threads() -> Iterator[list[object]]:
    """What has made a hub on a thread of a pool: see tests/threads/test_jobs_on_threads.py."""
    plain_init = gevent.hub.Hub.__init__
    made: list[object] = []

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(gevent.getcurrent(), ThreadPool._WorkerGreenlet):
            made.append(traceback.format_stack())
        plain_init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gevent.hub.Hub, "__init__", noted)
        yield made


@pytest.fixture(autouse=True)
def no_hub_on_a_thread(hubs_of_threads: list[object]) -> Iterator[None]:
    """No job of a test makes a hub on its thread."""
    hubs_of_threads.clear()
    yield
    assert hubs_of_threads == []


@pytest.fixture(autouse=True, scope="session")
def dropped_watchers() -> Iterator[list[str]]:
    """The watchers of libuv that nobody has closed before the last reference went."""
    dropped: list[str] = []

    def note(self: Any) -> None:
        if self._watcher is not None and self.loop is not None and self.loop.ptr:
            dropped.append(repr(self))

    with pytest.MonkeyPatch.context() as patch:
        if "libuv" in gevent.config.loop.__module__:
            patch.setattr(gevent.get_hub().loop.WatcherType, "__del__", note, raising=False)
        yield dropped


@pytest.fixture(autouse=True)
def no_watcher_dropped(dropped_watchers: list[str]) -> Iterator[None]:
    """No test drops a watcher that is not closed, as a Timeout has one.

    Its memory is used again while libuv still has it in a list, and the process crashes some time
    later, most often when it forks: uv_loop_fork() walks the list.
    """
    dropped_watchers.clear()
    yield
    assert dropped_watchers == []


@pytest.fixture
def tcp() -> Iterator[Callable[[], Pair]]:
    """Make connected TCP sockets of gevent's class, closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect() -> Pair:
            with gevent.socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                client = gevent.socket.create_connection(listener.getsockname())
                server, _ = listener.accept()
            for sock in (client, server):
                stack.callback(sock.close)
            return client, server

        yield connect


@pytest.fixture
def unix() -> Iterator[Callable[[], Pair]]:
    """Make connected Unix stream sockets of gevent's class, closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect() -> Pair:
            pair: Pair = gevent.socket.socketpair()
            for sock in pair:
                stack.callback(sock.close)
            return pair

        yield connect


@contextlib.contextmanager
def counting() -> Iterator[SimpleNamespace]:
    """Fill in, at the end of the block, by how much each counter has grown."""
    before = gsplice.stats().as_dict()
    grown = SimpleNamespace()
    yield grown
    after = gsplice.stats().as_dict()
    fallbacks = {
        reason: count - before["fallbacks"].get(reason, 0)
        for reason, count in after.pop("fallbacks").items()
    }
    grown.fallbacks = {reason: count for reason, count in fallbacks.items() if count}
    for name, number in after.items():
        setattr(grown, name, number - before[name])


def some_bytes(size: int, seed: int = 0) -> bytes:
    """Return *size* bytes that no other seed gives, without a period."""
    return random.Random(seed).randbytes(size)


def file_of(path: Path, size: int, seed: int = 0) -> Path:
    """Write a file of :func:`some_bytes` and return its path."""
    path.write_bytes(some_bytes(size, seed))
    return path


def receive_all(sock: Any) -> bytes:
    """Receive until the peer has finished."""
    received = bytearray()
    while data := sock.recv(1 << 16):
        received += data
    return bytes(received)


def receiver(sock: Any) -> gevent.Greenlet:
    """Start to receive all from *sock*; ``.get()`` gives the bytes."""
    return gevent.spawn(receive_all, sock)


def open_descriptors() -> int:
    """Count the descriptors of this process, but for those of /dev/null, of which one is kept."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(link) and os.readlink(link) != os.devnull for link in links)


def digest(data: bytes) -> str:
    """Return a short name for *data*, for messages that a person can read."""
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}"


@contextlib.contextmanager
def ended_with(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start *command*, its output a pipe; when the block is left by an error, it is killed.

    ``with subprocess.Popen`` alone would wait for it, and the time limit of a test that hangs
    would hang as well.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def run_program(program: str, *arguments: object, **environ: object) -> str:
    """Run *program* in an interpreter of its own, which ends well and silently; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {name: str(value) for name, value in environ.items()},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


@contextlib.contextmanager
def no_pipe_to_be_had(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the pool lend no pipe."""
    monkeypatch.setattr(gsplice.config.settings, "max_pipes", 0)
    taken = []
    while (pipe := gsplice.pipes.acquire()) is not None:
        taken.append(pipe)
    try:
        yield
    finally:
        for pipe in taken:
            gsplice.pipes.release(pipe)
