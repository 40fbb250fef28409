"""An HTTP file server on gevent.pywsgi whose downloads go by sendfile and splice.

    python examples/file_server.py --port 8000 ~/Downloads

The application is an ordinary WSGI one. All it does for the fast path is to hand an open file to
``environ["wsgi.file_wrapper"]``, which ``gsplice.patch_all()`` adds to pywsgi, and to return
what it gets, untouched. Without it (``--no-patch``) the same bytes go through Python.

A request with several ranges is answered with the whole file, as RFC 9110 allows.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before anything else imports socket or ssl.
    from gevent import monkey

    monkey.patch_all()

import argparse
import contextlib
import dataclasses
import errno
import json
import mimetypes
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import gevent
from gevent.monkey import get_original
from gevent.pywsgi import WSGIHandler, WSGIServer
from jinja2 import Environment, FileSystemLoader
from werkzeug.datastructures import Range
from werkzeug.exceptions import (
    Forbidden,
    HTTPException,
    MethodNotAllowed,
    NotFound,
    PreconditionFailed,
    RequestedRangeNotSatisfiable,
)
from werkzeug.http import is_resource_modified, parse_date, parse_etags, parse_range_header
from werkzeug.utils import redirect
from werkzeug.wrappers import Request, Response

import gsplice

WSGIEnviron = dict[str, Any]
WSGIApp = Callable[[WSGIEnviron, Callable[..., Any]], Iterable[bytes]]

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
#: Our own pages load nothing; a file's name that got past the escaping could not run anything.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STATS_POLICY = f"{PAGE_POLICY}; script-src 'unsafe-inline'; connect-src 'self'"

#: "x.tar.gz" is served as the gzip file it is: with a Content-Encoding, clients would unpack it.
COMPRESSED_TYPES = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "xz": "application/x-xz",
}
#: "GET http://host/path", which a server has to understand too (RFC 9112); pywsgi leaves it as is.
ABSOLUTE_FORM = re.compile(r"https?://[^/]+(/.*)?", re.IGNORECASE | re.DOTALL)
PIECE = 64 * 1024

#: gevent's own puts off closing to the next turn of its loop, for the sake of watchers, which ours
#: never have; a directory full of symlinks would use up all the descriptors before that.
close_now: Callable[[int], None] = get_original("os", "close")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    name: str
    href: str
    is_dir: bool
    size: int
    seconds: float
    modified: datetime | None


#: What can be sorted by: the heading, the key, the order that the first click asks for.
COLUMNS: dict[str, tuple[str, Callable[[Entry], Any], str]] = {
    "name": ("Name", lambda entry: entry.name.casefold(), "asc"),
    "size": ("Size", lambda entry: entry.size, "desc"),
    "time": ("Modified", lambda entry: entry.seconds, "desc"),
}


class Pieces:
    """The fallback where the server has no ``wsgi.file_wrapper``: ``length`` bytes of ``file``."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.left = length

    def __iter__(self) -> Iterator[bytes]:
        while self.left:
            piece = self.file.read(min(PIECE, self.left))
            if not piece:
                # The file was cut short after its length was announced. pywsgi closes the
                # connection at this error, so that the client sees that something is missing.
                raise ConnectionResetError(errno.ECONNRESET, "the file became shorter")
            self.left -= len(piece)
            yield piece

    def close(self) -> None:
        self.file.close()


