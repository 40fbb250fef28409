"""The answer to a request for a file: what is sent of it, and whether anything is."""

from __future__ import annotations

import errno
import mimetypes
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from werkzeug.datastructures import Range
from werkzeug.exceptions import PreconditionFailed, RequestedRangeNotSatisfiable
from werkzeug.http import is_resource_modified, parse_date, parse_etags, parse_range_header
from werkzeug.wrappers import Response

from .pages import WSGIEnviron, moment

PIECE = 64 * 1024

#: "x.tar.gz" is served as the gzip file it is: with a Content-Encoding, clients would unpack it.
COMPRESSED_TYPES = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "xz": "application/x-xz",
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
        """Close the file."""
        self.file.close()


def file_response(environ: WSGIEnviron, path: str, name: str) -> Response:
    """Return the answer to a request for the file at *path*, which is called *name*."""
    file = open(path, "rb")  # noqa: SIM115 - the server closes it, with the response
    try:
        return conditional_response(environ, file, content_type(name))
    except BaseException:
        file.close()
        raise


def conditional_response(environ: WSGIEnviron, file: BinaryIO, mimetype: str) -> Response:
    """Return the answer with *file*, a part of it, or none of it; it closes the file."""
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
    """Say whether the client's part, if it has one, is of this version of the file."""
    return "HTTP_IF_RANGE" not in environ or not is_resource_modified(
        environ,
        response.headers["ETag"],
        last_modified=response.headers.get("Last-Modified"),
        ignore_if_range=False,
    )


def content_type(name: str) -> str:
    """Return the media type of a file with that name."""
    # "./" keeps guess_type from taking "data:..." for a URL.
    mimetype, encoding = mimetypes.guess_type("./" + name)
    if encoding is not None:
        mimetype = COMPRESSED_TYPES.get(encoding)
    return mimetype or "application/octet-stream"
