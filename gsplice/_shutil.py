"""The replacement for ``shutil.copyfileobj``."""

from __future__ import annotations

import shutil
from typing import Any, Final

from ._stats import counters
from .endpoints import File
from .recognise import NotOurs, different_files, sink, source
from .transfer import Transfer, is_small, move

__implements__ = ["copyfileobj"]

original = shutil.copyfileobj

#: The largest *length* taken: the original reads pieces of that size into memory, and fails where
#: it can't.
_MOST_LENGTH: Final = 1 << 30


def copyfileobj(fsrc: Any, fdst: Any, length: int = 0) -> None:
    """Copy from *fsrc*, where it stands, to *fdst*, where it stands, until *fsrc* ends.

    Between regular files, files of plain gevent stream sockets (``makefile()``) and pipes the bytes
    move inside the kernel, and waiting happens on the hub; anything else goes to the original.
    *length*, a number of bytes, is the original's size of a piece and makes no difference then.
    Both objects are left where the copy stopped, also on an error.

    Raises what reading from *fsrc* and writing to *fdst* raise.
    """
    try:
        if length and not (type(length) is int and -1 <= length <= _MOST_LENGTH):
            raise NotOurs("arguments")
        src, dst = source(fsrc), sink(fdst)
        different_files(src, dst)
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
    else:
        if isinstance(src, File) and is_small(src):
            counters.fell_back("small")
        elif move(Transfer(), src, dst):
            return
    original(fsrc, fdst, length)
