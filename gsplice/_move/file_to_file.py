"""From a file to a file: copy_file_range(2), else splice(2), both on a thread."""

from __future__ import annotations

import os

from .._ends.page_cache import refuse_uncached
from .._os.hub import hub_to_serve
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN, Pipe
from .account import PIECE
from .to_disk import into_file
from .transfer import Transfer


def file_to_file(transfer: Transfer) -> str | None:
    """Copy from the source's offset to where the destination stands.

    On entry neither object has anything buffered. Ends as the loops of :mod:`gsplice._move.splice`
    do, but any error of a system call ends the way, not the transfer: nothing is under way between
    the calls, so reading and writing, which come last, meet the same error and raise it.
    """
    src = transfer.src
    ways = [("bytes_copy_file_range", _by_copy_file_range), ("bytes_spliced", _by_splice)]
    if hub_to_serve() is None:
        del ways[1]  # the pipe would bring a hub
    if not hasattr(os, "copy_file_range"):  # where Python was built with glibc < 2.27
        del ways[0]
    while (asked := transfer.room(min(PIECE, src.left()))) > 0:
        if not ways:
            return "refused"
        counter, way = ways[0]
        copied = way(transfer, asked)
        if copied < 0:
            del ways[0]
        elif copied == 0:
            break
        else:
            transfer.moved(copied, counter)
            transfer.give_way()
    return None


def _by_copy_file_range(transfer: Transfer, asked: int) -> int:
    src = transfer.src
    return into_file(transfer, asked, (src,), _copy_range, src.offset, asked)


def _copy_range(src_fd: int, dst_fd: int, position: int, offset: int, asked: int) -> int:
    """Copy *asked* bytes, or what there is; say how many. Runs on a thread."""
    copied = 0
    while copied < asked:
        try:
            number = os.copy_file_range(
                src_fd, dst_fd, asked - copied, offset + copied, position + copied
            )
        except OSError:
            if not copied:
                raise
            break
        if not number:
            break
        copied += number
    return copied


def _by_splice(transfer: Transfer, asked: int) -> int:
    """Copy through a pipe, which unlike sendfile(2) leaves the position of the file alone."""
    pipe = acquire()
    if pipe is None:
        return -1
    src = transfer.src
    try:
        pipe.pending = UNKNOWN
        return into_file(
            transfer, asked, (src,), _splice_range, src.offset, asked, pipe, loans=(pipe,)
        )
    finally:
        release(pipe)


def _splice_range(
    src_fd: int, dst_fd: int, position: int, offset: int, asked: int, pipe: Pipe
) -> int:
    """Copy *asked* bytes through *pipe*, which is empty, or what there is; say how many.

    On exit ``pipe.pending`` is what it holds: not 0 after an error that came too late to tell.
    Runs on a thread.
    """
    pending = copied = 0
    try:
        refuse_uncached(src_fd)
        while pending or copied < asked:
            if not pending:
                pending = os.splice(src_fd, pipe.write_fd, asked - copied, offset + copied)
                if not pending:
                    break
            drained = os.splice(pipe.read_fd, dst_fd, pending, offset_dst=position + copied)
            if not drained:
                break
            pending -= drained
            copied += drained
    except OSError:
        if not copied:
            raise
    finally:
        pipe.pending = pending
    return copied
