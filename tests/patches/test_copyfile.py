"""shutil.copyfile, copy, copy2, copytree and move: as unpatched, but on a thread."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import counting, digest, file_of, open_descriptors, run_program, some_bytes
from ends import GUARD, MiB, mounted, threads_done, until
from gevent.monkey import get_original
from slowfs import SlowFS
from unpatched import unpatched

import gsplice

SIZE = 5 * MiB + 3

COPIES: dict[str, Callable[[Path, Path], Any]] = {
    "copyfile": shutil.copyfile,
    "copy": shutil.copy,
    "copy2": shutil.copy2,
}


@pytest.fixture(autouse=True)
def hub() -> Any:
    """Without one, nobody could run meanwhile, and all goes to the original."""
    return gevent.get_hub()


def metadata(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    extended = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return status.st_mode, status.st_mtime_ns, status.st_size, extended


def source_with_metadata(path: Path, size: int) -> Path:
    file_of(path, size)
    os.setxattr(path, "user.note", b"kept")
    path.chmod(0o640)
    os.utime(path, ns=(1_000_000_007, 1_500_000_000_123_456_789))
    return path


@pytest.mark.few
@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, SIZE])
@pytest.mark.parametrize("copy", COPIES)
def test_the_result_and_the_metadata_are_those_of_the_original(
    tmp_path: Path, copy: str, size: int
) -> None:
    src = source_with_metadata(tmp_path / "from", size)
    with unpatched():
        wanted = COPIES[copy](src, tmp_path / "wanted")
    with counting() as grown:
        got = COPIES[copy](src, tmp_path / "got")
    assert (wanted, got) == (tmp_path / "wanted", tmp_path / "got")
    assert digest(got.read_bytes()) == digest(src.read_bytes())
    if copy == "copy2":
        assert metadata(got) == metadata(wanted) == metadata(src)
    else:
        assert got.stat().st_mode == wanted.stat().st_mode
    if size > 64 * 1024:
        assert grown.bytes_copy_file_range == size
        assert grown.offloads > 0
        assert grown.fallbacks == {}
    else:
        assert grown.fallbacks == ({"small": 1} if size else {})


def test_a_tree_is_copied_and_moved_across_filesystems(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for number, path in enumerate([tree / "one", tree / "sub" / "two"]):
        file_of(path, SIZE, seed=number)
    (tree / "link").symlink_to("one")
    elsewhere = Path("/dev/shm") / f"gsplice-{os.getpid()}"
    try:
        with counting() as grown:
            shutil.copytree(tree, tmp_path / "copy", symlinks=True)
            shutil.move(tree, elsewhere)
        for copied in (tmp_path / "copy", elsewhere):
            assert (copied / "link").readlink() == Path("one")
            for number, path in enumerate([copied / "one", copied / "sub" / "two"]):
                assert digest(path.read_bytes()) == digest(some_bytes(SIZE, seed=number))
        assert not tree.exists()
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
    # copy_file_range(2) does not go from one kind of filesystem to another.
    assert (grown.bytes_copy_file_range, grown.bytes_spliced) == (2 * SIZE, 2 * SIZE)
    assert grown.offloads > 0


@pytest.mark.parametrize("direction", ["from", "to"])
def test_others_run_while_the_disk_is_waited_for(
    slow: SlowFS, tmp_path: Path, name: str, direction: str
) -> None:
    data = some_bytes(SIZE)
    if direction == "from":
        (slow.directory / name).write_bytes(data)
        slow.hold(name)
        src, dst, operation = slow.mount / name, tmp_path / "file", "read"
    else:
        src, dst, operation = file_of(tmp_path / "file", SIZE), slow.mount / name, "write"
        slow.hold(name, "write")
    with counting() as grown:
        copying = gevent.spawn(shutil.copyfile, src, dst)
        until(lambda: slow.begun(name, operation))
        slow.release(name, operation)  # this greenlet runs: the hub does not wait
        assert copying.get(timeout=GUARD) == dst
    assert digest(dst.read_bytes()) == digest(data)
    assert grown.offloads > 0
    assert grown.fallbacks == {}


def test_a_killed_copy_ends_at_once_and_leaks_nothing(
    slow: SlowFS, tmp_path: Path, name: str
) -> None:
    (slow.directory / name).write_bytes(some_bytes(SIZE))
    gevent.get_hub().threadpool.apply(bool)  # opens what is opened once
    before = open_descriptors()
    slow.hold(name)
    copying = gevent.spawn(shutil.copyfile, slow.mount / name, tmp_path / "to")
    until(lambda: slow.begun(name))
    copying.kill()  # waits for the greenlet's end
    assert isinstance(copying.value, gevent.GreenletExit)
    slow.release(name)
    threads_done()
    until(lambda: open_descriptors() <= before + 2 * gsplice.stats().pipes_idle)


@pytest.mark.parametrize("size", [SIZE, 3 * MiB])
def test_a_full_filesystem_is_the_error_of_the_original(tmp_path: Path, size: int) -> None:
    src = file_of(tmp_path / "from", size)
    (tmp_path / "full").mkdir()
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=2m", "none"):
        errors = []
        for patched in (contextlib.nullcontext(), unpatched()):
            with patched, pytest.raises(OSError) as caught:
                shutil.copyfile(src, tmp_path / "full" / "to")
            errors.append(caught.value)
    ours, theirs = errors
    assert type(ours) is type(theirs)
    assert (ours.errno, ours.filename, ours.filename2) == (
        errno.ENOSPC,
        theirs.filename,
        theirs.filename2,
    )


def test_errors_before_the_copy_are_those_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    src = file_of(tmp_path / "from", SIZE)
    for arguments in (
        (tmp_path / "none", tmp_path / "to"),
        (src, tmp_path / "none" / "to"),
        (src, tmp_path / "directory"),
        (src, src),
        (tmp_path / "fifo", tmp_path / "to"),
    ):
        errors = []
        for patched in (contextlib.nullcontext(), unpatched()):
            with patched, pytest.raises(OSError) as caught:
                shutil.copyfile(*arguments)
            errors.append((type(caught.value), caught.value.args))
        assert errors[0] == errors[1]


def test_a_replaced_system_call_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other programs, and tracing tools, replace os.sendfile and expect to see calls."""
    called = []

    def sendfile(*args: Any) -> int:
        called.append(args)
        return original(*args)

    original = os.sendfile
    monkeypatch.setattr(os, "sendfile", sendfile)
    with counting() as grown:
        get_original("shutil", "copyfile")(file_of(tmp_path / "from", SIZE), tmp_path / "to")
    assert called
    assert grown.fallbacks == {"replaced": 1}


