"""Up to which sizes reading and writing costs less than splicing. No other place decides that."""

from __future__ import annotations

from typing import Final

from ..config import KiB, MiB

#: If no more than this remains of a file, it is read and sent: one of each costs less than a splice
#: up to 100 KiB or so (benchmarks/file_to_socket.py), and can't be refused. sendfile() reads so
#: much without asking for the file's size first.
SMALL_FILE: Final = 64 * KiB

#: The largest body of an HTTP message that is left to its own read(): above this size, splicing to
#: a file in memory costs less (benchmarks/download.py).
SMALL_BODY: Final = 1 * MiB
