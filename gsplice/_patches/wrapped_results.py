"""Results of WSGI applications that are wrapped by somebody who only watches them go by.

Tracers put an iterable of their own around what the application returns, to close a span at the
end, count bytes, or report an error. It has to go on seeing all of that, so it is iterated as
ever; only what comes after its first piece goes another way (:class:`Pieces`):

1. the first piece comes out of the wrapper, and the server sends it;
2. the kernel sends the rest of the file, while the wrapper waits to be asked for its next piece,
   as it does whenever the server sends;
3. everything under the wrapper is told how far the file has gone, and the wrapper is iterated to
   its end, which is there now.

So a wrapper's end, its ``close()`` and its errors come as they would, in the same order and in the
same context: an error of reading through it, one of sending without its knowing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from os import SEEK_CUR, SEEK_SET
from types import GeneratorType
from typing import Any, Final, NamedTuple

from .._counters import counters
from .._ends.exact_type import by_name, methods_unchanged
from .._ends.recognise import NotOurs
from .._move.memory import read
from .._move.transfer import Transfer
from .wsgi_results import Part, block_size, file_of, find, note_sent, sequence_of, skip_blocks

#: Most wrappers that are around each other.
DEPTH: Final = 8


class _Wrapper(NamedTuple):
    """What is known of a wrapper that yields the pieces of another iterable as they are."""

    #: What it iterates over. Raises if an instance looks different inside.
    inner: Callable[[Any], Any]
    #: The attributes of every instance, if it is no generator.
    attributes: frozenset[str]
    #: The method that yields, or the module of a generator's function.
    where: str
    #: The names that its code uses: another version has others.
    names: frozenset[str]
    #: Have it count bytes, and pieces, that it has not seen.
    note: Callable[[Any, int, int], None] | None = None


def _note_new_relic(wrapper: Any, number: int, pieces: int) -> None:
    wrapper.transaction._bytes_sent += number
    wrapper.transaction._calls_yield += pieces


def _inner_of_middleware(wrapper: Any) -> Any:
    # Else it looks for the place in a page of HTML where to insert something.
    return wrapper.iterable if wrapper.pass_through is True and wrapper.outer_write else None


def _inner_of_closing_iterator(wrapper: Any) -> Any:
    call = wrapper._next
    (iterator,) = call.args
    return iterator if call.func is next and not call.keywords else None


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: By module and name. The comments have the versions in which each was seen.
_WRAPPERS: Final = {
    # sentry-sdk 2.0.0, 2.20.0, 2.50.0, 2.75.0; its integrations of Flask and Django, too
    ("sentry_sdk.integrations.wsgi", "_ScopedResponse"): _Wrapper(
        lambda wrapper: wrapper._response,
        _words("_response _scope"),
        "__iter__",
        _words(
            "iter _response use_isolation_scope _scope next StopIteration BaseException reraise"
            " _capture_exception"
        ),
    ),
    # newrelic 8.8.0, 9.13.0, 11.0.0, 14.1.0
    ("newrelic.api.wsgi_application", "_WSGIApplicationIterable"): _Wrapper(
        lambda wrapper: wrapper.generator,
        _words("transaction generator response_trace closed"),
        "__iter__",
        _words(
            "start_trace generator transaction _calls_yield _bytes_sent len Exception"
            " GeneratorExit notice_error close"
        ),
        _note_new_relic,
    ),
    ("newrelic.api.wsgi_application", "_WSGIApplicationMiddleware"): _Wrapper(
        _inner_of_middleware,
        _words(
            "application pass_through request_environ outer_start_response outer_write transaction"
            " response_status response_headers response_args content_length response_length"
            " response_data debug iterable"
        ),
        "__iter__",
        _words("iterable pass_through outer_write process_data flush_headers response_data"),
    ),
    # Python 3.10 to 3.14
    ("wsgiref.validate", "IteratorWrapper"): _Wrapper(
        lambda wrapper: wrapper.iterator,
        _words("original_iterator iterator closed check_start_response"),
        "__next__",
        _words("assert_ closed next iterator type bytes check_start_response"),
    ),
    # werkzeug 3.1.9
    ("werkzeug.wsgi", "ClosingIterator"): _Wrapper(
        _inner_of_closing_iterator,
        _words("_next _callbacks"),
        "__next__",
        _words("_next"),
    ),
}


def _argument(generator: Any) -> Any:
    return generator.gi_frame.f_locals["iterable"]


#: Generators, by the name of their function, which is in a module.
_GENERATORS: Final = {
    # opentelemetry-instrumentation-wsgi 0.40b0, 0.48b0, 0.55b0, 0.66b2
    "_end_span_after_iterating": _Wrapper(
        _argument,
        frozenset(),
        "opentelemetry.instrumentation.wsgi",
        _words("trace use_span getattr end context detach"),
    ),
    # werkzeug 3.1.9; it only encodes strings, of which a file has none
    "_iter_encoded": _Wrapper(
        _argument,
        frozenset(),
        "werkzeug.wrappers.response",
        _words("isinstance str encode"),
    ),
}

#: What an application has in memory; nothing is wrapped around it.
IN_MEMORY: Final = (list, tuple)


class Wrapped(NamedTuple):
    """A part of a file, and what is around it."""

    part: Part
    #: What iterates over the file, and how large its pieces are.
    iterator: Any
    piece: int
    #: What the tables have about those around it.
    wrappers: list[tuple[Any, _Wrapper]]


def look_through(result: object) -> Wrapped | None:
    """Return what *result* is wrapped around; None if that is in memory. Raises NotOurs."""
    wrappers: list[tuple[Any, _Wrapper]] = []
    inner: Any = result
    try:
        for _ in range(DEPTH):
            wrapper, known = _known(inner)
            if known is None:
                break
            wrappers.append((wrapper, known))
            inner = sequence_of(known.inner(wrapper))
        if type(inner) in IN_MEMORY:
            return None
        part = find(inner) if wrappers else None
        if part is not None and all(_is_unchanged(*each) for each in wrappers):
            return Wrapped(part, inner, block_size(inner), wrappers)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass  # an unknown version
    raise NotOurs("result_type")


def _known(obj: Any) -> tuple[Any, _Wrapper | None]:
    """Return the wrapper that yields when *obj* is iterated, and what is known of it, if anything.

    That is *obj*, or what it is a method of, if it is a generator and has not begun.
    """
    if type(obj) is GeneratorType:
        if inspect.getgeneratorstate(obj) != inspect.GEN_CREATED:
            return obj, None
        code = obj.gi_code
        if code.co_name != "__iter__":
            return obj, _GENERATORS.get(code.co_name)
        frame: Any = obj.gi_frame
        obj = frame.f_locals["self"]
        if type(obj).__iter__.__code__ is not code:
            return obj, None
    return obj, by_name(type(obj), _WRAPPERS)


def _is_unchanged(wrapper: Any, known: _Wrapper) -> bool:
    """Return whether *wrapper* looks inside as it did in the versions in which it was seen."""
    cls = type(wrapper)
    if cls is GeneratorType:
        code = wrapper.gi_code
        function = getattr(sys.modules[known.where], code.co_name)
        return function.__code__ is code and known.names == set(code.co_names)
    attributes = cls.__slots__ if "__slots__" in vars(cls) else vars(wrapper)
    return (
        methods_unchanged(wrapper, "__iter__", "__next__")
        and known.attributes == set(attributes)
        and known.names == set(getattr(cls, known.where).__code__.co_names)
    )


class Pieces:
    """The pieces of *result*, which *wrapped* is in, of which the kernel sends all but the first.

    On entry nobody has begun to iterate, and *length* is the declared one. Whoever iterates has
    sent the first piece to *dst*, as it is, when he asks for the next; then *send*, which is given
    a transfer with its limit, moves the bytes and counts them as sent. The constructor raises
    NotOurs, and has changed nothing, if the server has to send it all.
    """

    def __init__(
        self, result: Any, wrapped: Wrapped, dst: Any, length: int, send: Callable[[Transfer], None]
    ) -> None:
        part = wrapped.part
        src = file_of(part)
        src.remaining()  # sets the offset
        begin = part.start if part.whence == SEEK_SET else src.offset + part.start
        left = src.status.st_size - begin
        if length != (left if part.length is None else min(left, part.length)):
            raise NotOurs("response")
        self._src = src
        self._begin: int = begin
        self._result = result
        self._wrapped = wrapped
        self._dst = dst
        self._length = length
        self._send = send
        if hasattr(result, "close"):
            self.close = result.close

    def __iter__(self) -> Iterator[bytes]:
        """Yield what the server has to send itself.

        Lets out what iterating over the result does, and errors of sending. One of reading is left
        to the result, which meets it again.
        """
        self._prepare()
        waiting = True
        for piece in self._result:
            yield piece
            if piece and waiting:  # with one that is empty, pywsgi does not send the headers
                waiting = False
                self._send_rest(self._begin + len(piece), self._length - len(piece))

    def _prepare(self) -> None:
        """Make it cheap to get the first piece.

        What comes before a range is not read, and a thread reads what has to come from a disk.
        """
        part, iterator = self._wrapped.part, self._wrapped.iterator
        if part.start and part.whence == SEEK_CUR:
            part.file.seek(skip_blocks(iterator), SEEK_CUR)
        transfer = Transfer(self._src, self._dst)
        try:
            read(transfer, self._begin, min(self._length, self._wrapped.piece))
        except OSError:
            if not transfer.read_failed:
                raise
        finally:
            transfer.close()

    def _send_rest(self, begin: int, length: int) -> None:
        """Send *length* bytes of the file, if it stands at *begin*, and tell all around it."""
        iterator, file = self._wrapped.iterator, self._wrapped.part.file
        try:
            src = file_of(Part(file))
        except NotOurs as reason:  # it has been closed meanwhile
            counters.fell_back(reason.args[0])
            return
        src.remaining()  # sets the offset
        if length <= 0 or src.offset != begin:
            return  # a range that ends in the first piece
        transfer = Transfer(src, self._dst, limit=length)
        try:
            self._send(transfer)
        except OSError:
            if not transfer.read_failed:
                raise
        except ValueError:
            if not file.closed:
                raise
        finally:
            sent = transfer.delivered
            note_sent(iterator, sent)
            for wrapper, known in self._wrapped.wrappers:
                if known.note is not None:
                    known.note(wrapper, sent, -(-sent // self._wrapped.piece))