@pytest.mark.few(1)
@pytest.mark.parametrize("copy", ["copyfile", "copyfileobj"])
def test_where_the_filesystem_shares_blocks_a_copy_takes_no_room(tmp_path: Path, copy: str) -> None:
    image, place = tmp_path / "image", tmp_path / "btrfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(200 * MiB)
    subprocess.run(["mkfs.btrfs", "-q", "-m", "single", image], check=True, capture_output=True)
    with mounted(place, "-o", "loop", image):
        src, dst = file_of(place / "from", 110 * MiB), place / "to"
        os.sync()
        with counting() as grown:
            if copy == "copyfile":
                shutil.copyfile(src, dst)
            else:
                with src.open("rb") as fsrc, dst.open("wb") as fdst:
                    shutil.copyfileobj(fsrc, fdst)
        os.sync()
        assert dst.stat().st_size == 110 * MiB  # twice that does not fit
        with src.open("rb") as one, dst.open("rb") as other:
            while piece := one.read(MiB):
                assert other.read(MiB) == piece
    assert grown.bytes_copy_file_range == 110 * MiB
    assert grown.fallbacks == {}


WITHOUT_HUB = """
import sys
if sys.argv[1] == "monkey":
    import gevent.monkey
    gevent.monkey.patch_all()
import shutil
from gevent._hub_local import get_hub_if_exists
import gsplice
gsplice.patch_all()
getattr(shutil, sys.argv[2])(*sys.argv[3:])
stats = gsplice.stats()
print(stats.bytes_copy_file_range, stats.offloads, dict(stats.fallbacks), get_hub_if_exists())
"""


@pytest.mark.few(2)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("patching", ["monkey", "no monkey"])
def test_before_there_is_a_hub_the_main_thread_copies_itself(
    tmp_path: Path, patching: str, copy: str
) -> None:
    src = file_of(tmp_path / "from", SIZE)
    said = run_program(WITHOUT_HUB, patching, copy, src, tmp_path / "to")
    assert said == f"{SIZE} 0 {{}} None\n"
    assert digest((tmp_path / "to").read_bytes()) == digest(some_bytes(SIZE))


def test_before_there_is_a_hub_a_copy_to_another_filesystem_brings_none(tmp_path: Path) -> None:
    src = file_of(tmp_path / "from", SIZE)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        said = run_program(WITHOUT_HUB, "no monkey", "copyfile", src, f"{memory}/to")
        assert digest(Path(memory, "to").read_bytes()) == digest(some_bytes(SIZE))
    assert said == "0 0 {'other_hub': 1} None\n"


@pytest.mark.few(1)
@pytest.mark.parametrize("error", ["EXDEV", "EIO"])
def test_before_there_is_a_hub_what_the_kernel_does_not_copy_is_read(
    tmp_path: Path, error: str
) -> None:
    src, dst = file_of(tmp_path / "from", SIZE), tmp_path / "to"
    said = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject=copy_file_range:error={error}"]
        + [sys.executable, "-c", WITHOUT_HUB, "monkey", "copyfile", src, dst],
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert said.stdout == "0 0 {'refused': 1} None\n"
    assert digest(dst.read_bytes()) == digest(some_bytes(SIZE))
