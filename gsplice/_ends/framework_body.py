"""What frameworks put around the body of a request: streams that stop at its end, and count.

Each reads from another stream, in the end from the ``wsgi.input`` of a server, and adds a count of
its own, or turns the errors of a client that has gone into its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from .body import Body
from .exact_type import methods_unchanged
from .socket import Socket


class AroundBody(Body):
    """What remains of a stream around another body. Subclasses count, and translate errors."""

    __slots__ = ("_inner", "_stream")

    #: The kind of end that the object must read from.
    inner_type: type[Socket] = Body

    def __init__(self, inner: Any, obj: Any) -> None:
        super().__init__(inner.obj, inner.raw, inner.sock)
        self._inner: Body = inner
        self._stream = obj

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes *obj* says that remain at the most; None if it does not say."""
        raise NotImplementedError

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if it changes the bytes, or is closed."""
        raise NotImplementedError

    def count(self, number: int) -> None:
        """Count *number* bytes as ``read()`` does, in the object itself."""
        raise NotImplementedError

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of the inner body into the object's own, if it has any."""
        yield

    def remaining(self) -> int:
        """Return how many bytes remain of the inner body, up to the object's own limit."""
        own, inner = self.declared(self._stream), self._inner.remaining()
        return inner if own is None else min(inner, own)

    def withheld(self) -> int:
        """Return what the inner body does."""
        return self._inner.withheld()

    def read_withheld(self) -> bytes:
        """Read the last byte through both objects."""
        return self._stream.read(1)  # type: ignore[no-any-return]

    def note_taken(self, number: int) -> None:
        """Count as ``read()`` does, in both objects."""
        self._inner.note_taken(number)
        self.count(number)

    def take_buffered(self, most: int | None) -> bytes:
        """Take at most *most* buffered bytes of the inner body. Raises the object's errors."""
        remaining = self.remaining()
        with self.errors():
            data = self._inner.take_buffered(remaining if most is None else min(remaining, most))
        self.count(len(data))
        return data

    def fileno(self) -> int:
        """Return the inner body's descriptor. Raises the object's errors."""
        with self.errors():
            return self._inner.fileno()

    def wait_read(self) -> None:
        """Wait as recv() would. Raises the object's errors."""
        with self.errors():
            self._inner.wait_read()

    def raise_read_error(self, minus_errno: int) -> NoReturn:
        """Raise the object's error for that error of the socket."""
        with self.errors():
            self._inner.raise_read_error(minus_errno)
        raise AssertionError  # not reached: every errors() lets one out

    def leave_source(self) -> None:
        """Do what the inner body does. Raises the object's errors."""
        with self.errors():
            self._inner.leave_source()


class LimitedStream(AroundBody):
    """What remains of a ``LimitedStream``: Django's is made after werkzeug's, and counts alike."""

    __slots__ = ()

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes *obj* says that remain at the most."""
        return obj.limit - obj._pos  # type: ignore[no-any-return]

    def count(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._stream._pos += number


class WerkzeugStream(LimitedStream):
    """What remains of a ``werkzeug.wsgi.LimitedStream``, which Flask has, too."""

    __slots__ = ()

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if a method was replaced, or it is closed."""
        methods = ("read", "readinto", "on_exhausted", "on_disconnect")
        plain = methods_unchanged(obj, *methods) and not obj.closed
        return obj._stream if plain else None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise its own error of a client that has gone."""
        try:
            yield
        except (OSError, ValueError) as err:
            self._stream.on_disconnect(error=err)
            raise AssertionError from err  # not reached: on_disconnect() always raises


class FalconStream(AroundBody):
    """What remains of a ``falcon.stream.BoundedStream``."""

    __slots__ = ()

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes *obj* says that remain at the most."""
        return obj._bytes_remaining  # type: ignore[no-any-return]

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if a method was replaced, or it is closed."""
        plain = methods_unchanged(obj, "read", "_read") and not obj.closed
        return obj.stream if plain else None

    def count(self, number: int) -> None:
        """Count as ``read()`` does."""
        self._stream._bytes_remaining -= number


class DjangoStream(LimitedStream):
    """What remains of Django's ``LimitedStream``, which keeps the inner stream's ``read`` only."""

    __slots__ = ()

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if a method was replaced, or it is closed."""
        inner = getattr(obj._read, "__self__", None)
        plain = methods_unchanged(obj, "read") and not obj.closed
        return inner if plain and obj._read == getattr(inner, "read", None) else None


class DjangoRequest(AroundBody):
    """What remains of the body of Django's ``WSGIRequest``, which reads from its ``_stream``."""

    __slots__ = ()

    @staticmethod
    def declared(obj: Any) -> int | None:
        """Return how many bytes its stream says that remain; None if it is of another kind."""
        stream = obj._stream
        return DjangoStream.declared(stream) if hasattr(stream, "_pos") else None

    @staticmethod
    def inner_of(obj: Any) -> Any | None:
        """Return what *obj* reads from; None if a method was replaced."""
        base = getattr(sys.modules.get("django.http.request"), "HttpRequest", None)
        plain = "read" not in vars(obj) and type(obj).read is getattr(base, "read", None)
        return obj._stream if plain else None

    def count(self, number: int) -> None:
        """Note that reading has begun, as ``read()`` does."""
        self._stream._read_started = True

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise its own error of a client that has gone."""
        try:
            yield
        except OSError as err:
            raise sys.modules["django.http.request"].UnreadablePostError(*err.args) from err
