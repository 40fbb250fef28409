"""What a mistake would hurt: a file that got the number of a closed one, the next transfer."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import digest, some_bytes
from ends import Ends, KiB

import gsplice


def assert_clean(directory: Path) -> None:
    """Pass if a transfer on new sockets gets its own bytes and no others."""
    data = some_bytes(100 * KiB, seed=2)
    with Ends(directory) as ends:
        dst, finish = ends.sink("tcp")
        gsplice.copy(ends.source("unix", data), dst)
        assert digest(finish()) == digest(data)


# ---- closed by another greenlet, and the number taken at once by something else


class Victim:
    """An open file that has got the descriptor of something just closed."""

    def __init__(self, directory: Path, wanted: int) -> None:
        self.path = directory / "victim"
        self.path.write_bytes(b"untouched")
        self.files = []
        while True:
            # a pipe would also do, but bytes that get into a file stay to be seen
            self.files.append(os.open(self.path, os.O_RDWR))
            if self.files[-1] >= wanted:
                break
        self.fd = self.files[-1]

    def check(self) -> None:
        try:
            assert self.path.read_bytes() == b"untouched"
            assert os.lseek(self.fd, 0, os.SEEK_CUR) == 0
        finally:
            for fd in self.files:
                os.close(fd)
