"""What is small: the one place that says when reading and writing costs less than splicing."""

from __future__ import annotations

from typing import Final

from ..config import KiB, MiB

#: A file with no more than this left goes by one read and one send: they cost less than a splice up
#: to 100 KiB or so (benchmarks/file_to_socket.py), and nothing about them can surprise. A plain
#: sendfile() reads so much without asking first how big the file is.
SMALL_FILE: Final = 64 * KiB

#: The largest body of an HTTP message, by its length, that its own read() gets: to a file in memory
#: this is where splice begins to cost less (benchmarks/download.py).
SMALL_BODY: Final = 1 * MiB
