"""Wrappers around a file that only watch, behind gevent.pywsgi and by themselves.

With the packages they come from, on real servers: tests/servers/test_traced_servers.py.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import IteratorWrapper

import newrelic.api.wsgi_application as newrelics
import opentelemetry.instrumentation.wsgi as opentelemetrys
import pytest
import sentry_sdk
from conftest import counting, file_of
from ends import until
from gevent import pywsgi
from gunicorn.http.wsgi import FileWrapper as Gunicorns
from opentelemetry.sdk.trace import TracerProvider
from pyramid.response import FileIter
from sentry_sdk.integrations.wsgi import _ScopedResponse
from webob.response import AppIterRange
from werkzeug.wrappers.response import _iter_encoded
from werkzeug.wsgi import ClosingIterator, _RangeWrapper
from whitenoise.responders import SlicedFile
from wsgi import Server, request, split

import gsplice
from gsplice._ends.recognise import NotOurs
from gsplice._patches.pywsgi import FileWrapper
from gsplice._patches.wrapped_results import DEPTH, look_through

SIZE = 1_000_003
START, LENGTH = 100_001, 500_000


class Transaction:
    """Counts as New Relic's does."""

    _sent_start = 1.0
    _calls_yield = 0
    _bytes_sent = 0
    settings = None

    def __exit__(self, *args: Any) -> None: ...


def new_relics(result: Any) -> Any:
    return newrelics._WSGIApplicationIterable(Transaction(), result)


def new_relics_middleware(result: Any) -> Any:
    transaction = Transaction()
    transaction.autorum_disabled = True  # type: ignore[attr-defined]
    middleware = newrelics._WSGIApplicationMiddleware(
        lambda environ, start_response: result, {}, lambda *args: lambda data: None, transaction
    )
    middleware.start_response("200 OK", [])
    return middleware


def opentelemetry(result: Any) -> Any:
    span = TracerProvider().get_tracer("tests").start_span("response")
    return opentelemetrys._end_span_after_iterating(result, span, None)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "sentry": lambda result: _ScopedResponse(sentry_sdk.Scope(), result),
    "newrelic": new_relics,
    "newrelic's middleware": new_relics_middleware,
    "opentelemetry": opentelemetry,
    "validate": lambda result: IteratorWrapper(result, None),
    "closing": ClosingIterator,
    "encoded": _iter_encoded,
}


def ranged(kind: Any, cls: Any, start: int) -> Callable[[Any], Any]:
    end = LENGTH if kind is _RangeWrapper else start + LENGTH
    return lambda file: kind(cls(file), start, end)


