"""Where there is no room: no pipe quota, no descriptors, no pipes, no space on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import digest, run_program, some_bytes
from ends import GUARD, Ends, MiB, mounted, threads_done
from paths import PYTHONPATH
from transfers import TRANSFERS, Kind, set_back
from victims import assert_clean

import gsplice
from gsplice.config import settings

Record = Callable[[str, object], None]

#: As somebody whose pipe room is used up: so many transfers at once, twice patched, twice not.
NO_ROOM = """
import fcntl, json, os, random, resource, sys, time
import gevent, gevent.socket, gsplice, shutil
from gevent.monkey import get_original
many = {many}
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16),) * 2)
gevent.get_hub().threadpool.apply(bool)
gsplice.patch_all()
os.setuid(65534)
held = []
size = 1 << 20
while size > 8192 or len(held) < 100:  # until a new pipe has two slots only
    held.append(os.pipe())
    try:
        fcntl.fcntl(held[-1][0], fcntl.F_SETPIPE_SZ, 1 << 20)
    except PermissionError:
        size = fcntl.fcntl(held[-1][0], fcntl.F_GETPIPE_SZ)
data = random.Random(1).randbytes(100_000)

def one(copyfileobj):
    pairs = [gevent.socket.socketpair() for _ in range(2)]
    (ours, feeder), (sink, target) = pairs
    def receive():
        received = bytearray()
        while piece := target.recv(1 << 16):
            received += piece
        return received
    receiving = gevent.spawn(receive)
    feeding = gevent.spawn(lambda: (feeder.sendall(data), feeder.shutdown(1)))
    with ours.makefile('rb', 0) as src, sink.makefile('wb', 0) as dst:
        copyfileobj(src, dst)
    sink.shutdown(1)
    assert receiving.get() == data
    feeding.get()
    for pair in pairs:
        for sock in pair:
            sock.close()

def all_at_once(copyfileobj):
    start = time.process_time()
    greenlets = [gevent.spawn(one, copyfileobj) for _ in range(many)]
    for greenlet in greenlets:
        greenlet.get()
    return time.process_time() - start

def unpatched(src, dst):
    # Copies in the same pieces: what fits into a socket's buffer at once.
    get_original('shutil', 'copyfileobj')(src, dst)

ways = [shutil.copyfileobj, unpatched]
times = [[all_at_once(way) for way in ways] for _ in range({rounds} + 1)][1:]
figures = gsplice.stats()
assert figures.fallbacks['no_pipe'] >= many
assert figures.pipes_in_use == 0
patched, plain = (sorted(column)[len(times) // 2] for column in zip(*times))
print(json.dumps(patched / plain))
"""


@pytest.mark.parametrize(
    ("many", "rounds"), [(200, 1), pytest.param(2000, 6, marks=pytest.mark.long)]
)
def test_a_user_without_pipe_room(many: int, rounds: int, record_property: Record) -> None:
    """Speed decides nothing here: the ratio of CPU time to unpatched is in the runner's table."""
    ratio = run_program(NO_ROOM.format(many=many, rounds=rounds))
    record_property("cases", 2 * many * (rounds + 1))
    record_property("patched / unpatched", round(float(ratio), 2))


NO_DESCRIPTORS = """
import contextlib, os, resource, sys
from pathlib import Path
import gevent, gsplice
from conftest import digest, some_bytes
from ends import Ends
from transfers import TRANSFERS, set_back
gevent.get_hub().threadpool.apply(bool)
gevent.sleep(0)
gsplice.patch_all()
tried = 0
for kind in TRANSFERS:
    if kind.name in ('copyfile', 'download', 'upload') or kind.headed:
        continue  # these open files themselves
    kind.set_up()
    data = some_bytes(kind.size)
    with Ends(Path(sys.argv[1])) as ends:
        src = ends.source(kind.source, data)
        dst, finish = ends.sink(kind.sink, b"", kind.half_closed)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir('/proc/self/fd')))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        filled = []
        with contextlib.suppress(OSError):
            while True:
                filled.append(os.dup(0))
        try:
            kind.run(src, dst)
        finally:
            for fd in filled:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert digest(finish()) == digest(data), kind
    set_back()
    gsplice.pipes.reclaim()
    gsplice.pipes.reclaim()
    tried += 1
assert gsplice.stats().pipes_in_use == 0
print(tried)
"""


def test_no_descriptor_left(tmp_path: Path, record_property: Record) -> None:
    record_property("cases", int(run_program(NO_DESCRIPTORS, tmp_path, PYTHONPATH=PYTHONPATH)))


@pytest.mark.few(1)
@pytest.mark.parametrize("most", [0, 1, 2])
def test_few_pipes_for_many(tmp_path: Path, most: int, record_property: Record) -> None:
    kinds = [kind for kind in TRANSFERS if "max_pipes" not in kind.settings]

    def run(kind: Kind) -> None:
        data = some_bytes(kind.size)
        with Ends(tmp_path / str(id(gevent.getcurrent()))) as ends:
            ends.directory.mkdir()
            src = ends.source(kind.source, kind.preface + data)
            dst, finish = ends.sink(kind.sink, kind.request, kind.half_closed)
            kind.run(src, dst)
            assert digest(kind.body(finish())) == digest(data)

    settings.max_pipes = most
    try:
        for offload in ("auto", "always"):
            settings.offload = offload
            running = [gevent.spawn(run, kind) for kind in kinds]
            for greenlet in running:
                greenlet.get(timeout=GUARD)
    finally:
        set_back()
    threads_done()
    record_property("cases", 2 * len(kinds))


# ---- a destination with no room

FILE_SINKS = [kind for kind in TRANSFERS if kind.sink == "file" and kind.size > 2 * MiB]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("small")
    with mounted(place, "-t", "tmpfs", "-o", "size=1500k", "tmpfs"):
        yield place


@pytest.fixture(scope="module")
def quota(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs on which there is more room than one may use: root, too."""
    image = tmp_path_factory.mktemp("image") / "btrfs"
    with image.open("wb") as file:
        file.truncate(256 * MiB)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    place = tmp_path_factory.mktemp("quota")
    with mounted(place, "-o", "loop", image):
        subprocess.run(["btrfs", "quota", "enable", place], check=True)
        subprocess.run(["btrfs", "qgroup", "limit", "2M", place], check=True)
        yield place


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", FILE_SINKS, ids=str)
@pytest.mark.parametrize(("where", "error"), [("small_disk", "ENOSPC"), ("quota", "EDQUOT")])
def test_a_full_disk(
    kind: Kind, where: str, error: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The error is that of the disk, and a true prefix is there, up to where the file stands."""
    place: Path = request.getfixturevalue(where) / "sink"
    data = some_bytes(kind.size)
    kind.set_up()
    try:
        with Ends(tmp_path) as ends, contextlib.ExitStack() as stack:
            src = ends.source(kind.source, kind.preface + data)
            dst: Any = stack.enter_context(place.open("wb", buffering=0))
            if kind.swallows:
                kind.run(src, dst)
            else:
                with pytest.raises(OSError) as caught, gevent.Timeout(GUARD):
                    kind.run(src, dst)
                assert caught.value.errno == getattr(errno, error)
            threads_done()
            written = place.read_bytes()
            assert digest(written) == digest(data[: len(written)])
            assert 0 < len(written) < kind.size
            if kind.positions:
                assert dst.tell() == len(written)
                assert kind.source != "file" or src.tell() == len(written)
    finally:
        set_back()
        place.unlink()
        os.sync()
    assert gsplice.stats().pipes_in_use == 0
    assert_clean(tmp_path)
