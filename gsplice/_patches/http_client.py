"""Request bodies that are files: of :mod:`http.client`, and of urllib3, which has its own loop.

So do urllib, requests, and what else is built on these, over plain HTTP. A connection reads such a
body in pieces of 8 or 16 KiB and sends each; here the file goes by ``sendfile``, from where it
stands to its end, like there.
"""

from __future__ import annotations

import sys
from types import FunctionType, SimpleNamespace
from typing import Any, Final

from .._counters import counters
from .._ends.recognise import NotOurs, is_known, regular_file, stream_socket
from .socket_sendfile import sendfile

#: The methods that are replaced, of http.client's connection and of urllib3's.
NAMES: Final = ["send", "_send_output"]
URLLIB3_NAMES: Final = ["request"]

#: The modules whose ``send()`` passes a file on as it is.
_KNOWN_SENDERS: Final = ("http.client", "urllib3.connection", "botocore.awsrequest")


def replacements(connection_class: Any) -> SimpleNamespace:
    """Return the replacements for methods of *connection_class*, http.client's HTTPConnection."""
    originals: dict[str, Any] = {name: getattr(connection_class, name) for name in NAMES}

    def send(self: Any, data: Any) -> None:
        if type(data) is bytes or not _sends_by_kernel(self, data, originals["send"]):
            originals["send"](self, data)

    def _send_output(self: Any, message_body: Any = None, encode_chunked: bool = False) -> None:
        if (
            encode_chunked
            or not _is_file_body(self, message_body)
            or not _is_function_of(originals["_send_output"], "http.client")
        ):
            originals["_send_output"](self, message_body, encode_chunked)
        else:
            originals["_send_output"](self)  # the headers
            self.send(message_body)

    return _namespace(NAMES, originals, connection_class, send, _send_output)


def urllib3_replacements(connection_class: Any) -> SimpleNamespace:
    """Return the replacements for methods of *connection_class*, urllib3's HTTPConnection."""
    originals: dict[str, Any] = {name: getattr(connection_class, name) for name in URLLIB3_NAMES}

    def request(
        self: Any, method: str, url: str, body: Any = None, headers: Any = None, **options: Any
    ) -> None:
        if (
            options.get("chunked")
            or not _is_file_body(self, body)
            or not _declares_length(headers)
            or not _sends_body_itself(originals["request"])
        ):
            originals["request"](self, method, url, body, headers, **options)
        else:
            originals["request"](self, method, url, None, headers, **options)
            self.send(body)

    return _namespace(URLLIB3_NAMES, originals, connection_class, request)


def _namespace(names: Any, originals: Any, cls: Any, *functions: Any) -> SimpleNamespace:
    for function in functions:
        function.__doc__ = originals[function.__name__].__doc__
        function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
        function.originals = originals
    return SimpleNamespace(
        __implements__=names,
        originals=originals,
        **{function.__name__: function for function in functions},
    )


def _is_file_body(connection: Any, body: Any) -> bool:
    """Return whether *body* may be given to ``send()`` as it is, which reads it if need be."""
    if body is None or type(body) is bytes or not is_known(type(body)):
        return False
    sends = [cls.__dict__["send"] for cls in type(connection).__mro__ if "send" in cls.__dict__]
    if not all(map(_passes_files_on, sends)):
        return False  # it wants to see the pieces
    try:
        regular_file(body)
    except NotOurs:
        return False
    return "send" not in vars(connection) and connection.debuglevel <= 0


def _passes_files_on(send: Any) -> bool:
    """Return whether *send* is the function of a known module, and not somebody's wrapper of it.

    A wrapper made with :func:`functools.wraps` has the ``__module__`` of what it wraps.
    """
    while getattr(send, "__globals__", None) is globals():
        send = send.originals["send"]
    return _is_function_of(send, *_KNOWN_SENDERS)


def _sends_body_itself(request: Any) -> bool:
    """Return whether *request* is urllib3's, since 2.0; before, it left the body to http.client."""
    module = "urllib3.connection"
    return _is_function_of(request, module) and hasattr(sys.modules[module], "body_to_chunks")


def _is_function_of(function: Any, *modules: str) -> bool:
    return type(function) is FunctionType and any(
        function.__globals__ is getattr(sys.modules.get(name), "__dict__", None) for name in modules
    )


def _declares_length(headers: Any) -> bool:
    """Return whether urllib3 will send the body as it is, and not in chunks."""
    if headers is None:
        return False
    names = {name.lower() for name in headers if isinstance(name, str)}
    return "content-length" in names


def _sends_by_kernel(connection: Any, data: Any, original: Any) -> bool:
    """Send the file *data* and return True; False: the original has to send it, nothing was done.

    Lets out what connecting and sending raise. An audit hook gets the file, not its pieces.
    """
    if not is_known(type(data)) or connection.debuglevel > 0 or not _passes_files_on(original):
        return False
    try:
        file = regular_file(
            data
        ).obj  # not a wrapper, which may have a mode that sendfile() refuses
        if connection.sock is None and connection.auto_open:
            connection.connect()
        if connection.sock is None:
            return False  # the original says so
        stream_socket(connection.sock)
    except NotOurs as reason:
        counters.fell_back(reason.args[0])
        return False
    sys.audit("http.client.send", connection, data)
    sendfile(connection.sock, file)
    return True
