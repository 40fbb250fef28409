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

#: Iterables of all the pieces of a file, and the attributes with the file and a piece's size.
_WRAPPERS: Final = {
    ("gsplice._patches.pywsgi", "FileWrapper"): ("filelike", "blksize"),
    ("gunicorn.http.wsgi", "FileWrapper"): ("filelike", "blksize"),
    ("pyramid.response", "FileIter"): ("file", "block_size"),
    ("werkzeug.wsgi", "FileWrapper"): ("file", "buffer_size"),
    ("wsgiref.util", "FileWrapper"): ("filelike", "blksize"),
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
    attributes = _lookup(result, _WRAPPERS)
    if attributes is None:
        return None
    file = getattr(result, attributes[0])
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
    whole = _whole(sequence_of(iterable))
    if whole is None or whole.length is not None:
        return None
    return Part(whole.file, start, whence, None if stop is None else stop - start)


def sequence_of(iterable: Any) -> Any:
    """Return the sequence under *iterable*, if that is Python's sequence iterator, at its start.

    None if it has begun; any other *iterable* as it is.

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


def block_size(result: Any) -> int:
    """Return in what pieces *result*, for which find() has found a part, reads its file."""
    wrapper = _wrapper_in(result)
    _, attribute = _WRAPPERS[type(wrapper).__module__, type(wrapper).__name__]
    return max(1, int(getattr(wrapper, attribute)))


def skip_blocks(result: Any) -> int:
    """Have *result*, for which find() has found a range that it would read up to, begin later.

    On entry it has not begun. Return by how many bytes later its file has to stand for that: these
    are whole pieces of it, so that those that it yields are the same.
    """
    of_werkzeug = type(result).__name__ == "_RangeWrapper"
    begin, end = ("start_byte", "end_byte") if of_werkzeug else ("start", "stop")
    start, size = getattr(result, begin), block_size(result)
    number: int = (start - 1) // size * size
    setattr(result, begin, start - number)
    if getattr(result, end) is not None:
        setattr(result, end, getattr(result, end) - number)
    return number


def note_sent(result: Any, number: int) -> None:
    """Have *result*, for which find() has found a part, go on after *number* more bytes.

    Its file already stands behind them.
    """
    name = type(result).__name__
    if name == "_RangeWrapper":
        result.read_length += number
        result.end_reached = result.end_byte is not None and result.read_length >= result.end_byte
    elif name == "AppIterRange":
        result._pos += number
    else:
        attribute, _ = _WRAPPERS[type(result).__module__, name]
        file = getattr(result, attribute)
        if (type(file).__module__, type(file).__name__) in _BOUNDED:
            file.remaining -= number


def _wrapper_in(result: Any) -> Any:
    attribute = {"_RangeWrapper": "iterable", "AppIterRange": "app_iter"}.get(type(result).__name__)
    return result if attribute is None else sequence_of(getattr(result, attribute))


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
