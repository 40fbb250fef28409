"""Iterators and files of frameworks over a plain file, behind gevent.pywsgi and by themselves."""

from __future__ import annotations

import contextlib
import gzip
import io
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper as Wsgirefs

import pytest
from conftest import counting, file_of, run_program
from falcon.routing.static import _BoundedFile
from gunicorn.http.wsgi import FileWrapper as Gunicorns
from pyramid.response import FileIter
from webob.response import AppIterRange
from werkzeug.wsgi import FileWrapper as Werkzeugs
from werkzeug.wsgi import _RangeWrapper
from whitenoise.responders import SlicedFile
from wsgi import Server, request, split

from gsplice._patches.pywsgi import FileWrapper
from gsplice._patches.wsgi_results import find

BIG = 1_000_003
START, LENGTH = 100_001, 500_000
STANDS = 70_000

WRAPPERS = [FileWrapper, Gunicorns, Werkzeugs, Wsgirefs, FileIter]


def bounded(file: Any) -> Any:
    file.seek(START)
    return FileWrapper(_BoundedFile(file, LENGTH))


def sliced(file: Any) -> Any:
    return FileWrapper(SlicedFile(file, START, START + LENGTH - 1))


PARTS: dict[str, Callable[[Any], Any]] = {
    "bounded": bounded,
    "sliced": sliced,
    **{
        f"{wrapper.__module__} {kind.__name__}": lambda file, wrapper=wrapper, kind=kind: kind(
            wrapper(file), START, LENGTH if kind is _RangeWrapper else START + LENGTH
        )
        for wrapper in WRAPPERS
        for kind in (_RangeWrapper, AppIterRange)
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_of(tmp_path / "f", BIG)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Serve what a function makes of the file, as if nothing but its length were declared."""
    with contextlib.ExitStack() as stack:

        def start(make: Callable[[], Any], length: int | None = LENGTH) -> Server:
            def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
                headers = [] if length is None else [("Content-Length", str(length))]
                start_response("206 Partial Content", headers)
                return make()

            server = Server(app)
            stack.callback(server.server.stop)
            return server

        yield start


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_wrapper_gives_the_file_from_where_it_stands(
    serve: Any, path: Path, wrapper: Any, buffering: int
) -> None:
    opened = []

    def make() -> Any:
        opened.append(path.open("rb", buffering=buffering))
        opened[-1].read(STANDS)
        return wrapper(opened[-1])

    with counting() as grown:
        answer = serve(make, BIG - STANDS).ask(request())
    assert split(answer)[2] == path.read_bytes()[STANDS:]
    assert (grown.bytes_spliced + grown.bytes_copied, grown.transfers) == (BIG - STANDS, 1)
    assert grown.bytes_spliced > BIG - STANDS - 65536
    assert grown.fallbacks == {}
    assert opened[0].closed


@pytest.mark.few
@pytest.mark.parametrize("stands", [0, 10])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_what_iterating_gives(serve: Any, path: Path, part: str, stands: int) -> None:
    """Also of a file of which something has been read before."""
    opened = []

    def make() -> Any:
        opened.append(path.open("rb"))
        opened[-1].read(stands)
        return PARTS[part](opened[-1])

    expected = b"".join(make())
    assert len(expected) == LENGTH
    with counting() as grown:
        both = serve(make).ask(request(close=False), request())
    assert both.count(expected) == 2
    assert len(both) < 2 * LENGTH + 500
    assert (grown.bytes_spliced + grown.bytes_copied, grown.transfers) == (2 * LENGTH, 2)
    assert grown.fallbacks == {}
    # What iter() makes of a wrapper without an __iter__, as gunicorn's was, has no close() either.
    closes = "gunicorn" not in part or hasattr(Gunicorns, "__iter__")
    assert [file.closed for file in opened[1:]] == [closes, closes]


@pytest.mark.few
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("length", [LENGTH - 10, 100])
def test_a_part_is_cut_to_the_declared_length(
    serve: Any, path: Path, part: str, length: int
) -> None:
    server = serve(lambda: PARTS[part](path.open("rb")), length)
    answer = server.ask(request(close=False), request())
    expected = path.read_bytes()[START : START + length]
    assert answer.count(expected) == answer.count(b"HTTP/1.1 206") == 2
    assert answer.endswith(expected)


@pytest.mark.few
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("declared", [LENGTH + 1, BIG])
def test_after_less_than_the_declared_length_the_connection_is_closed(
    serve: Any, path: Path, part: str, declared: int
) -> None:
    answer = serve(lambda: PARTS[part](path.open("rb")), declared).ask(
        request(close=False), request()
    )
    assert split(answer)[2] == path.read_bytes()[START : START + LENGTH]


@pytest.mark.parametrize("part", PARTS)
def test_a_small_part_and_a_file_that_ends_before_it(serve: Any, tmp_path: Path, part: str) -> None:
    path = file_of(tmp_path / "f", START + 10)
    answer = serve(lambda: PARTS[part](path.open("rb"))).ask(request(close=False), request())
    assert split(answer)[2] == path.read_bytes()[START:]
    path = file_of(tmp_path / "f", START - 10)
    assert split(serve(lambda: PARTS[part](path.open("rb"))).ask(request()))[2] == b""


@pytest.mark.few
@pytest.mark.parametrize("part", [*PARTS, *WRAPPERS[1:]])
def test_without_a_declared_length_headers_stay_what_they_are(
    serve: Any, path: Path, part: Any
) -> None:
    """But for the server's own wrapper, which always has had a length."""
    make = PARTS.get(part, part)
    _, headers, body = split(serve(lambda: make(path.open("rb")), None).ask(request()))
    own = part in ("bounded", "sliced") or make is Gunicorns
    assert headers.get("Transfer-Encoding") == (None if own else "chunked")
    if own:
        size = BIG if make is Gunicorns else LENGTH
        assert headers["Content-Length"] == str(size) == str(len(body))


@pytest.mark.few
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["bytes", "gzip"])
def test_what_is_not_a_plain_file_goes_as_before(
    serve: Any, tmp_path: Path, path: Path, part: str, kind: str
) -> None:
    (tmp_path / "g").write_bytes(gzip.compress(path.read_bytes(), 1))

    def make() -> Any:
        file: Any = io.BytesIO(path.read_bytes()) if kind == "bytes" else gzip.open(tmp_path / "g")
        return PARTS[part](file)

    with counting() as grown:
        answer = serve(make).ask(request())
    assert split(answer)[2] == path.read_bytes()[START : START + LENGTH]
    assert grown.transfers == 0
    assert grown.fallbacks == {"source_type": 1}


@pytest.mark.parametrize("part", PARTS)
def test_a_subclass_or_an_instance_of_its_own_is_not_taken(path: Path, part: str) -> None:
    def make() -> Any:  # one of them closes its file when it goes
        return PARTS[part](path.open("rb"))

    assert find(make()) is not None
    result = make()
    cls = type(result)
    result.__class__ = types.new_class(cls.__name__, (cls,))
    assert find(result) is None
    result.__class__.__module__ = cls.__module__
    assert find(result) is None
    for name in ("__next__", "__iter__"):
        result = make()
        result.__dict__[name] = None
        assert find(result) is None


@pytest.mark.parametrize("method", ["_next", "_next_chunk", "_first_iteration"])
def test_a_range_with_a_method_of_its_own_is_not_taken(path: Path, method: str) -> None:
    with path.open("rb") as file:
        wrapper = _RangeWrapper(FileWrapper(file), START, LENGTH)
        setattr(wrapper, method, getattr(wrapper, method))
        assert find(wrapper) is None


def test_a_bounded_file_with_a_read_of_its_own_is_not_the_file_behind_it(path: Path) -> None:
    with path.open("rb") as file:
        inner = SlicedFile(file, START, BIG)
        inner.read = inner.read
        part = find(FileWrapper(inner))
        assert part is not None
        assert part.file is inner


@pytest.mark.parametrize("part", PARTS)
def test_one_that_is_under_way_is_not_taken_or_goes_on(path: Path, part: str) -> None:
    with path.open("rb") as file:
        result = PARTS[part](file)
        begun = next(iter(result))
        found = find(result)
        if part in ("bounded", "sliced"):
            assert found is not None
            assert found.length == LENGTH - len(begun)
        else:
            assert found is None


def test_a_version_that_is_different_inside_is_not_taken(path: Path) -> None:
    with path.open("rb") as file:
        for part, attribute in ("_RangeWrapper", "iterable"), ("AppIterRange", "_pos"):
            result = PARTS[f"gsplice._patches.pywsgi {part}"](file)
            delattr(result, attribute)
            assert find(result) is None
        wrapper = _RangeWrapper(FileWrapper(file), START, LENGTH)
        wrapper.start_byte = -1
        assert find(wrapper) is None
        wrapper = _RangeWrapper(FileWrapper(file), START, LENGTH)
        for end in (float(BIG), str(BIG)):
            wrapper.end_byte = end
            assert find(wrapper) is None


@pytest.mark.parametrize("result", [[b"x"], (), iter([]), io.BytesIO(), type, object(), None])
def test_anything_else_may_be_anything(result: Any) -> None:
    with counting() as grown:
        assert find(result) is None
    assert grown.fallbacks == {}


def test_a_range_without_an_end(serve: Any, path: Path) -> None:
    with counting() as grown:
        for make in (_RangeWrapper, lambda *args: AppIterRange(*args, None)):
            server = serve(lambda make=make: make(FileWrapper(path.open("rb")), START), BIG - START)
            assert split(server.ask(request()))[2] == path.read_bytes()[START:]
    assert grown.bytes_spliced == 2 * (BIG - START)


def test_closing_happens_once_and_by_the_result(serve: Any, path: Path) -> None:
    closed = []

    def make() -> Any:
        wrapper = FileWrapper(path.open("rb"))
        result = _RangeWrapper(wrapper, START, LENGTH)
        result.close = lambda: (closed.append("result"), _RangeWrapper.close(result))
        wrapper.close = lambda: (closed.append("wrapper"), FileWrapper.close(wrapper))
        return result

    with counting() as grown:
        serve(make).ask(request(), request("HEAD"))
    assert closed == ["result", "wrapper"]
    assert grown.bytes_spliced == LENGTH


def test_nothing_is_imported() -> None:
    program = "import sys, gsplice; gsplice.patch_all(); import gevent.pywsgi\n"
    program += "from gsplice._patches.wsgi_results import find; find([])\n"
    program += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    imported = set(run_program(program).split())
    assert not imported & {"bottle", "django", "falcon", "flask", "gunicorn", "pyramid"}
    assert not imported & {"webob", "werkzeug", "whitenoise", "wsgiref"}
