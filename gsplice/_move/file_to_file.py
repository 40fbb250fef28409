"""From a file to a file: copy_file_range(2), else splice(2), both on a thread."""

from __future__ import annotations

import os

from .._ends.page_cache import refuse_uncached
from .._os.hub import hub_to_serve
from .._pool.lending import acquire, release
from .._pool.pipe import UNKNOWN, Pipe
from .account import PIECE
from .to_disk import write_on_thread
from .transfer import Transfer


def file_to_file(transfer: Transfer) -> str | None:
    """Copy from the source's offset to the destination's position.

    On entry neither object has anything buffered. Ends as :mod:`gsplice._move.splice` says of its
    loops, except that no error of a system call is raised: nothing is lost between two calls, so
    the next way is tried, and reading and writing, the last, meets the error again and raises it.
    """
    src = transfer.src
    ways = [("bytes_copy_file_range", _by_copy_file_range), ("bytes_spliced", _by_splice)]
    if hub_to_serve() is None:
        del ways[1]  # acquire() would make a hub
    if not hasattr(os, "copy_file_range"):  # where Python was built with glibc < 2.27
        del ways[0]
    while (asked := transfer.within_limit(min(PIECE, src.remaining()))) > 0:
        if not ways:
            return "refused"
        counter, way = ways[0]
        copied = way(transfer, asked)
        if copied < 0:
            del ways[0]
        elif copied == 0:
            break
        else:
            transfer.count_delivered(copied, counter)
            transfer.give_way()
    return None


def _by_copy_file_range(transfer: Transfer, asked: int) -> int:
    src = transfer.src
    return write_on_thread(transfer, asked, (src,), _copy_range, src.offset, asked)


def _copy_range(src_fd: int, dst_fd: int, position: int, offset: int, asked: int) -> int:
    """Copy *asked* bytes, or up to the end; return how many, or raise if none. On a thread."""
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
    """Copy through a pipe of the pool: unlike sendfile(2), splice(2) can write at an offset."""
    pipe = acquire()
    if pipe is None:
        return -1
    src = transfer.src
    try:
        pipe.pending = UNKNOWN
        return write_on_thread(
            transfer,
            asked,
            (src,),
            _splice_range,
            src.offset,
            asked,
            src.status.st_dev,
            pipe,
            resources=(pipe,),
        )
    finally:
        release(pipe)


def _splice_range(
    src_fd: int, dst_fd: int, position: int, offset: int, asked: int, device: int, pipe: Pipe
) -> int:
    """Copy *asked* bytes, or up to the end, through *pipe*, which is empty on entry.

    Returns how many bytes were copied. On exit ``pipe.pending`` is what the pipe holds: not 0 if a
    drain failed. Lets out OSError only if nothing was copied before it. Runs on a thread.
    """
    pending = copied = 0
    try:
        refuse_uncached(src_fd, device)
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
