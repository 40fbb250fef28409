"""Responses of ``gunicorn -k gevent`` that are a part of a plain file, sent by the kernel.

gunicorn calls sendfile itself for a whole file in its own wrapper. Anything else, such as a
framework's iterator over a range of a file, it would write piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

from gevent.monkey import is_object_patched

from .._counters import counters
from .._ends.exact_type import by_name
from .._ends.recognise import NotOurs, stream_socket
from .._ends.small import SMALL_FILE
from .._move.memory import read
from .._move.move import move
from .._move.transfer import Transfer
from .wrapped_results import IN_MEMORY, Pieces, look_through
from .wsgi_results import Part, file_of, find

#: The methods that are replaced.
NAMES: Final = ["handle_request"]

_RESPONSE: Final = {("gunicorn.http.wsgi", "Response"): True}
_WRAPPER: Final = {("gunicorn.http.wsgi", "FileWrapper"): True}


def replacements(worker_class: Any) -> SimpleNamespace:
    """Return the replacements for methods of *worker_class*, gunicorn's ``GeventWorker``."""
    originals: dict[str, Any] = {name: getattr(worker_class, name) for name in NAMES}
    owner = f"{worker_class.__module__}.{worker_class.__qualname__}"

    def handle_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self.wsgi) is not _Application:
            self.wsgi = _Application(self.wsgi, owner)
        return originals["handle_request"](self, *args, **kwargs)

    handle_request.__doc__ = worker_class.handle_request.__doc__
    handle_request.__qualname__ = worker_class.handle_request.__qualname__
    return SimpleNamespace(__implements__=NAMES, originals=originals, handle_request=handle_request)


class _Application:
    """The application, with its file results wrapped in a _FilePart while the worker is patched."""

    def __init__(self, app: Callable[..., Any], owner: str) -> None:
        self._app = app
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)  # for hooks that look at the worker's application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        result = self._app(environ, start_response)
        part = find(result)
        if part is not None and part.length is None and by_name(type(result), _WRAPPER):
            return result
        if not is_object_patched(self._owner, "handle_request"):
            return result
        response = getattr(start_response, "__self__", None)
        try:
            if part is not None:
                return _FilePart(response, part, result)
            return _of_wrapped(response, result)
        except NotOurs as reason:
            counters.fell_back(reason.args[0])
            return result


def _of_wrapped(response: Any, result: Any) -> Any:
    """Return the pieces of *result*, most sent by the kernel, if a file is under wrappers in it.

    Else *result* itself, if nothing could be gained. Raises NotOurs if it is large, and not taken.
    """
    if (
        type(result) in IN_MEMORY
        or not by_name(type(response), _RESPONSE)
        or (response.response_length or 0) <= SMALL_FILE
        or _omits_body(response)
    ):
        return result
    wrapped = look_through(result)
    if wrapped is None:
        return result
    if not _takes_all(response):
        raise NotOurs("response")

    def send(transfer: Transfer) -> None:
        try:
            move(transfer)
        finally:
            response.sent += transfer.delivered

    return Pieces(result, wrapped, stream_socket(response.sock), response.response_length, send)


class _FilePart:
    """A body that is *part* of a plain file: an iterator that yields nothing, but sends all.

    Its constructor raises NotOurs, and has changed nothing, if gunicorn has to send the body.
    """

    def __init__(self, response: Any, part: Part, result: Any) -> None:
        if not by_name(type(response), _RESPONSE) or not _takes_all(response):
            raise NotOurs("response")
        dst = stream_socket(response.sock)
        self._transfer = Transfer(file_of(part), dst)
        self._response = response
        self._part: Part | None = part
        most = response.response_length
        self._length: int = most if part.length is None else min(most, part.length)
        if hasattr(result, "close"):
            self.close = result.close

    def __iter__(self) -> _FilePart:
        return self

    def __next__(self) -> bytes:
        """Send headers and body, and count the bytes as gunicorn does.

        Lets out what reading and sending raise. Reads a byte before the headers are sent, so that
        gunicorn can answer with an error page if the file can't be read.
        """
        part, self._part = self._part, None
        if part is not None and self._length > 0:
            transfer = self._transfer
            transfer.limit = self._length
            transfer.src.seek(part.start, part.whence)
            try:
                read(transfer, transfer.src.offset, 1)
            finally:
                transfer.close()
            self._response.send_headers()
            try:
                move(transfer)
            finally:
                self._response.sent += transfer.delivered
        raise StopIteration


def _takes_all(response: Any) -> bool:
    """Return whether *response* would write a body unchanged, up to its declared length."""
    return (
        response.status is not None
        and response.response_length is not None
        and not _omits_body(response)
        and not response.headers_sent
        and not response.is_chunked()
        and response.can_sendfile()
        and not response.cfg.is_ssl
    )


def _omits_body(response: Any) -> bool:
    # The attribute is newer than gunicorn 22.
    return response.req.method == "HEAD" or getattr(response, "_omits_body", False)
