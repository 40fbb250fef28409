"""``gsplice.copy``: any two ends, a count, and the number of bytes delivered."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from .._counters import counters
from .._ends.recognise import NotOurs, check_different_files, sink, source, stream_socket
from .account import Account
from .memory import READ_SIZE
from .move import move
from .transfer import Transfer


def copy(src: Any, dst: Any, count: int | None = None) -> int:
    """Copy from *src* to *dst* until *src* ends, or *count* bytes; return the bytes delivered.

    Either may be a socket, or a file object for reading or writing bytes: a file, a pipe, a
    socket's ``makefile()``. What gsplice knows moves inside the kernel, the rest through ``recv``
    or ``read`` and ``sendall`` or ``write``. Buffered bytes go first, files are left where the copy
    stopped, sockets are left open.

    Raises TypeError for an object that can neither be read nor written, and for a *count* that is
    no whole number; ValueError for one below 0; and what reading and writing raise.
    """
    if count is not None:
        if not isinstance(count, int):
            raise TypeError(f"count must be a whole number of bytes or None, not {count!r}")
        if count < 0:
            raise ValueError(f"count must not be below 0, but is {count!r}")
    read = _method(src, "src", "recv", "read")
    write = _method(dst, "dst", "sendall", "write")
    if count == 0:
        return 0
    delivered = 0
    try:
        one = stream_socket(src) if _is_socket(src) else source(src)
        other = stream_socket(dst) if _is_socket(dst) else sink(dst)
        check_different_files(one, other)
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
    else:
        transfer = Transfer(one, other, count)
        if move(transfer):
            return transfer.delivered
        delivered = transfer.delivered
    account = Account(count, delivered)
    while (asked := account.within_limit(READ_SIZE)) > 0 and (data := read(asked)) != b"":
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "src is non-blocking and has no bytes now")
        if _is_socket(dst):
            write(data)
        else:
            _write_all(write, data)
        account.count_elsewhere(len(data))
    flush = getattr(dst, "flush", None)
    if flush is not None:
        flush()
    return account.delivered


def _write_all(write: Callable[[Any], int | None], data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = write(view)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "dst is non-blocking and takes no more bytes")
        view = view[written:]


def _is_socket(obj: Any) -> bool:
    return hasattr(obj, "recv") and hasattr(obj, "sendall")


def _method(obj: Any, name: str, of_socket: str, of_file: str) -> Callable[[Any], Any]:
    method = getattr(obj, of_socket if _is_socket(obj) else of_file, None)
    if method is None:
        raise TypeError(f"{name} must be a socket or have {of_file}(); {obj!r} is neither")
    return method  # type: ignore[no-any-return]
