"""``wsgi.file_wrapper`` for ``gevent.pywsgi``, responses that are files, sent by the kernel, and
responses of every kind that leave without waiting for the client.

gevent.pywsgi is not imported from here: it imports ssl, which must wait until
``gevent.monkey.patch_all()`` has run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from io import BufferedReader
from os import SEEK_CUR, SEEK_SET
from types import SimpleNamespace
from typing import Any, Final

from .._counters import counters
from .._ends.recognise import NotOurs, stream_socket
from .._ends.small import SMALL_FILE
from .._move.memory import leave_buffer, read, take_buffer
from .._move.move import move
from .._move.small_read import read_small
from .._move.transfer import Transfer
from .._os.linux import MSG_MORE
from .pywsgi_sends import (
    AT_ONCE,
    JOINED,
    collect,
    has_pieces,
    in_fewer_pieces,
    is_plain,
    joins,
    overrides_a_sender,
    record,
    send_at_once,
    send_some,
    send_together,
)
from .wrapped_results import IN_MEMORY, Pieces, look_through
from .wsgi_results import Part, file_of, find

#: The methods that are replaced.
NAMES: Final = ["get_environ", "process_result", "handle", "_write_with_headers", "_sendall"]


class FileWrapper:
    """The ``environ['wsgi.file_wrapper']`` of PEP 3333 (Optional Platform-Specific File Handling):
    an iterable of pieces of *blksize* bytes of a file, from its position.

    If the file is a plain one, a handler sends it without iterating. There is no ``__len__``,
    because pywsgi would take it for the number of pieces.
    """

    def __init__(self, filelike: Any, blksize: int = 8192) -> None:
        self.filelike = filelike
        self.blksize = blksize
        self._left: int | None = None

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        if self._left is None:
            data: bytes = self.filelike.read(self.blksize)
        else:
            data = self.filelike.read(min(self.blksize, self._left))[: self._left]
            self._left -= len(data)
        if not data:
            raise StopIteration
        return data

    def stop_after(self, length: int) -> None:
        """Yield no more than the next *length* bytes: as many as Content-Length says."""
        self._left = length

    def seekable(self) -> bool:
        """Return whether :meth:`seek` and :meth:`tell` work."""
        answer = getattr(self.filelike, "seekable", None)
        return bool(answer()) if answer is not None else hasattr(self.filelike, "seek")

    def seek(self, *args: int) -> Any:
        """Move the file, as its own ``seek`` does."""
        return self.filelike.seek(*args)

    def tell(self) -> Any:
        """Return the position of the file."""
        return self.filelike.tell()

    def close(self) -> None:
        """Close the file, if it can be closed."""
        close = getattr(self.filelike, "close", None)
        if close is not None:
            close()


def replacements(handler_class: Any) -> SimpleNamespace:
    """Return the replacements for the methods of *handler_class*, ``gevent.pywsgi.WSGIHandler``."""
    originals: dict[str, Any] = {name: getattr(handler_class, name) for name in NAMES}

    def get_environ(self: Any) -> dict[str, Any]:
        environ: dict[str, Any] = originals["get_environ"](self)
        environ.setdefault("wsgi.file_wrapper", FileWrapper)
        return environ

    def process_result(self: Any) -> None:
        part = find(self.result)
        if part is not None:
            if _send_small(self, part):
                return
            try:
                response = _FileResponse(self, handler_class, part)
            except NotOurs as reason:
                counters.fell_back(reason.args[0])
                if _is_file_wrapper(self.result) and _needs_no_body(self):
                    return
            else:
                response.send()
                return
        elif has_pieces(self.result) and not self.headers_sent and joins(self):
            for data in in_fewer_pieces(self.result):
                self.write(data)
            self.result = ()  # what is left to do for pywsgi is the end of the response
        elif self.status and type(self.result) not in IN_MEMORY and _is_large(self):
            with _most_sent_by_the_kernel(self, handler_class):
                originals["process_result"](self)
            return
        originals["process_result"](self)

    def handle(self: Any) -> None:
        send_at_once(self, handler_class)
        originals["handle"](self)

    def _write_with_headers(self: Any, data: Any) -> None:
        # Of another type, the original may fail when it has sent the headers.
        if type(data) is bytes and 0 < len(data) <= JOINED and joins(self):
            write = originals["_write_with_headers"]
            send_together(self, collect(self, write, self, data))
        else:
            originals["_write_with_headers"](self, data)

    def _sendall(self: Any, data: Any) -> None:
        # gevent's socket.sendall() takes 3 us longer than a send(2) that does not have to wait.
        sent = 0
        if type(data) in (bytes, bytearray) and len(data) <= AT_ONCE and is_plain(self):
            sent = send_some(self, self.socket._sock.send, data)
        if not sent or sent < len(data):
            originals["_sendall"](self, memoryview(data)[sent:] if sent else data)
        self.response_length += sent

    replaced = (get_environ, process_result, handle, _write_with_headers, _sendall)
    for replacement in replaced:
        original = getattr(handler_class, replacement.__name__)
        replacement.__doc__ = original.__doc__
        replacement.__qualname__ = original.__qualname__
    return SimpleNamespace(
        __implements__=NAMES,
        originals=originals,
        **{replacement.__name__: replacement for replacement in replaced},
    )


def _is_file_wrapper(result: object) -> bool:
    gunicorn = sys.modules.get("gunicorn.http.wsgi")
    return type(result) is FileWrapper or (
        gunicorn is not None and type(result) is gunicorn.FileWrapper
    )


def _cut(length: int, most: int | None) -> int:
    return length if most is None else min(length, most)


def _declared_length(handler: Any) -> int | None:
    """Return the Content-Length that the application gave; None if it gave no valid one."""
    declared = handler.provided_content_length
    if declared and len(declared) < 20 and declared.isascii() and declared.isdigit():
        return int(declared)
    return None


def _needs_no_body(handler: Any) -> bool:
    """Return True for HEAD, with the headers sent; else limit a wrapper to the declared length.

    Lets out what reading raises, also for HEAD: a file that can't be read is an error for pywsgi.
    """
    declared = _declared_length(handler)
    if handler.headers_sent:
        handler.close_connection = True  # we don't know how much of the length has been sent
    elif declared is not None and type(handler.result) is FileWrapper:
        handler.result.stop_after(declared)
    if handler.command == "HEAD" and handler.status:
        for _ in handler.result:
            break
        if not handler.headers_sent:
            handler.write(b"")
        return True  # neither a body nor the last chunk of one
    return False


def _send_small(handler: Any, part: Part) -> bool:
    """Send a small cached file as if the application had given its bytes; False: nothing was done.

    Without it, a response of 1 KiB takes 50 us longer (benchmarks/servers.py). Lets out what the
    handler's own write() raises.
    """
    file = part.file
    if (
        type(file) is not BufferedReader
        or not handler.status
        or handler.headers_sent
        or _has_no_body(handler)
        or (part.start and part.whence == SEEK_CUR)
        or _is_encoded(handler)
    ):
        return False
    declared = _declared_length(handler)
    if declared is None:
        if handler.provided_content_length is not None or not _is_file_wrapper(handler.result):
            return False
    elif declared != _cut(declared, part.length):
        return False  # the connection will have to be closed
    count = part.length if declared is None else declared
    if count is not None and count > SMALL_FILE:
        return False
    buffer = take_buffer()
    try:
        offset = part.start if part.whence == SEEK_SET else None
        position, number = read_small(file, offset, count, buffer)
        if not number or number != (count or number):
            return False
        file.seek(position + number)
        if declared is None:
            handler.provided_content_length = str(number)
            handler.response_headers.append((b"Content-Length", b"%d" % number))
        data = memoryview(buffer)[:number]
        if joins(handler):
            send_together(handler, collect(handler, handler.write, data))
        else:
            handler.write(bytes(data))
    finally:
        leave_buffer(buffer)
    counters.add_transfer("bytes_copied", number)
    return True


@contextlib.contextmanager
def _most_sent_by_the_kernel(handler: Any, handler_class: Any) -> Iterator[None]:
    """If a file is under wrappers in the handler's result, have the kernel send most of it."""
    result = handler.result
    try:
        handler.result = _pieces_of_wrapped(handler, handler_class)
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
    try:
        yield
    finally:
        handler.result = result  # whose close() pywsgi calls


