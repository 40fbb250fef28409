"""The body of a request as an end: the ``wsgi.input`` of gevent.pywsgi and of gunicorn.

Also inside what frameworks put around it (:mod:`gsplice._ends.framework_body`). Bodies without a
known length (chunked, or up to the end of the connection) are left to the original functions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from .._os.results import error
from .body import Body
from .exact_type import methods_unchanged
from .framework_body import (
    AroundBody,
    DjangoRequest,
    DjangoStream,
    FalconStream,
    WerkzeugStream,
)
from .socket import Socket


class PywsgiBody(Body):
    """What remains of a ``gevent.pywsgi.Input`` with a ``Content-Length``."""

    __slots__ = ("_input",)

    #: The kind of end that the object must read from.
    inner_type = Socket

    def __init__(self, end: Socket, obj: Any) -> None:
        super().__init__(end.obj, end.raw, end.sock)
        self._input = obj

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes *obj* says that remain; None if it does not say."""
        if obj.chunked_input or obj.content_length is None:
            return None
        return obj.content_length - obj.position  # type: ignore[no-any-return]

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return the file that *obj* reads from; None if it changes the bytes."""
        if not methods_unchanged(obj, "read", "_do_read", "_send_100_continue"):
            return None
        return None if obj.chunked_input or obj.content_length is None else obj.rfile

    def remaining(self) -> int:
        """Return how many bytes of the body remain: what follows is the next request."""
        return self._input.content_length - self._input.position  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._input.position += number

    def take_buffered(self, most: int | None) -> bytes:
        """Send 100 Continue if the client waits for it; take at most *most* buffered bytes."""
        if most != 0:
            self._input._send_100_continue()
        return super().take_buffered(most)


class GunicornBody(Body):
    """What remains of a ``gunicorn.http.body.Body`` of known length."""

    __slots__ = ("_body",)

    #: The kind of end that the object must read from.
    inner_type = Socket

    def __init__(self, end: Socket, obj: Any) -> None:
        super().__init__(end.obj, end.raw, end.sock)
        self._body = obj

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes *obj* says that remain; None if it does not say."""
        return getattr(obj.reader, "length", None)

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return the socket that *obj* reads from; None if it changes the bytes."""
        reader = obj.reader
        if not methods_unchanged(obj, "read") or not _is_type(reader, "http.body", "LengthReader"):
            return None
        unreader = reader.unreader
        return unreader.sock if _is_type(unreader, "http.unreader", "SocketUnreader") else None

    def remaining(self) -> int:
        """Return how many bytes of the body remain: what follows is the next request."""
        return self._body.reader.length  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._body.reader.length -= number

    def take_buffered(self, most: int | None) -> bytes:
        """Take at most *most* bytes from two buffers, the body's and its reader's. Never waits."""
        body, unreader = self._body, self._body.reader.unreader
        held = body.buf.tell()
        data: bytes = body.read(held if most is None else min(held, most))
        if len(data) == held and unreader.buf.getbuffer():
            more = unreader.read()
            number = min(len(more), self.remaining())
            if most is not None:
                number = min(number, most - held)
            unreader.unread(more[number:])
            self.note_taken(number)
            data += more[:number]
        return data

    def wait_read(self) -> None:
        """Wait as recv() would."""
        with self._marking_failure():
            super().wait_read()

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise that error, and have gunicorn close the connection."""
        with self._marking_failure():
            raise error(minus_errno)
        raise AssertionError  # not reached: the context lets every error out

    @contextlib.contextmanager
    def _marking_failure(self) -> Iterator[None]:
        """Have the connection closed after an error, as newer versions of gunicorn do."""
        try:
            yield
        except Exception:
            if hasattr(self._body, "failed"):
                self._body.failed = True
            raise


RequestBody = PywsgiBody | GunicornBody | AroundBody

#: The types of these objects, by module and name, and the class of the end for each.
INPUTS: Final[dict[tuple[str, str], type[RequestBody]]] = {
    ("gevent.pywsgi", "Input"): PywsgiBody,
    ("gunicorn.http.body", "Body"): GunicornBody,
    ("werkzeug.wsgi", "LimitedStream"): WerkzeugStream,
    ("falcon.stream", "BoundedStream"): FalconStream,
    ("django.core.handlers.wsgi", "LimitedStream"): DjangoStream,
    ("django.core.handlers.wsgi", "WSGIRequest"): DjangoRequest,
}


def _is_type(obj: Any, module: str, name: str) -> bool:
    """Return whether *obj* is of that very type of gunicorn's, and reads as its class does."""
    cls = getattr(sys.modules.get(f"gunicorn.{module}"), name, None)
    return cls is not None and type(obj) is cls and methods_unchanged(obj, "read", "chunk")
