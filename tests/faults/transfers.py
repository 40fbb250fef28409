"""Each kind of transfer that there is: what the attacks are run against.

A new one is added to :data:`TRANSFERS` and then meets every attack. Its ends are named as in
``ends.py``; who feeds and drains them is the attack's business.
"""

from __future__ import annotations

import dataclasses
import errno
import http.client
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from typing import Any

import gevent.pywsgi
from ends import KiB, MiB

import gsplice
from gsplice.config import settings


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of transfer. ``run(src, dst)`` returns the bytes delivered, or None."""

    name: str
    source: str
    sink: str
    size: int
    run: Callable[[Any, Any], Any]
    #: Settings of gsplice that lead this way.
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    #: What comes before the bytes to move: from the source, and from the peer behind the sink.
    preface: bytes = b""
    request: bytes = b""
    #: Whether the peer behind the sink sends nothing (else), and says so at once.
    half_closed: bool = False
    #: Whether the file objects themselves tell by their positions how much was moved.
    positions: bool = True
    #: Whether a head, up to an empty line, arrives before the bytes.
    headed: bool = False
    #: Whether somebody on the way (a server) keeps exceptions to itself, and ends the connection.
    swallows: bool = False

    def __str__(self) -> str:
        return self.name

    def set_up(self) -> None:
        """Set what leads this way; :func:`set_back` undoes it."""
        for name, value in self.settings.items():
            setattr(settings, name, value)

    def body(self, arrived: bytes) -> bytes:
        """Return what has arrived of the bytes to move."""
        if not self.headed:
            return arrived
        head, _, body = arrived.partition(b"\r\n\r\n")
        return body if b" 200 OK\r\n" in head else b""


_DEFAULTS = {name: getattr(settings, name) for name in ("offload", "max_pipes")}


def set_back() -> None:
    """Set what the kinds change to what it was."""
    for name, value in _DEFAULTS.items():
        setattr(settings, name, value)


def sendfile(src: Any, dst: Any) -> int:
    return dst.sendfile(src)  # type: ignore[no-any-return]


def use_sendfile(src: Any, dst: Any) -> int:
    try:
        return dst._sendfile_use_sendfile(src)  # type: ignore[no-any-return]
    except socket._GiveupOnSendfile as err:  # type: ignore[attr-defined]
        raise OSError(errno.EINVAL, "its caller is told to use another way") from err


def copyfileobj(src: Any, dst: Any) -> None:
    shutil.copyfileobj(src, dst)


def copyfile(src: Any, dst: Any) -> None:
    shutil.copyfile(src.name, dst.name)


def copy(src: Any, dst: Any) -> int:
    return gsplice.copy(src, dst)


def relay(a: Any, b: Any) -> int:
    return gsplice.relay(a, b).a_to_b


def download(sock: Any, dst: Any) -> None:
    with http.client.HTTPResponse(sock) as response:
        response.begin()
        shutil.copyfileobj(response, dst)


def upload(sock: Any, dst: Any) -> None:
    """Receive one request's body as an application of ``gevent.pywsgi`` may."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        shutil.copyfileobj(environ["wsgi.input"], dst)
        start_response("204 No Content", [])
        return []

    _handle(app, sock)


def _handle(app: Callable[..., Any], sock: Any) -> None:
    server = gevent.pywsgi.WSGIServer(("127.0.0.1", 0), app, log=None, error_log=None)
    server.set_environ({"SERVER_NAME": "localhost", "SERVER_PORT": "0"})
    server.handle(sock, ("127.0.0.1", 0))


def serve(src: Any, dst: Any) -> None:
    """Answer one request with the file, as ``gevent.pywsgi`` does."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Length", str(os.path.getsize(src.name)))])
        return environ["wsgi.file_wrapper"](open(src.name, "rb"))

    _handle(app, dst)


def _head(start: bytes, size: int) -> bytes:
    return b"%b\r\nContent-Length: %d\r\n\r\n" % (start, size)


_COLD = {"offload": "always"}
_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
_RESPONSE: Any = {"request": _REQUEST, "headed": True, "swallows": True, "positions": False}
_DOWNLOAD = _head(b"HTTP/1.1 200 OK", 10 * MiB)
_UPLOAD = _head(b"POST / HTTP/1.0", 10 * MiB)

TRANSFERS = [
    Kind("sendfile", "file", "bare_tcp", 4 * MiB, sendfile),
    Kind("sendfile, small", "file", "bare_unix", 10 * KiB, sendfile),
    Kind("sendfile, cold", "file", "bare_tcp", 4 * MiB, sendfile, _COLD),
    Kind("sendfile, no pipe", "file", "bare_unix", 400 * KiB, sendfile, {**_COLD, "max_pipes": 0}),
    Kind("_sendfile_use_sendfile", "file", "bare_unix", 1 * MiB, use_sendfile),
    Kind("file to socket", "file", "unix", 1 * MiB, copyfileobj),
    Kind("file to file", "file", "file", 12 * MiB, copyfileobj),
    Kind("file to file, small", "file", "file", 50 * KiB, copy, {"offload": "never"}),
    Kind("file to pipe", "file", "pipe", 300 * KiB, copyfileobj),
    Kind("copyfile", "file", "file", 12 * MiB, copyfile, positions=False),
    Kind("socket to socket", "bare_tcp", "bare_tcp", 4 * MiB, copy),
    Kind("relay", "bare_tcp", "bare_tcp", 4 * MiB, relay, half_closed=True),
    Kind("relay, Unix", "bare_unix", "bare_unix", 1 * MiB, relay, half_closed=True),
    Kind("socket to socket, no pipe", "unix", "unix", 400 * KiB, copyfileobj, {"max_pipes": 0}),
    Kind("socket to file", "tcp", "file", 10 * MiB, copyfileobj),
    Kind("socket to file, by a thread", "bare_tcp", "file", 4 * MiB, copy, _COLD),
    Kind("socket to pipe", "unix", "pipe", 400 * KiB, copyfileobj),
    Kind("pipe to socket", "pipe", "tcp", 400 * KiB, copyfileobj),
    Kind("pipe to file", "pipe", "file", 400 * KiB, copyfileobj, _COLD),
    Kind("pipe to pipe", "pipe", "pipe", 400 * KiB, copyfileobj),
    Kind("download", "bare_tcp", "file", 10 * MiB, download, preface=_DOWNLOAD),
    Kind("upload", "bare_tcp", "file", 10 * MiB, upload, preface=_UPLOAD, swallows=True),
    Kind("pywsgi", "file", "bare_tcp", 5 * MiB, serve, **_RESPONSE),
    Kind("pywsgi, cold", "file", "bare_unix", 2 * MiB, serve, _COLD, **_RESPONSE),
]

BY_NAME = {kind.name: kind for kind in TRANSFERS}