def _pieces_of_wrapped(handler: Any, handler_class: Any) -> Any:
    """Return the pieces of the handler's result, most of them sent by the kernel.

    The result itself, if nothing could be gained. Raises NotOurs if it is large, and not taken.
    """
    result = handler.result
    wrapped = look_through(result)
    length = _declared_length(handler)
    if wrapped is None or length is None:
        return result
    if handler.headers_sent or overrides_a_sender(handler, handler_class) or _is_encoded(handler):
        raise NotOurs("response")

    def send(transfer: Transfer) -> None:
        _move(handler, transfer)

    return Pieces(result, wrapped, stream_socket(handler.socket), length, send)


def _is_large(handler: Any) -> bool:
    length = _declared_length(handler)
    return length is not None and length > SMALL_FILE and not _has_no_body(handler)


def _has_no_body(handler: Any) -> bool:
    return handler.command == "HEAD" or handler.code < 200 or handler.code in (204, 304)


def _is_encoded(handler: Any) -> bool:
    return b"transfer-encoding" in [name.lower() for name, _ in handler.response_headers]


def _move(handler: Any, transfer: Transfer) -> None:
    """Move what is left of the body, and count it as sent.

    Lets out the errors of sending and reading, after recording those of the socket in the handler.
    """
    before = transfer.delivered
    try:
        move(transfer)
    except OSError as err:
        if not transfer.read_failed:
            record(handler, err)
        raise
    finally:
        handler.response_length += transfer.delivered - before


