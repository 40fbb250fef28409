"""The replacements for ``sendfile`` and ``_sendfile_use_sendfile`` of gevent's socket class."""

from __future__ import annotations

import socket as _stdlib_socket
from typing import Any

from gevent.socket import socket as GeventSocket

from ._stats import counters
from .recognise import NotOurs, regular_file, stream_socket
from .transfer import Transfer, file_to_socket, send_file

__implements__ = ["sendfile", "_sendfile_use_sendfile"]

_original = GeventSocket.sendfile
_GiveupOnSendfile: type[Exception] = _stdlib_socket._GiveupOnSendfile  # type: ignore[attr-defined]


def sendfile(self: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    """Send *file* until end of file, or *count* bytes of it; return the number of bytes sent.

    A regular file and a plain TCP or Unix stream socket go by sendfile(2), waiting on the hub;
    anything else goes to gevent's own ``sendfile``, which this one equals in arguments, checks,
    exceptions, and in timeouts, which apply to each wait. An *offset* that is false means where the
    file stands. The file is left where sending stopped, also on an error.

    Raises ValueError and TypeError for arguments as gevent does, OSError and TimeoutError of the
    socket, OSError of the file.
    """
    try:
        dst = stream_socket(self)
        src = regular_file(file)
        if type(offset) is not int:
            raise NotOurs("arguments")
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
        return _original(self, file, offset, count)  # type: ignore[no-any-return]
    self._check_sendfile_params(file, offset, count)
    src.offset = src.obj.seek(offset) if offset else src.obj.tell()
    transfer = Transfer(count)
    send_file(transfer, src, dst)
    return transfer.delivered


def _sendfile_use_sendfile(self: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    """Send *file* by sendfile(2) or not at all, as CPython's method of this name does.

    Unlike :func:`sendfile` it ignores what *file* has read ahead, and an *offset* that is false
    means byte 0. Raises ``socket._GiveupOnSendfile`` if nothing can be sent this way.
    """
    self._check_sendfile_params(file, offset, count)
    try:
        src = regular_file(file)
        if not src.status.st_size:
            return 0
        if self.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        dst = stream_socket(self)
    except NotOurs as reason:
        raise _GiveupOnSendfile(reason.args[0]) from None
    src.offset = offset or 0
    transfer = Transfer(count)
    try:
        if not file_to_socket(transfer, src, dst):
            raise _GiveupOnSendfile("the kernel refuses sendfile() between these two")
    except TimeoutError:
        raise
    except OSError as err:
        if not transfer.delivered:
            raise _GiveupOnSendfile(err) from None
        raise
    finally:
        if transfer.delivered:
            src.leave_source()
    return transfer.delivered