FILES: dict[str, Callable[[Any], Any]] = {
    "pywsgi": FileWrapper,
    "gunicorn": Gunicorns,
    "sliced": lambda file: FileWrapper(SlicedFile(file, START, START + LENGTH - 1)),
    **{
        f"{kind.__name__} of {cls.__name__} from {start}": ranged(kind, cls, start)
        for cls in (FileWrapper, Gunicorns, FileIter)
        for kind in (_RangeWrapper, AppIterRange)
        # At the beginning, at the end of a piece of each size, and within one.
        for start in (0, 262_144, START)
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_of(tmp_path / "f", SIZE)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(make: Callable[[], Any], length: int | None, **options: Any) -> Server:
            def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
                headers = [] if length is None else [("Content-Length", str(length))]
                start_response("200 OK", headers)
                return make()

            server = Server(app, **options)
            stack.callback(server.server.stop)
            return server

        yield start


def make_of(path: Path, wrapper: str, file: str, made: list[Any]) -> Callable[[], Any]:
    def make() -> Any:
        opened = path.open("rb")
        made.append(opened)
        return WRAPPERS[wrapper](FILES[file](opened))

    return make


def known(result: Any) -> bool:
    try:
        return look_through(result) is not None
    except NotOurs as reason:
        assert reason.args == ("result_type",)
        return False


@pytest.mark.few
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_gives_what_iterating_gives(serve: Any, path: Path, wrapper: str, file: str) -> None:
    made: list[Any] = []
    make = make_of(path, wrapper, file, made)
    result = make()
    expected = b"".join(result)
    result.close()
    with counting() as grown:
        server = serve(make, len(expected))
        both = server.ask(request(close=False), request())
    assert both.count(expected) == 2
    assert len(both) < 2 * len(expected) + 500
    assert len(expected) - 300_000 < grown.bytes_spliced / 2 < len(expected)
    assert (grown.transfers, grown.fallbacks) == (2, {})
    sizes = [int(line.split()[-2]) for line in server.log.getvalue().splitlines()]
    assert sum(sizes) == len(both)


@pytest.mark.few
@pytest.mark.parametrize("file", FILES)
def test_bytes_and_pieces_are_counted(serve: Any, path: Path, file: str) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(new_relics(FILES[file](path.open("rb"))))
        return made[-1]

    expected = b"".join(make())
    with counting() as grown:
        serve(make, len(expected)).ask(request())
    counts = [(each.transaction._bytes_sent, each.transaction._calls_yield) for each in made]
    assert counts[0] == counts[1]
    assert grown.transfers == 1


@pytest.mark.few
@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("outer", WRAPPERS)
def test_two_around_each_other(serve: Any, path: Path, outer: str, inner: str) -> None:
    def make() -> Any:
        return WRAPPERS[outer](WRAPPERS[inner](Gunicorns(path.open("rb"))))

    with counting() as grown:
        answer = serve(make, SIZE).ask(request())
    assert split(answer)[2] == path.read_bytes()
    assert grown.bytes_spliced > SIZE - 9000


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_that_is_different_is_not_taken(path: Path, wrapper: str) -> None:
    with path.open("rb") as file:

        def make() -> Any:
            return WRAPPERS[wrapper](FileWrapper(file))

        assert known(make())
        result = make()
        next(iter(result)) if isinstance(result, types.GeneratorType) else None
        assert known(result) != isinstance(result, types.GeneratorType)  # it has begun
        if hasattr(result, "__dict__"):
            result.counted = 0
            assert not known(result)
            del result.counted
            name = next(iter(vars(result)))
            value = vars(result).pop(name)
            assert not known(result)
            setattr(result, name, value)
        result.close()


@pytest.mark.parametrize("wrapper", ["sentry", "newrelic", "validate", "closing"])
def test_a_class_that_yields_in_another_way_is_not_taken(
    monkeypatch: Any, path: Path, wrapper: str
) -> None:
    with path.open("rb") as file:
        result = WRAPPERS[wrapper](FileWrapper(file))
        cls = type(result)
        method = "__next__" if "__next__" in vars(cls) else "__iter__"
        plain = vars(cls)[method]

        def upper(self: Any) -> Any:
            return plain(self)

        monkeypatch.setattr(cls, method, upper)
        assert not known(result)
        monkeypatch.undo()
        assert known(result)
        code = plain.__code__
        names = tuple(name.replace("next", "nxt") + "_" for name in code.co_names)
        other = types.FunctionType(code.replace(co_names=names), plain.__globals__, method)
        monkeypatch.setattr(cls, method, other)
        assert not known(result)
        monkeypatch.undo()
        if wrapper != "sentry":  # which has slots
            result.__class__ = types.new_class(cls.__name__, (cls,))
            result.__class__.__module__ = cls.__module__
            assert not known(result)
        result.close()


def test_another_function_of_a_generator_is_not_taken(monkeypatch: Any, path: Path) -> None:
    with path.open("rb") as file:
        result = opentelemetry(FileWrapper(file))
        assert known(result)
        monkeypatch.setattr(opentelemetrys, "_end_span_after_iterating", lambda *args: None)
        assert not known(result)


def test_what_new_relic_puts_into_a_page_is_not_left_out(path: Path) -> None:
    with path.open("rb") as file:
        middleware = new_relics_middleware(FileWrapper(file))
        middleware.pass_through = False
        assert not known(middleware)
        middleware.pass_through, middleware.outer_write = True, None
        assert not known(middleware)


def test_only_so_many_wrappers(path: Path) -> None:
    with path.open("rb") as file:
        result: Any = Gunicorns(file)
        for number in range(DEPTH + 1):
            assert known(result) == (number > 0)
            result = ClosingIterator(result)
        assert not known(result)
        circle = new_relics(None)
        circle.generator = circle
        assert not known(circle)
        circle.closed = True


@pytest.mark.parametrize("length", [SIZE - 1, SIZE + 1, None, 70_000])
def test_another_length_than_the_file_has(serve: Any, path: Path, length: int | None) -> None:
    """pywsgi sends what there is, and leaves it to the client to make sense of that."""
    with counting() as grown:
        answer = serve(lambda: ClosingIterator(Gunicorns(path.open("rb"))), length).ask(request())
    if length is not None:
        assert split(answer)[2] == path.read_bytes()
    assert grown.transfers == 0
    assert grown.fallbacks == ({} if length is None else {"response": 1})


def test_a_small_file_is_left_to_the_server(serve: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "small", 65_536)
    with counting() as grown:
        answer = serve(lambda: ClosingIterator(Gunicorns(path.open("rb"))), 65_536).ask(request())
    assert split(answer)[2] == path.read_bytes()
    assert (grown.transfers, grown.fallbacks) == (0, {})


class Unknown:
    def __init__(self, result: Any) -> None:
        self._result = result

    def __iter__(self) -> Any:
        yield from self._result


@pytest.mark.parametrize(
    ("make", "counted"),
    [
        (Unknown, True),
        (lambda file: ClosingIterator(Unknown(file)), True),
        (lambda file: (piece for piece in file), True),
        (lambda file: [bytes(SIZE)], False),
        (lambda file: (bytes(SIZE),), False),
        (lambda file: ClosingIterator(_iter_encoded([bytes(SIZE)])), False),
        (lambda file: ClosingIterator(_iter_encoded((bytes(SIZE),))), False),
    ],
)
def test_what_is_unknown_is_counted(serve: Any, path: Path, make: Any, counted: bool) -> None:
    """Unless it is in memory anyway."""
    with counting() as grown:
        server = serve(lambda: make(FileWrapper(path.open("rb"))), SIZE)
        assert len(split(server.ask(request()))[2]) == SIZE
        server.ask(request("HEAD"))
    assert grown.fallbacks == ({"result_type": 1} if counted else {})
    assert grown.transfers == 0


def test_a_handler_that_has_to_see_all(path: Path) -> None:
    class Handler(pywsgi.WSGIHandler):
        seen = 0

        def _sendall(self, data: Any) -> None:
            Handler.seen += len(data)
            super()._sendall(data)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", str(SIZE))])
        return ClosingIterator(Gunicorns(path.open("rb")))

    server = Server(app, Handler)
    with counting() as grown:
        answer = server.ask(request())
    server.server.stop()
    assert len(answer) == Handler.seen > SIZE
    assert grown.fallbacks == {"response": 1}


def test_a_file_that_gets_shorter_or_is_closed_under_way(
    serve: Any, tmp_path: Path, capsys: Any
) -> None:
    """The wrapper meets the end, or the error, where it would."""
    size = 32 * 1024 * 1024
    for closes in (False, True):
        path = tmp_path / "f"
        with path.open("wb") as file:
            file.truncate(size)
        opened = path.open("rb")
        seen: list[Any] = []

        def watching(opened: Any = opened, seen: list[Any] = seen) -> Any:
            result = ClosingIterator(Gunicorns(opened), lambda: seen.append("closed"))
            return opentelemetry(result)

        server = serve(watching, size)
        before = gsplice.stats().bytes_spliced
        with server.connect() as sock:
            sock.sendall(request().encode())
            sock.recv(1)
            until(lambda before=before: gsplice.stats().bytes_spliced > before)
            if closes:
                opened.close()
            else:
                path.open("r+b").truncate(0)
            received = 1
            while data := sock.recv(1 << 20):
                received += len(data)
        assert 0 < received < size
        assert seen
        assert ("closed file" in capsys.readouterr().err) == closes


def test_a_wrapper_that_comes_to_its_end_in_the_first_piece(serve: Any, path: Path) -> None:
    def make() -> Any:
        return ClosingIterator(AppIterRange(FileIter(path.open("rb"), 1 << 20), 5, 100_005))

    with counting() as grown:
        answer = serve(make, 100_000).ask(request())
    assert split(answer)[2] == path.read_bytes()[5:100_005]
    assert (grown.transfers, grown.fallbacks) == (0, {})
