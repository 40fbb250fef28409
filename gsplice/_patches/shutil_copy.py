"""The replacements for ``shutil.copyfileobj``, and for the functions that ``copyfile`` calls."""

from __future__ import annotations

import errno
import os
import shutil
from io import BufferedReader, FileIO
from typing import Any, Final

from .._counters import counters
from .._ends.end import End
from .._ends.file import File
from .._ends.recognise import (
    NotOurs,
    check_different_files,
    refusal_at_sight,
    regular_file,
    sink,
    source,
)
from .._move.move import move
from .._move.small_file import copy_small_file
from .._move.transfer import Transfer

#: What ``copyfile``, and so ``copy``, ``copy2``, ``copytree`` and ``move``, call for the contents:
#: the first since CPython 3.8, the second in the versions that have it.
_FAST_COPIES: Final = [
    name for name in ("_fastcopy_sendfile", "_fastcopy_copy_file_range") if hasattr(shutil, name)
]

__implements__ = ["copyfileobj", *_FAST_COPIES]

#: What these names referred to before they were patched.
originals: Final[dict[str, Any]] = {name: getattr(shutil, name) for name in __implements__}

#: What the originals call. If somebody has replaced one of these, the original has to call it.
_calls: Final = {
    name: getattr(os, name)
    for name in ("fstat", "sendfile", "copy_file_range")
    if hasattr(os, name)
}

#: The largest *length* taken: with a larger one, the original fails for want of memory.
_MOST_LENGTH: Final = 1 << 30


def copyfileobj(fsrc: Any, fdst: Any, length: int = 0) -> None:
    """Copy from the position of *fsrc* to that of *fdst*, until *fsrc* ends.

    Between regular files, files of plain gevent stream sockets (``makefile()``) and pipes the bytes
    move inside the kernel, and waiting happens on the hub; anything else goes to the original.
    *length*, the size of the original's pieces in bytes, makes no difference then. On exit, also by
    an error, both objects' positions are where the copy stopped.

    Raises what reading from *fsrc* and writing to *fdst* raise.
    """
    cls = type(fsrc)
    reason: str | None
    if length and not (type(length) is int and -1 <= length <= _MOST_LENGTH):
        reason = "arguments"
    elif (cls is BufferedReader or cls is FileIO) and copy_small_file(fsrc, fdst, length):
        counters.fell_back("small")
        return
    else:
        reason = refusal_at_sight(fsrc, fdst)
    if reason is not None:  # returned, not raised: to raise it takes a microsecond
        counters.fell_back(reason)
        originals["copyfileobj"](fsrc, fdst, length)
        return
    try:
        src, dst = source(fsrc), sink(fdst)
        check_different_files(src, dst)
        if length and length < 0 and not isinstance(src, File) and src.needs_final_read:
            raise NotOurs("arguments")  # a response does not stop at the end of its body then
    except NotOurs as refusal:
        counters.fell_back(refusal.args[0])
    else:
        if isinstance(src, File) and _original_is_faster(src, dst):
            counters.fell_back("small")
        elif move(Transfer(src, dst)):
            return
    originals["copyfileobj"](fsrc, fdst, length)


def _original_is_faster(src: File, dst: End) -> bool:
    """Return whether little remains of *src*, and neither end may have to wait for a disk."""
    size = src.remaining()
    if size <= 0 or not src.is_small() or src.cached(size) < size:
        return False
    return not (isinstance(dst, File) and dst.write_may_wait(size))


def _fast_copy(name: str) -> Any:
    def fast_copy(fsrc: Any, fdst: Any) -> None:
        try:
            if any(getattr(os, call) is not function for call, function in _calls.items()):
                raise NotOurs("replaced")
            src, dst = regular_file(fsrc), sink(fdst)
            if not isinstance(dst, File):
                raise NotOurs("destination_type")
            check_different_files(src, dst)
            if _original_is_faster(src, dst):
                raise NotOurs("small")
        except NotOurs as reason:
            counters.fell_back(reason.args[0])
            originals[name](fsrc, fdst)
            return
        transfer = Transfer(src, dst)
        try:
            move(transfer)
        except OSError as err:
            if transfer.delivered or err.errno == errno.ENOSPC:  # else, copyfileobj() raises it
                err.filename, err.filename2 = fsrc.name, fdst.name
            raise

    fast_copy.__name__ = fast_copy.__qualname__ = name
    fast_copy.__doc__ = originals[name].__doc__
    return fast_copy


globals().update({name: _fast_copy(name) for name in _FAST_COPIES})
