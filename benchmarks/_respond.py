"""gevent.pywsgi with responses of every kind. ``_respond.py FD`` serves them on the socket FD."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

KiB = 1 << 10

Start = Callable[..., Callable[[bytes], object]]

BODY = b"x" * KiB
PIECES = [BODY[:300], BODY[:300], BODY[:424]]
TINY = [b"ten bytes\n"] * 1000
LARGE = [BODY * 8] * 128

#: What the application returns, by the path it is asked for.
RESULTS: dict[str, Callable[[], Iterable[bytes]]] = {
    "list": lambda: [BODY],
    "pieces": lambda: [*PIECES],
    "chunk": lambda: iter([BODY]),
    "chunks": lambda: iter(PIECES),
    "list-64K": lambda: [BODY * 64],
    "list-256K": lambda: [BODY * 256],
    "tiny-pieces": lambda: [*TINY],
    "tiny-chunks": lambda: iter(TINY),
    "large-pieces": lambda: [*LARGE],
    "large-chunks": lambda: iter(LARGE),
}


def application(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
    """Answer with the kind of response that the path names."""
    kind = environ["PATH_INFO"].lstrip("/")
    headers = [("Content-Type", "text/plain")]
    if kind.startswith("file"):
        return respond_with_file(kind, headers, environ, start_response)
    if kind == "404":
        start_response("404 Not Found", headers)
        return [b"there is nothing of that name"]
    write = start_response("200 OK", headers)
    if kind == "write":
        write(BODY)
        return []
    return RESULTS.get(kind, RESULTS["list"])()


def respond_with_file(
    name: str, headers: list[tuple[str, str]], environ: dict[str, Any], start_response: Start
) -> Iterable[bytes]:
    file = open(os.path.join(os.environ["BENCHMARK_FOLDER"], name), "rb")  # noqa: SIM115
    size = os.fstat(file.fileno()).st_size
    start_response("200 OK", [*headers, ("Content-Length", str(size))])
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is not None:
        return wrapper(file, 64 * KiB)  # type: ignore[no-any-return]
    return in_pieces(file)


def in_pieces(file: Any) -> Iterable[bytes]:
    with file:
        while data := file.read(64 * KiB):
            yield data


def main() -> None:
    import gevent.monkey

    gevent.monkey.patch_all()
    if os.environ.get("BENCHMARK_GSPLICE"):
        import gsplice

        assert gsplice.patch_all()
    from gevent.pywsgi import WSGIServer
    from gevent.socket import socket

    WSGIServer(socket(fileno=int(sys.argv[1])), application, log=None).serve_forever()


if __name__ == "__main__":
    main()