class _FileResponse:
    """A response whose body is *part* of a plain file.

    Its constructor raises NotOurs, and has changed nothing, if pywsgi has to send the response.
    """

    __slots__ = ("_declared", "_first", "_handler", "_length", "_transfer")

    def __init__(self, handler: Any, handler_class: Any, part: Part) -> None:
        if overrides_a_sender(handler, handler_class) or not handler.status or handler.headers_sent:
            raise NotOurs("response")
        if handler.code < 200 or handler.code in (204, 304):
            raise NotOurs("response")  # none of these may have a body
        if _is_encoded(handler):
            raise NotOurs("response")
        self._handler = handler
        dst = stream_socket(handler.socket)
        src = file_of(part)
        declared = _declared_length(handler)
        if declared is None:
            if handler.provided_content_length is not None or not _is_file_wrapper(handler.result):
                raise NotOurs("response")
            if not src.status.st_size:
                raise NotOurs("small")  # or a file whose size is unknown, as in /proc
        src.seek(part.start, part.whence)
        self._transfer = Transfer(src, dst)
        if declared is None:
            declared = self._real_length(part.length)
            self._length = declared
            handler.provided_content_length = str(declared)
            handler.response_headers.append((b"Content-Length", b"%d" % declared))
        else:
            self._length = _cut(declared, part.length)
            self._read_small(self._length)
        self._declared = declared

    def _real_length(self, most: int | None) -> int:
        """Return how many bytes the file has from its offset on, *most* at the most.

        Raises NotOurs if fstat(2) said too little, or of a big file too much, as on FUSE and
        network filesystems, where only reading finds the end. Lets out the errors of reading.
        """
        transfer, src = self._transfer, self._transfer.src
        length = _cut(max(0, src.remaining()), most)
        more = int(length != most)  # try to read one byte past the end
        if length <= SMALL_FILE:
            # In sysfs the size is always that of a page, so count what a small file really has.
            real = self._read_small(length, more)
            if real <= length:
                return real
            src.obj.seek(src.offset)
        else:
            self._first = b""
            try:
                last = read(transfer, src.offset + length - 1, 1 + more)
            finally:
                transfer.close()
            if len(last) == 1:
                return length
        raise NotOurs("size")

    def _read_small(self, length: int, more: int = 0) -> int:
        """Read *length* bytes, if that is small, so that pywsgi can answer a disk error.

        Tries to read *more* bytes after them. Returns how many bytes there were; *length* if that
        is not small. Lets out the errors of reading.
        """
        self._first = b""
        transfer, src = self._transfer, self._transfer.src
        if length > SMALL_FILE:
            return length
        first = src.take_buffered(length + more)
        try:
            while (asked := length + more - len(first)) and (
                data := read(transfer, src.offset + len(first), asked)
            ):
                first += data
        finally:
            transfer.close()
        src.obj.seek(src.offset + len(first))
        self._first = first
        return len(first)

    def send(self) -> None:
        """Send headers and body, a small response in one segment.

        On exit the body is sent as far as the file went; if that is short of the declared length,
        the connection will be closed, since the client can't tell otherwise where the next
        response starts. Lets out the errors of sending and reading, after recording those of the
        socket in the handler, as its own sends do.
        """
        handler = self._handler
        head = handler.command == "HEAD"
        transfer = self._transfer
        transfer.limit = 0 if head else self._length
        first = b"" if head else self._first
        if first:
            send_together(handler, collect(handler, handler.write, first))
            transfer.count_delivered(len(first), "bytes_copied")
            if transfer.within_limit(1):
                _move(handler, transfer)
        elif transfer.within_limit(1):
            self._send_headers()
            _move(handler, transfer)
        else:
            handler.write(b"")  # the headers alone
        if not head and transfer.delivered < self._declared:
            handler.close_connection = True

    def _send_headers(self) -> None:
        """Send the headers so that they are in one segment with the first piece of the body.

        If no piece follows, the connection will be closed, which sends them.
        """
        handler = self._handler
        for piece in collect(handler, handler.write, b""):
            sent = send_some(handler, handler.socket._sock.send, piece, MSG_MORE)
            handler.response_length += sent
            if sent < len(piece):
                handler._sendall(piece[sent:])
