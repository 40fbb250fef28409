"""Which kind of end an object is, or why the original function has to take it.

Only exact types are taken, because ``fileno()`` proves nothing: that of a ``GzipFile`` leads to
other bytes than its ``read``, a subclass may override ``read``, an instance may have its own. An
object is one or two layers of :mod:`io` (a buffer over a raw file), perhaps inside a wrapper that
only delegates; each layer is checked. Nothing is imported to recognise a type: until somebody
imports the module that defines it, there is no object of that type.
"""

from __future__ import annotations

import io
import os
import socket as stdlib_socket
import stat
import sys
from collections.abc import Callable
from socket import AF_INET, AF_INET6, SOCK_STREAM
from typing import Any, Final

from gevent.hub import MAIN_THREAD_IDENT
from gevent.monkey import get_original
from gevent.socket import socket as GeventSocket

from .._os.hub import hub_to_serve
from .._os.linux import AF_UNIX, F_GETFL, LINUX, fcntl
from .body import Body
from .end import End
from .exact_type import FILE_METHODS, by_name, overrides_nothing
from .file import File
from .pipe import CallersPipe
from .request_body import INPUTS, GunicornBody, RequestBody
from .response_body import body_of, response_behind
from .small import SMALL_BODY
from .socket import Socket

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")

SocketIO: Any = stdlib_socket.SocketIO  # with its private attributes

_BUFFER: Final = "buffer"
_RAW: Final = "raw"
_RESPONSE: Final = "response"
_WRITER: Final = "writer"

#: The role of each type taken: a buffer, a raw file, an HTTP response, the body of a request, an
#: unbuffered writer to a socket; for a wrapper, the attribute in which it keeps what it wraps.
_known: Final[dict[type, str]] = {
    io.BufferedReader: _BUFFER,
    io.BufferedWriter: _BUFFER,
    io.BufferedRandom: _BUFFER,
    io.FileIO: _RAW,
    SocketIO: _RAW,
    # Common, and never taken: to look these up by name as well would take half a microsecond.
    io.BytesIO: "",
    io.StringIO: "",
}

#: The role of each kind of request's body.
_REQUESTS: Final = {".".join(name): kind for name, kind in INPUTS.items()}

#: The same by module and name, for types whose modules may not have been imported.
_BY_NAME: Final = {
    ("gevent._fileobjectposix", "GreenFileDescriptorIO"): _RAW,
    ("gevent._fileobjectcommon", "FileIO"): _RAW,
    ("gevent._fileobjectposix", "FileObjectPosix"): "io",
    ("gevent._fileobjectcommon", "FileObjectBlock"): "io",
    ("django.core.files.base", "File"): "file",
    ("django.core.files.uploadedfile", "TemporaryUploadedFile"): "file",
    ("django.db.models.fields.files", "FieldFile"): "file",
    ("tempfile", "_TemporaryFileWrapper"): "file",
    ("http.client", "HTTPResponse"): _RESPONSE,
    ("urllib3.response", "HTTPResponse"): _RESPONSE,
    **{name: ".".join(name) for name in INPUTS},
    ("socketserver", "_SocketWriter"): _WRITER,
}

#: The roles other than wrappers.
_ENDS: Final = frozenset({_BUFFER, _RAW, _RESPONSE, _WRITER, *_REQUESTS})

_SOCKET_METHODS: Final = frozenset(
    {
        "send",
        "sendall",
        "sendmsg",
        "sendto",
        "recv",
        "recv_into",
        "recvfrom",
        "recvfrom_into",
        "recvmsg",
        "recvmsg_into",
        "_sendfile_use_send",
        "_check_sendfile_params",
        "_wait",
        "fileno",
        "gettimeout",
        "timeout",
        "type",
        "__getattr__",
        "__getattribute__",
    }
)

_FAMILIES: Final = frozenset({AF_INET, AF_INET6, AF_UNIX})


class NotOurs(Exception):
    """The original function has to take the object; ``args[0]`` is the reason, as it is counted."""


def refusal_at_sight(src: Any, dst: Any) -> str | None:
    """Return why the original has to copy from *src* to *dst*; None: only source() and sink() tell.

    Looks at their types, and at the length that a response or a request declares. Most objects
    that programs copy are none of ours, or too small, and must not pay for more.
    """
    role = _role(type(src))
    if role is None:
        return "source_type"
    if role is _RESPONSE:
        reason = _response_at_sight(src.__dict__)
        if reason is not None:
            return reason
    elif role in _REQUESTS:
        declared = _REQUESTS[role].declared(src)
        if declared is not None and declared <= SMALL_BODY:
            return "small"
    return "destination_type" if _role(type(dst)) is None else None


