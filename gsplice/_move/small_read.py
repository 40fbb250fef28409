"""Reading all of a small cached file at once.

The full way of a transfer takes 20 us before the first byte, most of that to recognise the two
ends: as much as reading and sending a small file costs (benchmarks/file_to_socket.py).
"""

from __future__ import annotations

import os
import sys
from io import BufferedReader, FileIO
from typing import Any, Final

from .._ends.exact_type import overrides_nothing
from .._ends.small import SMALL_FILE
from .._os.linux import RWF_NOWAIT
from ..config import KiB, settings

#: If a file has so many bytes or more, we ask whether it is small before we read the rest. One more
#: than a size that files like to have.
_FIRST_READ: Final = 16 * KiB + 1

_ONE_BYTE: Final = (bytearray(1),)


def read_small(
    file: Any, offset: int | None, count: int | None, buffer: bytearray
) -> tuple[int, int]:
    """Read what remains of a small file from *offset* on, or *count* bytes of it, into *buffer*.

    *offset* None: from the position of *file*. *buffer* has room for SMALL_FILE bytes. Returns
    where the bytes are in the file, and how many; 0 bytes if this way does not do: *file* is not
    what ``open(path, "rb")`` returns, or has buffered something, or ends there, or is not small, or
    not in the page cache. In any case the position of *file* stays as it is. Raises nothing.
    """
    nothing = 0, 0
    if (
        type(file) is not BufferedReader
        or not RWF_NOWAIT
        or settings.offload == "always"
        or (file.__dict__ and not overrides_nothing(file))
        or not (offset is None or (type(offset) is int and 0 <= offset <= sys.maxsize))
        or not (count is None or (type(count) is int and count > 0))
    ):
        return nothing
    raw = file.raw
    if type(raw) is not FileIO or raw.closed or (raw.__dict__ and not overrides_nothing(raw)):
        return nothing
    fd = raw.fileno()
    try:
        stands = file.tell()
        if os.lseek(fd, 0, os.SEEK_CUR) != stands:
            return nothing  # something is in its buffer
        position = stands if offset is None else offset
        view = memoryview(buffer)
        at_first = count if count is not None and count <= SMALL_FILE else _FIRST_READ
        number = os.preadv(fd, (view[:at_first],), position, RWF_NOWAIT)
        if number == at_first != count:
            if os.preadv(fd, _ONE_BYTE, position + SMALL_FILE, RWF_NOWAIT):
                return nothing  # it is not small
            number += os.preadv(fd, (view[number:count],), position + number, RWF_NOWAIT)
        if number != count and os.preadv(fd, _ONE_BYTE, position + number, RWF_NOWAIT):
            return nothing  # some of it is not cached
    except OSError:  # not cached, or the filesystem can't tell
        return nothing
    return position, number
