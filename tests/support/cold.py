"""Files on a disk that the page cache has nothing of."""

from __future__ import annotations

import os

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