def _response_at_sight(fields: dict[str, Any]) -> str | None:
    """Return why a response with these attributes is not taken; None if they don't tell."""
    length = fields.get("length", fields.get("length_remaining"))  # http.client's, urllib3's
    if type(length) is int and length <= SMALL_BODY:
        return "small" if length > 0 else "body"
    if fields.get("chunked") is True:
        return "body"
    file = fields.get("fp")
    if type(file) is io.BufferedReader and type(file.raw) is SocketIO:
        ssl = sys.modules.get("gevent.ssl")
        if ssl is not None and type(file.raw._sock) is getattr(ssl, "SSLSocket", None):
            return "socket_type"
    return None


def is_known(cls: type) -> bool:
    """Return whether objects of this type may be ours."""
    return _role(cls) is not None


def is_socket_writer(cls: type) -> bool:
    """Return whether an object of this type only writes to a socket, of whatever type that is."""
    return cls is SocketIO or _role(cls) is _WRITER


def source(obj: Any) -> End:
    """Return the end that *obj* reads from. Raises NotOurs."""
    role = _role(type(obj))
    if role is _RESPONSE:
        return _response(obj)
    if role in _REQUESTS:
        return _request(obj, _REQUESTS[role])
    buffer, raw = _layers(obj, role, "source_type")
    if not buffer.readable():
        raise NotOurs("source_type")
    if type(raw) is SocketIO and raw._timeout_occurred:
        raise NotOurs("timed_out")  # it refuses every further read
    return _endpoint(buffer, raw, "source_type")


def sink(obj: Any) -> End:
    """Return the end that *obj* writes to. Raises NotOurs."""
    role = _role(type(obj))
    if role is _WRITER and overrides_nothing(obj):
        return stream_socket(obj._sock)
    if role in (_RESPONSE, _WRITER) or role in _REQUESTS:
        raise NotOurs("destination_type")
    buffer, raw = _layers(obj, role, "destination_type")
    if not buffer.writable():
        raise NotOurs("destination_type")
    end = _endpoint(buffer, raw, "destination_type")
    end.is_sink = True
    if type(end) is File:
        _check_sink(end.fileno())
    return end


def _check_sink(fd: int) -> None:
    """Raise NotOurs if others are likely to write at the same position of this regular file.

    write(2) locks the position for that, copy_file_range(2) and splice(2) do not.
    """
    if fd <= 2:  # child processes write to it as well
        raise NotOurs("standard_stream")
    if hub_to_serve() is None and _get_ident() != MAIN_THREAD_IDENT:  # one of many threads
        raise NotOurs("other_hub")
    if fcntl(fd, F_GETFL) & os.O_APPEND:
        raise NotOurs("append")  # splice(2): EINVAL


def check_different_files(src: End, dst: End) -> None:
    """Raise NotOurs if the ends are files that can't be copied here.

    That is one file twice, since both objects may have buffered it; and files of two filesystems
    if there is no hub, since the pipe between them would make one.
    """
    if not (isinstance(src, File) and isinstance(dst, File)):
        return
    if src.is_same_file(dst):
        raise NotOurs("same_file")
    if src.status.st_dev != dst.status.st_dev and hub_to_serve() is None:
        raise NotOurs("other_hub")


def regular_file(obj: Any) -> File:
    """Return the end that *obj* reads from, a regular file. Raises NotOurs if it is none."""
    end = source(obj)
    if type(end) is not File:
        raise NotOurs("source_type")
    return end


def stream_socket(sock: Any) -> Socket:
    """Return the end of *sock*, a socket object. Raises NotOurs."""
    _check_socket(sock)
    return Socket(None, None, sock)


def _response(obj: Any) -> Body:
    """Return the body of the response *obj*. Raises NotOurs."""
    response = response_behind(obj)
    if response is None:
        raise NotOurs("body")
    if response.length is not None and response.length <= SMALL_BODY:
        raise NotOurs("small")
    end = source(response.fp)
    if type(end) is not Socket:
        raise NotOurs("source_type")
    return body_of(obj, response, end)


