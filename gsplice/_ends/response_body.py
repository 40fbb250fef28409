"""The body of an HTTP response as an end: of :mod:`http.client`, and of urllib3 around that."""

from __future__ import annotations

import sys
from typing import Any, Final, NoReturn

from .._os.results import error
from .body import Body
from .exact_type import methods_unchanged
from .socket import Socket

#: The methods by which a response reads its body.
_METHODS: Final = (
    "read",
    "_close_conn",
    "_decode",
    "_error_catcher",
    "_fp_read",
    "_init_decoder",
    "_raw_read",
)


class ClientBody(Body):
    """What remains of the body of an ``http.client.HTTPResponse``."""

    __slots__ = ("_response",)

    def __init__(self, end: Socket, response: Any) -> None:
        super().__init__(end.obj, end.raw, end.sock)
        self._response = response

    def remaining(self) -> int:
        """Return how many bytes of the body remain: what follows is the next response."""
        length: int | None = self._response.length
        return sys.maxsize if length is None else length

    def withheld(self) -> int:
        """Leave the last byte to read(): with it, read() fills its buffer and drops what follows.

        A server may send CRLF after a body, which must not become part of the next response.
        """
        return 0 if self._response.length is None else 1

    def read_withheld(self) -> bytes:
        """Read the last byte, so that the response lets go of its connection."""
        return self._response.read(1)  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does: before the bytes are written anywhere."""
        if self._response.length is not None:
            self._response.length -= number

    def leave_source(self) -> None:
        """Have the response let go of its connection if its last byte has been taken.

        ``read()`` does the same as soon as it has that byte, delivered or not.
        """
        if self._response.length == 0:
            self._response.read(0)


class Urllib3Body(ClientBody):
    """The same inside a ``urllib3.response.HTTPResponse``.

    That turns the socket's errors into its own, and closes the connection after any, also after a
    kill while waiting for a byte. At the end of the body the connection returns to its pool.
    """

    __slots__ = ("_outer",)

    def __init__(self, end: Socket, outer: Any) -> None:
        super().__init__(end, outer._fp)
        self._outer = outer

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does, in both responses."""
        super().note_taken(number)
        if number:
            if hasattr(self._outer, "_uncached_read_occurred"):  # not in urllib3 1
                self._outer._uncached_read_occurred = True
            self._outer._fp_bytes_read += number
            if self._outer.length_remaining is not None:
                self._outer.length_remaining -= number

    def read_withheld(self) -> bytes:
        """Read the last byte, so that both responses let go of the connection."""
        return self._outer.read(1)  # type: ignore[no-any-return]

    def fileno(self) -> int:
        """Return the descriptor, as :class:`Socket` does. Raises urllib3's errors."""
        with self._outer._error_catcher():
            return super().fileno()

    def wait_read(self) -> None:
        """Wait as recv() would. Lets out urllib3's errors, and what is thrown into the greenlet."""
        with self._outer._error_catcher():
            super().wait_read()

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise urllib3's error for that error of the socket."""
        with self._outer._error_catcher():
            raise error(minus_errno)
        raise AssertionError  # not reached: the catcher lets every error out

    def leave_source(self) -> None:
        """Have both responses let go of the connection if the last byte has been taken."""
        if self._response.length == 0:
            with self._outer._error_catcher():
                super().leave_source()


def response_behind(obj: Any) -> Any | None:
    """Return the ``http.client.HTTPResponse`` whose bytes *obj*, a response, returns unchanged.

    None: it decodes them, or the body is chunked or at its end, or a method was replaced.
    """
    if not methods_unchanged(obj, *_METHODS):
        return None
    client = sys.modules.get("http.client")
    if type(obj) is not getattr(client, "HTTPResponse", None):
        inner = obj._fp
        if type(inner) is not getattr(client, "HTTPResponse", None) or not _is_plain(obj):
            return None
        return response_behind(inner)
    length = obj.length
    if obj.fp is None or obj.chunked is not False:
        return None
    return obj if length is None or (type(length) is int and length > 0) else None


def body_of(obj: Any, response: Any, end: Socket) -> ClientBody:
    """Return the body of *obj*, which reads from *response*, which reads from *end*."""
    return ClientBody(end, obj) if obj is response else Urllib3Body(end, obj)


def _is_plain(outer: Any) -> bool:
    """Return whether this response of urllib3 has decoded nothing and will decode nothing."""
    if outer.decode_content and (outer._decoder or "content-encoding" in outer.headers):
        return False
    decoded = getattr(outer, "_decoded_buffer", ())  # urllib3 1 has neither
    if len(decoded) or getattr(outer, "_has_decoded_content", False):
        return False
    return not outer.chunked and not outer._fp.closed
