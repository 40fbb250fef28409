"""The file servers in Python that are measured. ``_serve.py NAME FD FOLDER`` runs one of them.

It serves the files of FOLDER on the listening socket FD. gunicorn loads :func:`application`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Start = Callable[[str, list[tuple[str, str]]], object]


def application(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
    """Serve files as a WSGI application should (PEP 3333)."""
    name = environ["PATH_INFO"]
    if name == "/stats":  # what gsplice has counted
        body = json.dumps(sys.modules["gsplice"].stats().as_dict()).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    file = open(os.environ["BENCHMARK_FOLDER"] + name, "rb")  # noqa: SIM115
    length = str(os.fstat(file.fileno()).st_size)
    headers = [("Content-Type", "application/octet-stream"), ("Content-Length", length)]
    start_response("200 OK", headers)
    wrapper = environ.get("wsgi.file_wrapper")
    piece = int(os.environ["BENCHMARK_PIECE"])
    return wrapper(file, piece) if wrapper is not None else Pieces(file, piece)


class Pieces:
    """What takes the place of a ``wsgi.file_wrapper`` where the server has none."""

    def __init__(self, file: Any, piece: int) -> None:
        self._file = file
        self._piece = piece
        self.close = file.close

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> bytes:
        if data := self._file.read(self._piece):
            return data  # type: ignore[no-any-return]
        raise StopIteration


def pywsgi(listener: socket.socket, app: Any) -> None:
    from gevent.pywsgi import WSGIServer

    WSGIServer(listener, app, log=None).serve_forever()


def aiohttp(listener: socket.socket, folder: str, *, uvloop: bool) -> None:
    import asyncio

    from aiohttp import web

    async def file(request: web.Request) -> web.FileResponse:
        return web.FileResponse(Path(folder, request.match_info["name"]))

    if uvloop:
        import uvloop as fast

        loop = fast.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/{name}", file)
    web.run_app(app, sock=listener, access_log=None, print=None, loop=loop)


def main() -> None:
    name, fd, folder = sys.argv[1:]
    listener: Any
    if name.startswith("aiohttp"):
        listener = socket.socket(fileno=int(fd))
        aiohttp(listener, folder, uvloop=name == "aiohttp-uvloop")
        return
    import gevent.monkey

    gevent.monkey.patch_all()
    patch()
    from gevent.socket import socket as GeventSocket

    listener = GeventSocket(fileno=int(fd))
    pywsgi(listener, application)


def patch() -> None:
    """Switch gsplice on if this server is to have it. Under gunicorn, gevent has patched before."""
    if os.environ.get("BENCHMARK_GSPLICE"):
        import gsplice

        assert gsplice.patch_all()


if __name__ == "__main__":
    main()
else:
    patch()
