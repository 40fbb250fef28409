"""The replacements for ``sendfile`` and ``_sendfile_use_sendfile`` of gevent's socket class."""

from __future__ import annotations

import socket as stdlib_socket
import sys
from io import BufferedReader
from socket import SOCK_STREAM
from typing import Any, Final

from gevent.socket import socket as GeventSocket

from .._counters import counters
from .._ends.recognise import NotOurs, is_known, regular_file, stream_socket
from .._move.memory import leave_buffer, take_buffer, through_memory
from .._move.move import move, move_inside_kernel
from .._move.small_read import read_small
from .._move.transfer import Transfer

__implements__ = ["sendfile", "_sendfile_use_sendfile"]

#: What these names referred to before they were patched.
originals: Final[dict[str, Any]] = {name: getattr(GeventSocket, name) for name in __implements__}


_GiveupOnSendfile: type[Exception] = stdlib_socket._GiveupOnSendfile  # type: ignore[attr-defined]


def sendfile(self: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    """Send *file* until end of file, or *count* bytes of it; return the number of bytes sent.

    A regular file goes to a plain TCP or Unix stream socket by splice(2), waiting on the hub;
    anything else goes to gevent's own ``sendfile``. Arguments, checks, exceptions and timeouts (for
    each wait) are the same as there. An *offset* that is false means the file's position. On exit,
    also by an error, that is where sending stopped.

    Raises ValueError and TypeError for arguments as gevent does, OSError and TimeoutError of the
    socket, OSError of the file.
    """
    cls = type(file)
    if cls is BufferedReader:
        sent = _send_small(self, file, offset, count)
        if sent is not None:
            return sent
    elif not is_known(cls):
        counters.fell_back("source_type")
        return originals["sendfile"](self, file, offset, count)  # type: ignore[no-any-return]
    return _send(self, file, offset, count)


def _send(sock: Any, file: Any, offset: int, count: int | None, sent: int = 0) -> int:
    """Send from *offset* on; *sent* bytes of *count* have been sent already. Return the total."""
    try:
        src = regular_file(file)
        dst = stream_socket(sock)
        if type(offset) is not int:
            raise NotOurs("arguments")
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
        rest = count - sent if sent and count is not None else count
        return sent + originals["sendfile"](sock, file, offset, rest)  # type: ignore[no-any-return]
    sock._check_sendfile_params(file, offset, count)
    if offset:
        src.seek(offset)
    transfer = Transfer(src, dst, count, sent)
    try:
        move(transfer)
    finally:
        if transfer.delivered and src.obj.closed:
            file.seek(0)  # raises ValueError, as does the seek at the end of gevent's sendfile
    return transfer.delivered


def _send_small(sock: Any, file: Any, offset: int, count: int | None) -> int | None:
    """Send all of *file* by a few reads and one send, as fast as gevent's sendfile.

    On entry *file* is a BufferedReader. Returns how many bytes were sent; None if it is not small,
    not cached, or not plain, and nothing was sent. Lets out the errors of send(), with the file's
    position at the first byte to send, and what :func:`_send` does.
    """
    if (
        type(sock) is not GeventSocket
        or sock.timeout == 0.0
        or sock._sock.type != SOCK_STREAM
        or type(offset) is not int
    ):
        return None
    buffer = take_buffer()
    try:
        position, number = read_small(file, offset or None, count, buffer)
        if not number:
            return None
        try:
            sent: int = sock._sock.send(memoryview(buffer)[:number])
        except BlockingIOError:
            return None
        except BaseException:
            file.seek(position)
            raise
    finally:
        leave_buffer(buffer)
    file.seek(position + sent)
    counters.add_transfer("bytes_copied", sent)
    return sent if sent == number else _send(sock, file, position + sent, count, sent)


def _sendfile_use_sendfile(self: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    """Send *file* inside the kernel or not at all, as CPython's method of this name does.

    Unlike :func:`sendfile` it ignores the buffer of *file*, and an *offset* that is false means
    byte 0. Raises ``socket._GiveupOnSendfile`` if nothing can be sent this way. If the kernel
    refuses after some bytes, the rest is read and sent.
    """
    self._check_sendfile_params(file, offset, count)
    try:
        src = regular_file(file)
        if not src.status.st_size:
            return 0
        offset = offset or 0
        if not isinstance(offset, int) or not 0 <= offset < sys.maxsize:
            raise NotOurs("arguments")
        if self.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        dst = stream_socket(self)
    except NotOurs as reason:
        raise _GiveupOnSendfile(reason.args[0]) from None
    src.offset = offset
    transfer = Transfer(src, dst, count)
    try:
        refused = move_inside_kernel(transfer)
        if refused is not None:
            if not transfer.delivered:
                raise _GiveupOnSendfile(refused)
            through_memory(transfer)  # the caller takes a shorter result for the end of the file
    finally:
        if transfer.delivered:
            transfer.leave()
        transfer.close()
    return transfer.delivered
