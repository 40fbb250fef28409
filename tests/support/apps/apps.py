"""Applications that the tests start in servers of their own: one file, by every framework.

The environment says which directory is served (``APPS_ROOT``), and whether gsplice is used
(``APPS_GSPLICE``), and of how many bytes a transfer comes before everything else
(``APPS_TRANSFER``). A framework is imported when it is first asked for.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import socketserver
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from wsgiref.util import FileWrapper, shift_path_info

if __name__ == "__main__":
    import gevent.monkey

    gevent.monkey.patch_all()

import gsplice

ROOT = os.environ["APPS_ROOT"]
FILE = os.path.join(ROOT, "file.bin")

if os.environ["APPS_GSPLICE"] == "1":
    gsplice.patch_all()

if size := int(os.environ.get("APPS_TRANSFER", "0")):
    # Pipes are left behind by it, in the process that loads this.
    import gevent.socket

    (ours, feeder), (sink, target) = gevent.socket.socketpair(), gevent.socket.socketpair()
    feeder.sendall(bytes(size))
    gsplice.copy(ours, sink, size)
    for end in ours, feeder, sink, target:
        end.close()

App = Callable[[dict[str, Any], Callable[..., Any]], Any]


def plain() -> App:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        headers = [("Content-Length", str(os.path.getsize(FILE)))]
        start_response("200 OK", headers)
        return environ.get("wsgi.file_wrapper", FileWrapper)(open(FILE, "rb"))

    return app


def writable() -> App:
    """Half of the file, in one that can be written as well."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        file = tempfile.NamedTemporaryFile()
        shutil.copyfileobj(open(FILE, "rb"), file)
        file.seek(0)
        start_response("200 OK", [("Content-Length", str(os.path.getsize(FILE) // 2))])
        return environ["wsgi.file_wrapper"](file)

    return app


def undeclared() -> App:
    """The same without its length."""
    app = plain()
    return lambda environ, start_response: app(
        environ, lambda status, headers: start_response(status, [])
    )


def wsgiref() -> App:
    """The standard library's wrapper, whatever the server offers."""
    app = plain()
    return lambda environ, start_response: app(
        environ | {"wsgi.file_wrapper": FileWrapper}, start_response
    )


def flask() -> App:
    from flask import Flask, send_file, send_from_directory

    app = Flask("apps")
    app.add_url_rule("/send_file", "send_file", lambda: send_file(FILE))
    app.add_url_rule("/<name>", "directory", lambda name: send_from_directory(ROOT, name))
    return app


def django() -> App:
    from django.conf import settings
    from django.core.files import File
    from django.core.wsgi import get_wsgi_application
    from django.http import FileResponse
    from django.urls import path

    urls = (
        path("file.bin", lambda request: FileResponse(open(FILE, "rb"))),
        path("File", lambda request: FileResponse(File(open(FILE, "rb")))),
    )
    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=urls,
        SECRET_KEY="apps",
        MIDDLEWARE=["django.middleware.http.ConditionalGetMiddleware"],
    )
    return get_wsgi_application()


def bottle() -> App:
    import bottle

    app = bottle.Bottle()
    app.route("/<name>", callback=lambda name: bottle.static_file(name, ROOT))
    return app


def whitenoise() -> App:
    from whitenoise import WhiteNoise

    return WhiteNoise(None, root=ROOT)


def webob() -> App:
    from webob.static import FileApp

    return FileApp(FILE)


def falcon() -> App:
    import falcon

    app = falcon.App()
    app.add_static_route("/", ROOT)
    return app


def pyramid() -> App:
    from pyramid.config import Configurator
    from pyramid.response import FileResponse

    with Configurator() as config:
        config.add_route("wrapped", "/file.bin")
        config.add_view(lambda request: FileResponse(FILE, request), route_name="wrapped")
        config.add_route("unwrapped", "/FileIter")
        config.add_view(lambda request: FileResponse(FILE), route_name="unwrapped")
        return config.make_wsgi_app()


def part() -> App:
    """A part of the file: the query has the iterator, its numbers, and the length declared."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        import webob.response
        import werkzeug.wsgi

        kind, begin, end, length = environ["QUERY_STRING"].split(",")
        numbers = [int(begin), int(end) if end else None]
        result: Any = werkzeug.wsgi.FileWrapper(open(FILE, "rb"))
        if kind != "whole":
            module = webob.response if kind == "AppIterRange" else werkzeug.wsgi
            result = getattr(module, kind)(result, *numbers)
        start_response("200 OK", [("Content-Length", length)] if length else [])
        return result

    return app


def upload() -> App:
    """Copy the body of a request to a file; say what has arrived, and how."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        stream = environ["wsgi.input"]
        if "werkzeug" in path:
            from werkzeug.wsgi import get_input_stream

            stream = get_input_stream(environ)
        if "falcon" in path:
            import falcon

            stream = falcon.Request(environ).bounded_stream
        if "django" in path:
            stream = django_request(environ)
        before = gsplice.stats()
        error = None
        with tempfile.NamedTemporaryFile() as file:
            try:
                if "begun" in path:
                    file.write(stream.read(10) + stream.readline() + stream.readline(5))
                shutil.copyfileobj(stream, file)
            except Exception as err:  # noqa: BLE001 - whatever it is, the test sees it
                error = f"{type(err).__name__}: {err}"
            rest = "" if error else repr(stream.read(1))
            file.flush()
            data = open(file.name, "rb").read()
        after = gsplice.stats()
        seen = {
            "digest": f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}",
            "error": error,
            "rest": rest,
            "spliced": after.bytes_spliced - before.bytes_spliced,
            "fallbacks": dict(after.fallbacks),
        }
        answer = json.dumps(seen).encode()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    return app


def django_request(environ: dict[str, Any]) -> Any:
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIRequest

    if not settings.configured:
        settings.configure()
    return WSGIRequest(environ)


@functools.cache
def framework(name: str) -> App:
    makers = [
        plain,
        writable,
        undeclared,
        wsgiref,
        flask,
        django,
        bottle,
        whitenoise,
        webob,
        falcon,
        pyramid,
        part,
        upload,
    ]
    return {maker.__name__: maker for maker in makers}[name]()


def seen() -> bytes:
    """Return gsplice's counters, and how many of the served files are open now."""
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    open_files = sum(os.path.lexists(fd) and os.readlink(fd).startswith(ROOT) for fd in fds)
    return json.dumps(gsplice.stats().as_dict() | {"open_files": open_files}).encode()


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    name = shift_path_info(environ)
    if name == "stats":
        answer = seen()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]
    return framework(name)(environ, start_response)


class HTTPHandler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=ROOT)

    def do_GET(self) -> None:
        if self.path != "/stats":
            return super().do_GET()
        answer = seen()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        return None

    def log_message(self, *args: Any) -> None:
        pass


class LineHandler(socketserver.StreamRequestHandler):
    """Answers a line: ``stats``, or the way in which to send the file."""

    def handle(self) -> None:
        asked = self.rfile.readline().strip()
        if asked == b"stats":
            self.wfile.write(seen())
            return
        with open(FILE, "rb") as file:
            if asked == b"copyfileobj":
                shutil.copyfileobj(file, self.wfile)
            else:
                self.request.sendfile(file)


def main(kind: str, listener: socket.socket, app: App = app) -> None:
    if kind == "pywsgi":
        from gevent.pywsgi import WSGIServer

        server: Any = WSGIServer(listener, app, log=None)
    else:
        handler: Any = {"http.server": HTTPHandler, "socketserver": LineHandler}[kind]
        server = socketserver.ThreadingTCPServer(("", 0), handler, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