def _request(obj: Any, kind: type[RequestBody]) -> Body:
    """Return the body of a request, of which *obj* is the ``wsgi.input``. Raises NotOurs."""
    behind = kind.inner_of(obj)
    if behind is None:
        raise NotOurs("body")
    end = stream_socket(behind) if kind is GunicornBody else source(behind)
    if not isinstance(end, kind.inner_type):
        raise NotOurs("source_type")
    body = kind(end, obj)
    if body.remaining() <= SMALL_BODY:
        raise NotOurs("small")
    return body


def _layers(obj: Any, role: str | None, reason: str) -> tuple[Any, Any]:
    """Return the buffer of *obj*, or else its raw file, and its raw file. Raises NotOurs."""
    while role is not None and role not in _ENDS:
        obj = _unwrap(obj, role, reason)
        role = _role(type(obj))
    raw = obj
    if role is _BUFFER:
        if not overrides_nothing(obj):
            raise NotOurs(reason)
        raw = obj.raw  # None if it was detached
        role = _role(type(raw))
    if role is not _RAW or not overrides_nothing(raw):
        raise NotOurs(reason)
    if raw.closed:
        raise NotOurs("closed")
    return obj, raw


def _role(cls: type) -> str | None:
    if not LINUX:
        return None
    try:
        role = _known.get(cls)
    except TypeError:  # a class that can't be hashed
        return None
    if role is None:
        role = by_name(cls, _BY_NAME)
        if role is not None:
            _known[cls] = role
    return role or None


def _unwrap(obj: Any, attribute: str, reason: str) -> Any:
    """Return what the wrapper *obj* delegates to, if all it does is delegate."""
    inner = getattr(obj, attribute)
    for name in FILE_METHODS & obj.__dict__.keys():
        method, behind = obj.__dict__[name], getattr(inner, name, None)
        if method != behind and not _is_tempfile_closure(type(obj), method, behind):
            raise NotOurs(reason)
    return inner


def _is_tempfile_closure(cls: Any, method: Any, behind: Any) -> bool:
    """Return whether *method* is the closure that tempfile's wrapper keeps around *behind*."""
    return (
        cls.__module__ == "tempfile"
        and getattr(method, "__code__", None) in cls.__getattr__.__code__.co_consts
        and method.__wrapped__ == behind
    )


def _endpoint(buffer: Any, raw: Any, reason: str) -> End:
    if type(raw) is SocketIO:
        _check_socket(raw._sock)
        return Socket(buffer, raw, raw._sock)
    try:
        status = os.fstat(raw.fileno())
    except OSError:
        raise NotOurs("closed") from None  # by os.close(), unknown to the object
    if stat.S_ISREG(status.st_mode):
        try:
            os.lseek(raw.fileno(), 0, os.SEEK_CUR)
        except OSError:  # a file of the kernel's that is read like a pipe
            raise NotOurs(reason) from None
        return File(buffer, raw, status)
    if not stat.S_ISFIFO(status.st_mode):
        raise NotOurs(reason)
    hub = hub_to_serve()
    if hub is None or getattr(raw, "hub", hub) is not hub:
        raise NotOurs("other_hub")
    if isinstance(raw, io.FileIO) and fcntl(raw.fileno(), F_GETFL) & os.O_NONBLOCK:
        raise NotOurs("nonblocking")  # its read() returns None where we would wait
    return CallersPipe(buffer, raw)


def _check_socket(sock: Any) -> None:
    """Raise NotOurs unless *sock* is a plain gevent stream socket that we can wait for."""
    if not LINUX or (type(sock) is not GeventSocket and not _changes_nothing(sock)):
        raise NotOurs("socket_type")
    native = sock._sock
    fileno = native.fileno()
    if fileno < 0:
        raise NotOurs("closed")
    if native.type != SOCK_STREAM or native.family not in _FAMILIES:
        raise NotOurs("socket_type")  # splice(2) would lose the boundaries of messages
    if sock.timeout == 0.0:
        raise NotOurs("nonblocking")
    if sock.hub is not hub_to_serve():
        raise NotOurs("other_hub")
    if not fcntl(fileno, F_GETFL) & os.O_NONBLOCK:
        raise NotOurs("blocking")  # splice(2) would block in spite of SPLICE_F_NONBLOCK


def _changes_nothing(sock: Any) -> bool:
    """Return whether *sock* is of a subclass of gevent's socket that sends and receives like it."""
    mro = type(sock).__mro__
    if GeventSocket not in mro or not _SOCKET_METHODS.isdisjoint(getattr(sock, "__dict__", ())):
        return False
    added = mro[: mro.index(GeventSocket)]
    return all(_SOCKET_METHODS.isdisjoint(cls.__dict__) for cls in added)
