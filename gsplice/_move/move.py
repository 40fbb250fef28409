"""The entrance: every patched name, and ``copy``, has its bytes moved by :func:`move`."""

from __future__ import annotations

from .._counters import counters
from .._ends.file import File
from .._ends.pipe import CallersPipe
from .file_to_file import file_to_file
from .memory import through_memory, write
from .splice import (
    file_to_socket,
    file_to_socket_by_sendfile,
    stream_through_pool,
    with_callers_pipe,
)
from .transfer import Transfer


def move(transfer: Transfer) -> bool:
    """Move bytes until the source ends or the limit is reached; False: the caller has to read on.

    On entry nobody else uses either object, they are not the same file, and the offset of a source
    file is where to read. Buffered bytes go first. On exit, also by an error, both positions are
    after the bytes delivered. Lets out the errors of the two ends, and what is thrown into the
    greenlet while it waits.
    """
    src, dst = transfer.src, transfer.dst
    is_file = isinstance(src, File)
    is_small = is_file and src.is_small(transfer.limit)
    try:
        buffered = src.take_buffered(transfer.limit)
        dst.flush()
        if buffered:
            write(transfer, buffered)
        reason = None if is_small else move_inside_kernel(transfer)
        if reason is not None:
            counters.fell_back(reason)
        if is_file:
            through_memory(transfer)  # what the kernel did not move, and what was appended since
        elif reason is None and transfer.within_limit(1) and 0 < src.withheld() == src.remaining():
            transfer.wait(
                src.wait_read
            )  # or read_withheld() would wait, and read in a forked child, too
            write(transfer, src.read_withheld())
    finally:
        transfer.leave()
    return is_file or (reason is None and not src.needs_final_read)


def move_inside_kernel(transfer: Transfer) -> str | None:
    """Run the loop that suits the two ends; return None, or the reason why bytes may be left.

    On entry neither object has anything buffered. Ends as :mod:`gsplice._move.splice` says of its
    loops; also returns a reason where no loop suits.
    """
    src, dst = transfer.src, transfer.dst
    if not isinstance(src, File):
        if isinstance(src, CallersPipe) or isinstance(dst, CallersPipe):
            return with_callers_pipe(transfer)
        return stream_through_pool(transfer)
    if isinstance(dst, CallersPipe):
        # The pipe would hold the file's pages, not a copy: the reader would see later changes.
        return "file_to_pipe"
    if isinstance(dst, File):
        return file_to_file(transfer)
    reason = file_to_socket(transfer)
    if reason == "no_pipe":
        counters.fell_back(reason)
        reason = file_to_socket_by_sendfile(transfer)
    return reason
