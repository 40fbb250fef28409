"""Copies between a child's pipes and a socket's file use the child's pipe, and none of the pool."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.subprocess
import pytest
from conftest import counting, digest, file_of, some_bytes
from ends import GUARD, Ends, KiB, MiB
from gevent.monkey import get_original

#: One that fits into a pipe, and one of many pipe-fuls that is no multiple of anything.
SIZES = [1, 5000, 3 * MiB + 7]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with Ends(tmp_path, buffers=16 * KiB) as made, gevent.Timeout(GUARD):
        yield made


def original(src: Any, dst: Any) -> None:
    get_original("shutil", "copyfileobj")(src, dst)


def assert_direct(grown: Any, size: int) -> None:
    """Pass if *size* bytes were spliced, but for what an object had read ahead, by no pipe of ours.

    A file object takes no more than its buffer ahead, and the copy nothing at all.
    """
    assert grown.bytes_spliced + grown.bytes_copied == size
    assert grown.bytes_copied <= 256 * KiB
    assert grown.bytes_spliced or size < 64 * KiB
    assert (grown.transfers, grown.fallbacks, grown.offloads) == (1, {}, 0)
    assert grown.acquired_new == grown.acquired_local == grown.acquired_global == 0
    assert grown.pipes_created == 0


MODULES = pytest.mark.parametrize(
    "module", [gevent.subprocess, subprocess], ids=["gevent", "stdlib"]
)


@pytest.mark.few
@MODULES
@pytest.mark.parametrize("ahead", [0, 100])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", SIZES)
def test_from_the_output_of_a_child(
    ends: Ends, tmp_path: Path, module: Any, size: int, kind: str, ahead: int
) -> None:
    path = file_of(tmp_path / "f", size)

    def run(copy: Callable[[Any, Any], None]) -> tuple[bytes, str, bytes, int]:
        sink, finish = ends.sink(kind)
        with module.Popen(["cat", path], stdout=subprocess.PIPE) as child:
            before = child.stdout.read(ahead)
            copy(child.stdout, sink)
            rest = child.stdout.read()
        return before, digest(finish()), rest, child.returncode

    wanted = run(original)
    assert wanted == (path.read_bytes()[:ahead], digest(path.read_bytes()[ahead:]), b"", 0)
    with counting() as grown:
        assert run(shutil.copyfileobj) == wanted
    if size > ahead:
        assert_direct(grown, size - ahead)


@pytest.mark.few
@MODULES
@pytest.mark.parametrize("ahead", [0, 100])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", SIZES)
def test_to_the_input_of_a_child(
    ends: Ends, tmp_path: Path, module: Any, size: int, kind: str, ahead: int
) -> None:
    data, path = some_bytes(size), tmp_path / "f"

    def run(copy: Callable[[Any, Any], None]) -> tuple[bytes, str, int]:
        source = ends.source(kind, data)
        before = source.read(ahead)
        command = ["sh", "-c", 'exec cat >"$0"', path]
        with module.Popen(command, stdin=subprocess.PIPE) as child:
            copy(source, child.stdin)
        return before, digest(path.read_bytes()), child.returncode

    wanted = run(original)
    assert wanted == (data[:ahead], digest(data[ahead:]), 0)
    with counting() as grown:
        assert run(shutil.copyfileobj) == wanted
    if size > ahead:
        assert_direct(grown, size - ahead)


@MODULES
def test_a_child_that_ends_before_it_has_read_everything(ends: Ends, module: Any) -> None:
    def run(copy: Callable[[Any, Any], None]) -> Any:
        source = ends.source("tcp", some_bytes(3 * MiB))
        command = ["head", "-c", "1000"]
        with module.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            with pytest.raises(BrokenPipeError):
                copy(source, child.stdin)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()  # the original has left something in its buffer
            assert len(child.stdout.read()) == 1000
        return child.returncode

    assert run(original) == run(shutil.copyfileobj) == 0
