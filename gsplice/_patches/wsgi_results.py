"""Which part of which file a WSGI application's result consists of, if it is of a known type.

For a range request, frameworks return their own iterator over the server's wrapper, or give the
wrapper their own file object that ends early. Only exact types are taken, as in
:mod:`gsplice._ends.recognise`, and nothing is imported for that.
"""

from __future__ import annotations

from io import BufferedReader
from os import SEEK_CUR, SEEK_SET
from typing import Any, Final, NamedTuple

from .._ends.exact_type import by_name
from .._ends.file import File
from .._ends.recognise import NotOurs, regular_file

#: Iterables of all the pieces of a file, and the attribute in which they keep it.
_WRAPPERS: Final = {
    ("gsplice._patches.pywsgi", "FileWrapper"): "filelike",
    ("gunicorn.http.wsgi", "FileWrapper"): "filelike",
    ("pyramid.response", "FileIter"): "file",
    ("werkzeug.wsgi", "FileWrapper"): "file",
    ("wsgiref.util", "FileWrapper"): "filelike",
}

#: File objects that read only ``remaining`` bytes of another, and the attribute with that one.
_BOUNDED: Final = {
    ("falcon.routing.static", "_BoundedFile"): "fh",
    ("whitenoise.responders", "SlicedFile"): "fileobj",
}


class _Sequence:
    def __getitem__(self, index: int) -> None:
        raise IndexError


_SequenceIterator: Final = type(iter(_Sequence()))


class Part(NamedTuple):
    """A part of a file, from ``file.seek(start, whence)``; *length* None: to the end."""

    file: Any
    start: int = 0
    whence: int = SEEK_CUR
    length: int | None = None


def file_of(part: Part) -> File:
    """Return the end that *part* is of, a regular file. Raises NotOurs.

    Also if the part begins after the end of the file: the original finds that out by reading, while
    our seek may fail.
    """
    file = regular_file(part.file)
    if part.start > file.status.st_size:
        raise NotOurs("response")
    return file


def find(result: object) -> Part | None:
    """Return the part of a file that iterating over *result* would yield; None if unknown."""
    try:
        if type(result).__name__ not in _NAMES:  # most responses are lists
            return None
        part = _whole(result)
        if part is None:
            take = _lookup(result, _RANGES)
            part = None if take is None else take(result)
    except (AttributeError, TypeError):  # an unknown version, with other attributes
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
    inner = None if type(file) is BufferedReader else _lookup(file, _BOUNDED)
    return Part(file) if inner is None else Part(getattr(file, inner), length=file.remaining)


def _range_wrapper(result: Any) -> Part | None:
    if result.read_length or result.end_reached:
        return None  # it has begun
    # If it takes the wrapper for not seekable, it reads and skips what comes before the range.
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
    """Return the sequence under *iterable*, if that is Python's sequence iterator, at its start.

    gunicorn 22's wrapper has no ``__iter__``, so iter() of it is such an iterator.
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


#: The names of all these types.
_NAMES: Final = frozenset(name for _, name in [*_WRAPPERS, *_RANGES])


def _lookup(obj: Any, table: Any) -> Any:
    """Look up the type of *obj* in *table*; None if the instance has methods of its own."""
    cls = type(obj)
    found = by_name(cls, table)
    return found if found and _names_in(cls).isdisjoint(vars(obj)) else None


#: The names that each known class defines, filled when it is first met.
_defined: Final[dict[type, frozenset[str]]] = {}


def _names_in(cls: type) -> frozenset[str]:
    """Return the names of what an instance may not replace: all but close(), which servers call."""
    names = _defined.get(cls)
    if names is None:
        names = _defined[cls] = frozenset(dir(cls)) - {"close"}
    return names


def _is_size(number: object) -> bool:
    return type(number) is int and number >= 0
