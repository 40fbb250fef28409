"""Files on a disk that the page cache has nothing of."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

from ends import KiB

from gsplice._os.linux import filesystem_type, in_core

EXT4, TMPFS, FUSE = 0xEF53, 0x01021994, 0x65735546


def assert_on_disk(fd: int) -> None:
    assert filesystem_type(fd) not in (TMPFS, FUSE, None), "the tests need a disk"


def drop(fd: int) -> None:
    """Have the page cache forget all of a file; pass if it has."""
    assert_on_disk(fd)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in range(0, os.fstat(fd).st_size, 4 * KiB):
        assert not in_core(fd, offset, 1)  # to try to read it would have it read ahead


class ReadAhead(AssertionError):
    """The kernel had the file ready before it was asked for, so there was no disk to wait for."""


def with_a_cold_file(test: Callable[..., None]) -> Callable[..., None]:
    """Have *test* done again where the disk was as fast as this process: it may have other work."""

    @functools.wraps(test)
    def until_cold(**fixtures: Any) -> None:
        for _ in range(20):
            with contextlib.suppress(ReadAhead):
                return test(**fixtures)
        return test(**fixtures)

    return until_cold
