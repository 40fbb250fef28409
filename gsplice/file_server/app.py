"""The WSGI application: from the path in a URL to the file or directory that it leads to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl, quote

from gevent.monkey import get_original
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, NotFound
from werkzeug.utils import redirect
from werkzeug.wrappers import Response

from .figures import Figures
from .files import file_response
from .pages import (
    COLUMNS,
    Entry,
    WSGIEnviron,
    entry,
    error_page,
    figures_page,
    headings,
    page,
    shown,
)

WSGIApp = Callable[[WSGIEnviron, Callable[..., Any]], Iterable[bytes]]

#: "GET http://host/path", which a server has to understand too (RFC 9112); pywsgi leaves it as is.
ABSOLUTE_FORM = re.compile(r"https?://[^/]+(/.*)?", re.IGNORECASE | re.DOTALL)

#: gevent's own puts off closing to the next turn of its loop, for the sake of watchers, which ours
#: never have; a directory full of symlinks would use up all the descriptors before that.
close_now: Callable[[int], None] = get_original("os", "close")


def make_app(
    root: str | os.PathLike[str], follow_symlinks: bool = False, figures: Figures | None = None
) -> WSGIApp:
    """Return the WSGI application that serves *root*.

    Another server's ``wsgi.file_wrapper`` must stop at Content-Length, as PEP 3333 wants it to.
    """
    return FileServer(root, follow_symlinks, figures or Figures())


class FileServer:
    """The WSGI application."""

    def __init__(
        self, root: str | os.PathLike[str], follow_symlinks: bool, figures: Figures
    ) -> None:
        self.root = os.path.realpath(root)
        self.follow_symlinks = follow_symlinks
        self.figures = figures

    def __call__(self, environ: WSGIEnviron, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request, as WSGI has it."""
        try:
            response = self.respond(environ)
        except HTTPException as error:
            response = error_page(error, environ)
        response.headers["X-Content-Type-Options"] = "nosniff"
        # For a file this returns ``response.response`` itself, which is what the server looks at.
        return response(environ, start_response)

    def respond(self, environ: WSGIEnviron) -> Response:
        """Return the answer to a request. Raises HTTPException for one that is an error."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        if absolute := ABSOLUTE_FORM.fullmatch(environ["PATH_INFO"]):
            environ["PATH_INFO"] = absolute[1] or "/"
        url_path = environ["PATH_INFO"]
        if url_path == "/.stats":
            return figures_page(environ, self.figures.workers)
        if url_path == "/.stats.json":
            return self.figures_json()
        parts = path_parts(url_path)
        with self.pinned(os.path.join(self.root, *parts)) as (handle, status):
            if stat.S_ISDIR(status.st_mode):
                if not url_path.endswith("/"):
                    return redirect_to_directory(environ)
                return self.listing(environ, handle, parts)
            if not stat.S_ISREG(status.st_mode) or url_path.endswith("/"):
                raise NotFound
            return file_response(environ, handle, parts[-1])

    def figures_json(self) -> Response:
        """Return the figures of all workers together."""
        response = Response(json.dumps(self.figures.watch()), mimetype="application/json")
        response.cache_control.no_store = True
        return response

    def is_allowed(self, real_path: str) -> bool:
        """Say whether what is there, symlinks resolved, may be served."""
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
        """Turn the errors of opening *path* into those of HTTP."""
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
        """Return the page about a directory."""
        entries, left_out = self.entries(handle)
        # werkzeug's own parser fails where the percent signs have been left out.
        arguments = dict(parse_qsl(environ.get("QUERY_STRING", "")))
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
        """Return the status of what an item of a directory leads to."""
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
    """Return the answer to a request for a directory without the slash at the end."""
    path = environ.get("SCRIPT_NAME", "") + environ["PATH_INFO"]
    location = quote(path.encode("latin-1")) + "/"
    if environ.get("QUERY_STRING"):
        location += "?" + quote(environ["QUERY_STRING"].encode("latin-1"), safe="%=&+;,/:?@!$'()*~")
    return redirect(location, 308)
