"""The door: every caller asks here for a transfer, and gets the same answer back."""

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
    """Move bytes until the source ends or the limit; return False if the caller has to read on.

    On entry neither object is used by anybody else, they are not the same file, and a file's offset
    is where it is to be read. What the source has read ahead and the destination has not written
    yet goes first. On exit both objects stand where the delivered bytes left them. Lets out the
    errors of the two ends, and what is thrown into the greenlet while it waits.
    """
    src, dst = transfer.src, transfer.dst
    is_file = isinstance(src, File)
    is_small = is_file and src.is_small(transfer.limit)
    try:
        ahead = src.read_ahead(transfer.limit)
        dst.flush()
        write(transfer, ahead)
        reason = None if is_small else move_inside_kernel(transfer)
        if reason is not None:
            counters.fell_back(reason)
        if is_file:
            through_memory(transfer)  # what no other way has moved, or was added since
        elif reason is None and transfer.room(1) and 0 < src.kept() == src.left():
            transfer.wait(src.wait_read)  # here, not in read_kept(): nothing is read in a fork
            write(transfer, src.read_kept())
    finally:
        transfer.leave()
    return is_file or (reason is None and not src.must_read_on)


def move_inside_kernel(transfer: Transfer) -> str | None:
    """Do what :func:`move` does by the one way that suits the two ends, if the kernel will.

    On entry neither object has anything buffered. Ends as the loops of :mod:`gsplice._move.splice`
    do, with the reason if there is no way, or if it leads no further.
    """
    src, dst = transfer.src, transfer.dst
    if not isinstance(src, File):
        if isinstance(src, CallersPipe) or isinstance(dst, CallersPipe):
            return with_callers_pipe(transfer)
        return stream_through_pool(transfer)
    if isinstance(dst, CallersPipe):
        # The pages would wait in the pipe by reference, changing with the file, perhaps for ever.
        return "file_to_pipe"
    if isinstance(dst, File):
        return file_to_file(transfer)
    reason = file_to_socket(transfer)
    if reason == "no_pipe":
        counters.fell_back(reason)
        reason = file_to_socket_by_sendfile(transfer)
    return reason