class FileServer:
    """The WSGI application."""

    def __init__(self, root: str | os.PathLike[str], follow_symlinks: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.follow_symlinks = follow_symlinks

    def __call__(self, environ: WSGIEnviron, start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            response = self.respond(environ)
        except HTTPException as error:
            response = error_page(error, environ)
        response.headers["X-Content-Type-Options"] = "nosniff"
        # For a file this returns ``response.response`` itself, which is what the server looks at.
        return response(environ, start_response)

    def respond(self, environ: WSGIEnviron) -> Response:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        if absolute := ABSOLUTE_FORM.fullmatch(environ["PATH_INFO"]):
            environ["PATH_INFO"] = absolute[1] or "/"
        url_path = environ["PATH_INFO"]
        if url_path == "/.stats":
            return stats_page(environ)
        if url_path == "/.stats.json":
            return stats_json()
        parts = path_parts(url_path)
        with self.pinned(os.path.join(self.root, *parts)) as (handle, status):
            if stat.S_ISDIR(status.st_mode):
                if not url_path.endswith("/"):
                    return redirect_to_directory(environ)
                return self.listing(environ, handle, parts)
            if not stat.S_ISREG(status.st_mode) or url_path.endswith("/"):
                raise NotFound
            return file_response(environ, handle, parts[-1])

    def is_allowed(self, real_path: str) -> bool:
        inside = (real_path + "/").startswith(self.root.rstrip("/") + "/")
        return inside or self.follow_symlinks

    @contextlib.contextmanager
    def pinned(self, path: str) -> Iterator[tuple[str, os.stat_result]]:
        """Hold what ``path`` leads to; give a name for exactly that, and its status.

        O_PATH only points at the object. So what lies outside the root, a FIFO or a device is
        never really opened, and what is opened afterwards, by the name given, is what was checked,
        even if somebody has exchanged files or symlinks on the way to it since.
        """
        with self.os_errors(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                handle = f"/proc/self/fd/{descriptor}"
                if not self.is_allowed(os.readlink(handle)):
                    raise NotFound
                yield handle, os.fstat(descriptor)
            finally:
                close_now(descriptor)

    @contextlib.contextmanager
    def os_errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except PermissionError:
            # A symlink out of the root must not tell what is out there.
            raise (Forbidden if self.is_allowed(os.path.realpath(path)) else NotFound) from None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise NotFound from None
            raise

    def listing(self, environ: WSGIEnviron, handle: str, parts: list[str]) -> Response:
        entries, left_out = self.entries(handle)
        arguments = Request(environ).args
        sort = arguments.get("sort", "")
        if sort not in COLUMNS:
            sort = "name"
        order = arguments.get("order", "")
        if order not in ("asc", "desc"):
            order = COLUMNS[sort][2]
        entries.sort(key=lambda entry: entry.name)
        entries.sort(key=COLUMNS[sort][1], reverse=order == "desc")
        entries.sort(key=lambda entry: not entry.is_dir)
        names = [os.path.basename(self.root) or "/", *parts]
        return page(
            "listing.html",
            crumbs=[
                (shown(name), "../" * (len(names) - 1 - depth) or "./")
                for depth, name in enumerate(names)
            ],
            columns=headings(sort, order),
            entries=entries,
            directories=sum(entry.is_dir for entry in entries),
            total=sum(entry.size for entry in entries),
            left_out=left_out,
            top="../" * len(parts),
        )

    def entries(self, handle: str) -> tuple[list[Entry], int]:
        """Return what can be fetched from a directory, and how many other things are in it."""
        found = []
        left_out = 0
        with os.scandir(handle) as items:
            for item in items:
                try:
                    status = self.status(item)
                except (FileNotFoundError, PermissionError, HTTPException):
                    left_out += 1
                    continue
                if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
                    found.append(entry(item.name, status))
                else:
                    left_out += 1
        return found, left_out

    def status(self, item: os.DirEntry[str]) -> os.stat_result:
        if not item.is_symlink():
            return item.stat(follow_symlinks=False)
        with self.pinned(item.path) as (_, status):
            return status


def path_parts(url_path: str) -> list[str]:
    """Return the names that a (decoded) URL path consists of; refuse anything unusual in it.

    Decoded slashes count as slashes here. Two in a row are refused with the rest, so that no
    redirect can begin with ``//`` and lead to another host.
    """
    path = os.fsdecode(url_path.encode("latin-1"))
    parts = path.removeprefix("/").removesuffix("/").split("/")
    if parts == [""] and path in ("", "/"):
        return []
    if not path.startswith("/") or "\0" in path or {"", ".", ".."} & set(parts):
        raise NotFound
    return parts


def redirect_to_directory(environ: WSGIEnviron) -> Response:
    path = environ.get("SCRIPT_NAME", "") + environ["PATH_INFO"]
    location = quote(path.encode("latin-1")) + "/"
    if environ.get("QUERY_STRING"):
        location += "?" + quote(environ["QUERY_STRING"].encode("latin-1"), safe="%=&+;,/:?@!$'()*~")
    return redirect(location, 308)


def file_response(environ: WSGIEnviron, path: str, name: str) -> Response:
    file = open(path, "rb")  # noqa: SIM115 - the server closes it, with the response
    try:
        return conditional_response(environ, file, content_type(name))
    except BaseException:
        file.close()
        raise


def conditional_response(environ: WSGIEnviron, file: BinaryIO, mimetype: str) -> Response:
    status = os.fstat(file.fileno())
    size = status.st_size
    response = Response(mimetype=mimetype, direct_passthrough=True)
    response.content_length = size
    response.accept_ranges = "bytes"
    response.cache_control.no_cache = True
    response.last_modified = moment(status.st_mtime)
    response.set_etag(f"{status.st_ino:x}-{size:x}-{status.st_mtime_ns:x}")

    # In the order of RFC 9110: "not modified" goes before ranges.
    ignore_impossible_dates(environ)
    check_preconditions(environ, response)
    response.make_conditional(environ)
    if response.status_code == 304:
        file.close()
        return response

    start, stop = 0, size
    wanted = requested_range(environ, size)
    if wanted is not None and is_range_fresh(environ, response):
        span = wanted.range_for_length(size)
        if span is None:
            raise RequestedRangeNotSatisfiable(size)
        start, stop = span
        response.status_code = 206
        response.headers["Content-Range"] = wanted.to_content_range_header(size)
        response.content_length = stop - start

    if environ["REQUEST_METHOD"] == "HEAD":
        file.close()
        return response
    file.seek(start)
    wrap = environ.get("wsgi.file_wrapper")
    # The wrapper sends from where the file stands, as many bytes as Content-Length says.
    response.response = wrap(file, PIECE) if wrap else Pieces(file, stop - start)
    return response


def ignore_impossible_dates(environ: WSGIEnviron) -> None:
    """Blank the dates that werkzeug would raise OverflowError for."""
    for name in ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE", "HTTP_IF_RANGE"):
        try:
            parse_date(environ.get(name))
        except OverflowError:
            environ[name] = ""


def check_preconditions(environ: WSGIEnviron, response: Response) -> None:
    """Raise PreconditionFailed if the client wants another version of the file than there is.

    werkzeug knows neither ``If-Match: *`` nor If-Unmodified-Since. Once checked, If-Match is taken
    away, for werkzeug would look at it instead of If-None-Match and If-Range.
    """
    if "HTTP_IF_MATCH" in environ:
        wanted = parse_etags(environ.pop("HTTP_IF_MATCH"))
        failed = not wanted.star_tag and not wanted.is_strong(response.get_etag()[0] or "")
    else:
        date = parse_date(environ.get("HTTP_IF_UNMODIFIED_SINCE"))
        modified = response.last_modified
        failed = date is not None and modified is not None and modified > date
    if failed:
        raise PreconditionFailed


def requested_range(environ: WSGIEnviron, size: int) -> Range | None:
    """Return the range to answer with; None where the header has to or may be ignored."""
    header = environ.get("HTTP_RANGE", "")
    if environ["REQUEST_METHOD"] != "GET" or not size:
        return None
    if re.fullmatch("bytes=-0+", header, re.IGNORECASE):
        # The last 0 bytes cannot be sent; werkzeug finds that senseless.
        return Range("bytes", [(size, None)])
    ranges = parse_range_header(header)
    if ranges is None or ranges.units != "bytes" or len(ranges.ranges) != 1:
        return None
    start, stop = ranges.ranges[0]
    # The last 500 bytes of 300 are all of them; werkzeug finds that unsatisfiable.
    return Range("bytes", [(max(start, -size), stop)])


def is_range_fresh(environ: WSGIEnviron, response: Response) -> bool:
    return "HTTP_IF_RANGE" not in environ or not is_resource_modified(
        environ,
        response.headers["ETag"],
        last_modified=response.headers.get("Last-Modified"),
        ignore_if_range=False,
    )


def content_type(name: str) -> str:
    # "./" keeps guess_type from taking "data:..." for a URL.
    mimetype, encoding = mimetypes.guess_type("./" + name)
    if encoding is not None:
        mimetype = COMPRESSED_TYPES.get(encoding)
    return mimetype or "application/octet-stream"


def entry(name: str, status: os.stat_result) -> Entry:
    is_dir = stat.S_ISDIR(status.st_mode)
    return Entry(
        name=shown(name),
        href=quote(os.fsencode(name), safe="") + ("/" if is_dir else ""),
        is_dir=is_dir,
        size=0 if is_dir else status.st_size,
        seconds=status.st_mtime,
        modified=moment(status.st_mtime),
    )


def shown(name: str) -> str:
    """Return a name for people: bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def moment(seconds: float) -> datetime | None:
    """Return a time in UTC; None if a file can have it and the calendar, there or here, cannot."""
    try:
        result = datetime.fromtimestamp(seconds, timezone.utc)
        result.astimezone()  # as listings will
        return result
    except (OverflowError, ValueError, OSError):
        return None


def headings(sort: str, order: str) -> list[dict[str, str | None]]:
    result = []
    for name, (label, _, first_order) in COLUMNS.items():
        current = order if name == sort else None
        next_order = {None: first_order, "asc": "desc", "desc": "asc"}[current]
        aria = {None: None, "asc": "ascending", "desc": "descending"}[current]
        href = f"?sort={name}&order={next_order}"
        result.append({"name": name, "label": label, "href": href, "aria": aria})
    return result


def page(template: str, policy: str = PAGE_POLICY, **values: Any) -> Response:
    response = Response(TEMPLATES.get_template(template).render(values), mimetype="text/html")
    response.headers["Content-Security-Policy"] = policy
    return response


def error_page(error: HTTPException, environ: WSGIEnviron) -> Response:
    home = quote(environ.get("SCRIPT_NAME", "").encode("latin-1")) + "/"
    response = page("error.html", error=error, home=home)
    response.status_code = error.code or 500
    for name, value in error.get_headers(environ):
        if name != "Content-Type":
            response.headers[name] = value
    return response


def stats_page(environ: WSGIEnviron) -> Response:
    return page("stats.html", STATS_POLICY, patched="wsgi.file_wrapper" in environ)


def stats_json() -> Response:
    response = Response(json.dumps(gsplice.stats().as_dict()), mimetype="application/json")
    response.cache_control.no_store = True
    return response


class Handler(WSGIHandler):
    """pywsgi's, with an end to its patience: each of these has to be read within ``timeout``."""

    timeout: float | None = None

    def read_requestline(self) -> str:
        # As if the connection had been lost: it is closed without a word.
        with gevent.Timeout(self.timeout, TimeoutError):
            return super().read_requestline()

    def read_request(self, raw_requestline: str) -> bool:
        # As if the headers were wrong: 400.
        with gevent.Timeout(self.timeout, ValueError("the headers took too long")):
            return super().read_request(raw_requestline)


def make_app(root: str | os.PathLike[str], follow_symlinks: bool = False) -> WSGIApp:
    """Return the WSGI application that serves ``root``.

    Another server's ``wsgi.file_wrapper`` must stop at Content-Length, as PEP 3333 wants it to.
    """
    return FileServer(root, follow_symlinks)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve the files of a directory over HTTP.")
    parser.add_argument("directory", metavar="DIR", nargs="?", default=".", help="default: .")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free")
    parser.add_argument("--no-patch", action="store_true", help="plain gevent, to compare with")
    parser.add_argument("--access-log", action="store_true", help="a line for each request")
    parser.add_argument(
        "--follow-symlinks", action="store_true", help="serve what symlinks out of DIR lead to"
    )
    parser.add_argument(
        "--header-timeout",
        metavar="SECONDS",
        type=float,
        default=60,
        help="close a connection on which no request, or only the start of one, comes for so long; "
        "default: %(default)s; 0: never",
    )
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.directory):
        parser.error(f"{arguments.directory} is not a directory")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    patched = "patched: nothing (--no-patch)" if arguments.no_patch else gsplice.patch_all()
    if arguments.header_timeout > 0:
        Handler.timeout = arguments.header_timeout
    server = WSGIServer(
        (arguments.host, arguments.port),
        make_app(arguments.directory, arguments.follow_symlinks),
        log="default" if arguments.access_log else None,
        handler_class=Handler,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop)
    try:
        server.start()
    except (OSError, OverflowError) as error:
        print(f"cannot listen on {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return 1
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{server.server_port}/"
    print(f"Serving {shown(arguments.directory)} at {address} (Ctrl-C to stop)")
    print(f"gsplice {patched}", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
