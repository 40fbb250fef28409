"""Which part of which file the result of a WSGI application gives, if it is of a known type.

Frameworks answer a range request with an iterator of their own over the server's wrapper, or hand
the wrapper a file of their own that ends early. Only exact types are taken, as in
:mod:`gsplice._ends.recognise`, and nothing is imported for it.
"""

from __future__ import annotations

from os import SEEK_CUR, SEEK_SET
from typing import Any, Final, NamedTuple

from .._ends.exact_type import by_name
from .._ends.file import File
from .._ends.recognise import NotOurs, regular_file

#: Iterables of all the pieces of a file, and where they keep it.
_WRAPPERS: Final = {
    ("gsplice._patches.pywsgi", "FileWrapper"): "filelike",
    ("gunicorn.http.wsgi", "FileWrapper"): "filelike",
    ("pyramid.response", "FileIter"): "file",
    ("werkzeug.wsgi", "FileWrapper"): "file",
    ("wsgiref.util", "FileWrapper"): "filelike",
}

#: Files that read no more than ``remaining`` bytes of another, and where they keep that.
_BOUNDED: Final = {
    ("falcon.routing.static", "_BoundedFile"): "fh",
    ("whitenoise.responders", "SlicedFile"): "fileobj",
}


class _Sequence:
    def __getitem__(self, index: int) -> None:
        raise IndexError


_SequenceIterator: Final = type(iter(_Sequence()))


class Part(NamedTuple):
    """A part of a file: ``file.seek(start, whence)`` leads to it; without a length, to the end."""

    file: Any
    start: int = 0
    whence: int = SEEK_CUR
    length: int | None = None


def file_of(part: Part) -> File:
    """Return the file that *part* is of. Raises NotOurs, also if the part begins behind its end.

    Whoever reads up to there finds that out, while a seek may fail.
    """
    file = regular_file(part.file)
    if part.start > file.status.st_size:
        raise NotOurs("response")
    return file


def find(result: object) -> Part | None:
    """Return what iterating over *result* would give, or None if it may be anything."""
    try:
        part = _whole(result)
        if part is None:
            take = _lookup(result, _RANGES)
            part = None if take is None else take(result)
    except (AttributeError, TypeError):  # a version that is different inside
        return None
    if (
        part is None
        or not _is_size(part.start)
        or not (part.length is None or _is_size(part.length))
    ):
        return None
    return part


def _whole(result: Any) -> Part | None:
    attribute = _lookup(result, _WRAPPERS)
    if attribute is None:
        return None
    file = getattr(result, attribute)
    inner = _lookup(file, _BOUNDED)
    return Part(file) if inner is None else Part(getattr(file, inner), length=file.remaining)


def _range_wrapper(result: Any) -> Part | None:
    if result.read_length or result.end_reached:
        return None  # it is under way
    # It skips what comes before the range where it thinks that the wrapper can't seek.
    whence = SEEK_SET if result.seekable else SEEK_CUR
    return _narrowed(result.iterable, result.start_byte, whence, result.end_byte)


def _app_iter_range(result: Any) -> Part | None:
    if result._pos:
        return None  # it is under way
    return _narrowed(result.app_iter, result.start, SEEK_CUR, result.stop)


def _narrowed(iterable: Any, start: Any, whence: int, stop: Any) -> Part | None:
    whole = _whole(_sequence_of(iterable))
    if whole is None or whole.length is not None:
        return None
    return Part(whole.file, start, whence, None if stop is None else stop - start)


def _sequence_of(iterable: Any) -> Any:
    """Return what *iterable* goes over, if it is Python's own iterator, at its start.

    It is that over gunicorn 22's wrapper, which has no ``__iter__``.
    """
    if type(iterable) is not _SequenceIterator:
        return iterable
    how_to_make_it: Any = iterable.__reduce__()
    _, (sequence, *_), *position = how_to_make_it
    return sequence if position == [0] else None


#: Iterators over a range of another iterator.
_RANGES: Final = {
    ("webob.response", "AppIterRange"): _app_iter_range,
    ("werkzeug.wsgi", "_RangeWrapper"): _range_wrapper,
}


def _lookup(obj: Any, table: Any) -> Any:
    """Return the entry of the type of *obj*, if the instance does what its type does."""
    cls = type(obj)
    found = by_name(cls, table)
    if found:
        for name in vars(obj):
            # Its close() may be anything: the server calls it, not we.
            if name != "close" and hasattr(cls, name):
                return None
    return found


def _is_size(number: object) -> bool:
    return type(number) is int and number >= 0
