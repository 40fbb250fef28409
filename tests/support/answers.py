"""Applications for pywsgi that answer in every way there is."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import some_bytes
from wsgi import App, file_app

LARGE = some_bytes(200_000)

FILE = Path(__file__)


class OwnList(list):  # type: ignore[type-arg]
    """Its iterator gives other pieces than it holds."""

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"other", b"pieces", b"than it has"])


class OwnBytes(bytes):
    """Of another length than it holds."""

    def __len__(self) -> int:
        return 2


class Closing:
    def __init__(self, *pieces: Any) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pieces)

    def close(self) -> None:
        raise RuntimeError("can't be closed")


def answering(
    make: Callable[[], Any], *headers: tuple[str, str], status: str = "200 OK", first: Any = ()
) -> App:
    """Make an application that writes *first*, and returns what *make* gives."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        write = start_response(status, list(headers))
        for piece in first:
            write(piece)
        return make()

    return app


def failing(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    raise RuntimeError("the application fails")


def never_started(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    return [b"body"]


def raising(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    raise RuntimeError("the application fails")


def upgrading(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    start_response("101 Switching Protocols", [("Upgrade", "echo"), ("Connection", "upgrade")])
    yield b"greeting"
    yield b"and more"


def reading(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    start_response("200 OK", [])
    if "HTTP_UPGRADE" in environ:
        return [b"it would be read to the end"]
    return [environ["wsgi.input"].read(), b"was read"]


PIECES = [b"first ", b"", b"second ", b"third"]
NOT_FOUND = "404 Not Found"

APPS: dict[str, App] = {
    "list": answering(lambda: [b"body"]),
    "list, length declared": answering(lambda: [b"body"], ("Content-Length", "4")),
    "list, too long": answering(lambda: [b"body", b"more"], ("Content-Length", "4")),
    "list, too short": answering(lambda: [b"body", b"more"], ("Content-Length", "9")),
    "list, date given": answering(lambda: [b"body"], ("Date", "never")),
    "large": answering(lambda: [LARGE]),
    "empty list": answering(list),
    "an empty piece": answering(lambda: [b""]),
    "empty pieces": answering(lambda: [b"", b""]),
    "several pieces": answering(lambda: PIECES),
    "tuple": answering(lambda: tuple(PIECES)),
    "many pieces": answering(lambda: [b"a piece "] * 1000),
    "large pieces": answering(lambda: [LARGE, b"small", LARGE[:65536], b"small", LARGE[:60000]]),
    "bytearrays": answering(lambda: [bytearray(b"body"), memoryview(b"and more")]),
    "bytes of its own": answering(lambda: [OwnBytes(b"body"), OwnBytes(b"and more")]),
    "views": answering(lambda: iter([memoryview(b"body"), bytearray(b"and more")])),
    "views of other shapes": answering(
        lambda: iter([memoryview(array("Q", range(100))), memoryview(bytes(9)).cast("B", (3, 3))]),
        ("Content-Length", "809"),
    ),
    "a view with gaps": answering(
        lambda: iter([memoryview(LARGE)[:1000:2]]), ("Content-Length", "500")
    ),
    "chunked, a view with gaps": answering(lambda: iter([memoryview(LARGE)[:1000:2]])),
    "a number": answering(lambda: iter([b"body", 5]), ("Content-Length", "9")),
    "first a string": answering(lambda: ["body", b"and more"]),
    "second a string": answering(lambda: [b"body", "and more"]),
    "no bytes at all": answering(lambda: [b"body", None]),
    "a list of its own": answering(lambda: OwnList(PIECES)),
    "chunked": answering(lambda: iter([b"body"])),
    "chunked, several": answering(lambda: iter(PIECES)),
    "chunked, large": answering(lambda: iter([LARGE, b"small"])),
    "chunked, nothing": answering(lambda: iter([])),
    "chunked, a string": answering(lambda: iter(["body"])),
    "chunked, a string later": answering(lambda: iter([b"body", "and more"])),
    "iterator, length declared": answering(lambda: iter(PIECES), ("Content-Length", "18")),
    "write": answering(list, first=[b"body"]),
    "write, several": answering(lambda: [b"third", b"fourth"], first=[b"first", b"second"]),
    "write, length declared": answering(
        lambda: [b"third"], ("Content-Length", "16"), first=[b"first", b"second"]
    ),
    "write, a string": answering(lambda: [b"body"], first=["string"]),
    "404": answering(lambda: [b"not here"], ("Content-Type", "text/plain"), status=NOT_FOUND),
    "204": answering(list, status="204 No Content"),
    "204 with a body": answering(lambda: [b"", b"a", b"body"], status="204 No Content"),
    "304": answering(lambda: iter([]), status="304 Not Modified"),
    "304 with a body": answering(lambda: iter([b"body"]), status="304 Not Modified"),
    "raises": raising,
    "raises before the first piece": answering(lambda: failing()),
    "raises after the first piece": answering(lambda: failing(b"body")),
    "cannot be closed": answering(lambda: Closing(b"body", b"and more")),
    "never started": never_started,
    "upgrade": upgrading,
    "reads": reading,
    "file": file_app(FILE, ("Content-Length", str(FILE.stat().st_size))),
}


def comparable(answer: bytes) -> bytes:
    """Return *answer* without what never is equal."""
    return re.sub(rb"\r\nDate: [^\r]*GMT", b"", answer)


def dated(app: App) -> App:
    """Make the application that gives a date which is always the same."""

    def dating(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # Without a wrapper, or ours would make a difference in pieces.
        environ["wsgi.file_wrapper"] = lambda file: iter([file.read()])
        return app(
            environ,
            lambda status, headers: start_response(status, [*headers, ("Date", "never")]),
        )

    return dating
