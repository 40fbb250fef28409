"""Moving bytes between two ends, the way that suits the two.

The ways are in :mod:`gsplice._files` and :mod:`gsplice._streams`: only there, splice and its
relatives are called. A way ends like this. It returns None: the source has ended, or the limit is
reached. It returns a reason: it leads no further; everything taken in has been delivered, and the
caller goes on another way. It raises: the ends' own errors (OSError, TimeoutError, ValueError for a
file closed under way), and whatever is thrown into a greenlet that waits (GreenletExit,
gevent.Timeout). In every case ``Transfer.delivered`` says how many bytes have arrived, and no pipe
is lent any more, unless a thread is still at work on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._files import file_to_file, file_to_socket, through_memory
from ._stats import counters
from ._streams import directly, through_pool
from ._transfer import Transfer, read, write
from .config import SMALL
from .endpoints import Endpoint, File, Pipe, Socket

__all__ = ["Transfer", "file_to_socket", "is_small", "move", "read", "through_memory"]


def is_small(src: File, dst: Endpoint) -> bool:
    """Say whether reading what is left of *src*, all resident, and writing it is fast enough."""
    src.offset = src.obj.tell()
    left = src.left()
    if not 0 < left <= SMALL or src.ready(left) < left:
        return False
    return not (isinstance(dst, File) and dst.write_waits(left))


def move(transfer: Transfer, src: Endpoint, dst: Endpoint) -> bool:
    """Move from *src* to *dst* until *src* ends or the limit; False: the caller has to read on.

    On entry neither object is used by anybody else, and they are not the same file. What *src* has
    read ahead and *dst* has not written yet goes first. On exit both objects stand where the
    delivered bytes left them.
    """
    if isinstance(src, File):
        src.offset = src.obj.tell()
    way = _way(transfer, src, dst)
    try:
        ahead = src.read_ahead(transfer.limit)
        dst.flush()
        write(transfer, dst, ahead, src)
        reason = way(transfer, src, dst)
        if reason is not None:
            counters.fell_back(reason)
        if isinstance(src, File):
            through_memory(transfer, src, dst)  # what no other way has moved, or was added since
        elif reason is None and transfer.room(1) and 0 < src.kept() == src.left():
            transfer.wait(src.wait_read)  # here, not in read_kept(): nothing is read in a fork
            write(transfer, dst, src.read_kept())
    finally:
        transfer.leave(src, dst)
    return isinstance(src, File) or (reason is None and not src.must_read_on)


def _way(
    transfer: Transfer, src: Endpoint, dst: Endpoint
) -> Callable[[Transfer, Any, Any], str | None]:
    if not isinstance(src, File):
        return directly if isinstance(src, Pipe) or isinstance(dst, Pipe) else through_pool
    if transfer.room(src.left()) <= SMALL:
        return _nothing
    if isinstance(dst, Pipe):
        return _not_into_pipe
    return file_to_socket if isinstance(dst, Socket) else file_to_file


def _nothing(transfer: Transfer, src: File, dst: Endpoint) -> None:
    """Leave all of *src* to be moved through memory."""


def _not_into_pipe(transfer: Transfer, src: File, dst: Pipe) -> str:
    # The pages would wait in the pipe by reference, changing with the file, perhaps for ever.
    return "file_to_pipe"
