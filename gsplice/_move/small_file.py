"""A small file that is in the page cache is copied here, before anything else is asked about it.

To recognise two files in full takes longer than to copy so little. One preadv(2) tells that the
source is a file, how much of it is left, and that no disk has to be waited for, and has read it.
"""

from __future__ import annotations

import os
from io import BufferedReader, BufferedWriter, FileIO
from stat import S_ISREG
from typing import Any, Final

from .._ends.exact_type import FILE_METHODS
from .._ends.page_cache import write_may_wait
from .._ends.recognise import is_socket_writer
from .._ends.small import SMALL_FILE
from .._os.linux import RWF_NOWAIT
from ..config import settings
from .memory import leave_buffer, take_buffer

#: A read from the page cache that meets a page which is not there stops before it.
_PAGE: Final = 4096

#: What a BufferedWriter takes beside its buffer.
_EMPTY_WRITER: Final = BufferedWriter.__basicsize__

_ONE_BYTE: Final = (bytearray(1),)


def copy_small_file(fsrc: Any, fdst: Any, length: int) -> bool:
    """Copy what is left of *fsrc*, as the original does; False: there may be more to copy.

    Does nothing unless *fsrc* is a file of at most SMALL_FILE bytes in the page cache, with nothing
    read ahead, that the original would read in one piece of *length*; and *fdst* is a file for
    which no disk is waited for, or a socket's. On exit, also by an error, the position of *fsrc* is
    after what it has read. Lets out what writing raises.
    """
    src = fsrc.raw if type(fsrc) is BufferedReader else fsrc
    dst = fdst.raw if type(fdst) is BufferedWriter else fdst
    if type(src) is not FileIO or settings.offload == "always":
        return False
    is_file = type(dst) is FileIO
    if not is_file and not is_socket_writer(type(dst)):
        return False
    for obj in (fsrc, src, fdst, dst):
        if not FILE_METHODS.isdisjoint(obj.__dict__):
            return False
    buffer = take_buffer()
    try:
        try:
            begin = fsrc.tell()
            if not src.readable():  # the descriptor may be, all the same
                return False
            number = os.preadv(src.fileno(), (buffer,), begin, RWF_NOWAIT)
            if not 0 < number <= SMALL_FILE or (length and 0 < length < number):
                return False
            if fsrc is not src and src.tell() != begin:
                return False
            is_written = is_file and not _fits_buffer(fdst, dst, number)
            if is_written and _write_may_wait(dst, number):
                return False
            end = fsrc.seek(begin + number)
        except (OSError, ValueError):  # not cached, no file, or closed
            return False
        data = memoryview(buffer)[:number]
        # Only a file is known to be done with its argument when it returns.
        fdst.write(data if is_file else bytes(data))
    finally:
        leave_buffer(buffer)
    # There may be pages that are not cached, what has just been written, if both are one file, and
    # what others have appended while the socket was waited for.
    return bool(end % _PAGE and is_file and not is_written) or _is_at_end(src, end)


def _fits_buffer(fdst: Any, dst: Any, number: int) -> bool:
    """Return whether the buffer of *fdst* has room for *number* bytes: then nothing is written."""
    if fdst is dst:
        return False
    room: int = fdst.__sizeof__() - _EMPTY_WRITER - number
    return room > 0 and fdst.tell() - dst.tell() < room


def _write_may_wait(dst: Any, number: int) -> bool:
    """Return whether to write *number* bytes to *dst* may wait, or it is no regular file."""
    status = os.fstat(dst.fileno())
    return not S_ISREG(status.st_mode) or write_may_wait(status.st_dev, number)


def _is_at_end(raw: Any, offset: int) -> bool:
    try:
        return os.preadv(raw.fileno(), _ONE_BYTE, offset, RWF_NOWAIT) == 0
    except (OSError, ValueError):
        return False
