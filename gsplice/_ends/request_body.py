"""The body of a request as an end: the ``wsgi.input`` of gevent.pywsgi and of gunicorn.

Also inside the stream that werkzeug, and so Flask, puts around it. Bodies that are chunked, or as
long as the connection, are left to the original functions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from .._os.results import error
from .body import Body
from .exact_type import methods_unchanged
from .socket import Socket


class PywsgiBody(Body):
    """What is left of a ``gevent.pywsgi.Input`` with a ``Content-Length``."""

    __slots__ = ("_input",)

    #: What the object has to read from.
    inner_type = Socket

    def __init__(self, end: Socket, obj: Any) -> None:
        super().__init__(end.obj, end.raw, end.sock)
        self._input = obj

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return the file that *obj* reads from; None if it gives other bytes, or none."""
        if not methods_unchanged(obj, "read", "_do_read", "_send_100_continue"):
            return None
        return None if obj.chunked_input or obj.content_length is None else obj.rfile

    def remaining(self) -> int:
        """Return how many bytes may be taken: what follows is the next request's."""
        return self._input.content_length - self._input.position  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._input.position += number

    def take_buffered(self, most: int | None) -> bytes:
        """Have the client go on, if it waits for that; take what has been read ahead."""
        if most != 0:
            self._input._send_100_continue()
        return super().take_buffered(most)


class GunicornBody(Body):
    """What is left of a ``gunicorn.http.body.Body`` of known length."""

    __slots__ = ("_body",)

    #: What the object has to read from.
    inner_type = Socket

    def __init__(self, end: Socket, obj: Any) -> None:
        super().__init__(end.obj, end.raw, end.sock)
        self._body = obj

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return the socket that *obj* reads from; None if it gives other bytes, or none."""
        reader = obj.reader
        if not methods_unchanged(obj, "read") or not _is_gunicorn(
            reader, "http.body", "LengthReader"
        ):
            return None
        unreader = reader.unreader
        return unreader.sock if _is_gunicorn(unreader, "http.unreader", "SocketUnreader") else None

    def remaining(self) -> int:
        """Return how many bytes may be taken: what follows is the next request's."""
        return self._body.reader.length  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._body.reader.length -= number

    def take_buffered(self, most: int | None) -> bytes:
        """Take what two objects have read ahead, *most* bytes of it. Neither reads nor waits."""
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
        """Raise *err*, which the descriptor has given to whoever read from it."""
        with self._marking_failure():
            raise error(minus_errno)
        raise AssertionError  # it lets every error out

    @contextlib.contextmanager
    def _marking_failure(self) -> Iterator[None]:
        """Have the connection closed after an error, as newer versions of gunicorn do."""
        try:
            yield
        except Exception:
            if hasattr(self._body, "failed"):
                self._body.failed = True
            raise


class LimitedBody(Body):
    """What is left of a ``werkzeug.wsgi.LimitedStream`` around one of the others.

    It has an error of its own for a client that has gone.
    """

    __slots__ = ("_inner", "_stream")

    #: What the object has to read from.
    inner_type: type[Socket] = Body

    def __init__(self, inner: Any, obj: Any) -> None:
        super().__init__(inner.obj, inner.raw, inner.sock)
        self._inner: Body = inner
        self._stream = obj

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if it does so in a way of its own."""
        methods = ("read", "readinto", "on_exhausted", "on_disconnect")
        plain = methods_unchanged(obj, *methods) and not obj.closed
        return obj._stream if plain else None

    def remaining(self) -> int:
        """Return how many bytes may be taken."""
        own: int = self._stream.limit - self._stream._pos
        return min(self._inner.remaining(), own)

    def withheld(self) -> int:
        """Keep back what the inner body does."""
        return self._inner.withheld()

    def read_withheld(self) -> bytes:
        """Read that through both objects."""
        return self._stream.read(1)  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does, in both objects."""
        self._inner.note_taken(number)
        self._stream._pos += number

    def take_buffered(self, most: int | None) -> bytes:
        """Do what the inner body does; take what has been read ahead, *most* bytes of it."""
        left = self.remaining()
        with self._errors():
            data = self._inner.take_buffered(left if most is None else min(left, most))
        self._stream._pos += len(data)
        return data

    def fileno(self) -> int:
        """Return the descriptor, or raise, as the inner body does."""
        with self._errors():
            return self._inner.fileno()

    def wait_read(self) -> None:
        """Wait as recv() would."""
        with self._errors():
            self._inner.wait_read()

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise what the stream makes of *err*, an error of the socket."""
        with self._errors():
            self._inner.raise_read_error(minus_errno)
        raise AssertionError  # it makes an error of every error

    def leave_source(self) -> None:
        """Do what the inner body does."""
        with self._errors():
            self._inner.leave_source()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as err:
            self._stream.on_disconnect(error=err)
            raise AssertionError from err  # it always raises then


#: The objects, by module and name, and the end that each of them is.
INPUTS: Final[dict[tuple[str, str], type[PywsgiBody | GunicornBody | LimitedBody]]] = {
    ("gevent.pywsgi", "Input"): PywsgiBody,
    ("gunicorn.http.body", "Body"): GunicornBody,
    ("werkzeug.wsgi", "LimitedStream"): LimitedBody,
}


def _is_gunicorn(obj: Any, module: str, name: str) -> bool:
    """Say whether *obj* is of that very type of gunicorn's, and reads as its class does."""
    cls = getattr(sys.modules.get(f"gunicorn.{module}"), name, None)
    return cls is not None and type(obj) is cls and methods_unchanged(obj, "read", "chunk")
