"""HTTP responses from a server that follows a script, and all that can be seen after a download."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import http.client
import shutil
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import counting, some_bytes
from ends import GUARD, KiB, MiB, connection, until
from gevent.monkey import get_original

from gsplice._ends import recognise

SOL_SOCKET, SO_LINGER = gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER

CONTENT = some_bytes(4 * MiB)

#: What the second response on a connection is.
SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond"

SIZES = sorted({size + more for size in (8 * KiB, 64 * KiB, 1 * MiB) for more in (-1, 0, 1)})


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bodies go the fast way as well, but for the tests that say so."""
    monkeypatch.setattr(recognise, "SMALL_BODY", 0)


def original(*args: Any) -> None:
    get_original("shutil", "copyfileobj")(*args)


def patched(*args: Any) -> None:
    shutil.copyfileobj(*args)


def head(size: int | None, *more: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    lines = [f"HTTP/{version} {status}", *more]
    if size is not None:
        lines.append(f"Content-Length: {size}")
    return "\r\n".join([*lines, "", ""]).encode()


def chunked(data: bytes) -> bytes:
    pieces = (data[at : at + 30_000] for at in range(0, len(data), 30_000))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Script:
    """What the server does: each request gets the pieces of one answer."""

    answers: tuple[tuple[bytes, ...], ...]
    #: What it does then: "close", "reset", or "stall" for ever.
    finally_: str = "close"
    #: Whether each piece is sent when the client has received the one before.
    one_by_one: bool = False

    def serve(self, sock: Any) -> None:
        with contextlib.suppress(OSError):
            for answer in self.answers:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    received = sock.recv(4096)
                    if not received:
                        return
                    request += received
                for piece in answer:
                    if self.one_by_one:
                        until(lambda: not unacknowledged(sock))
                    sock.sendall(piece)
                    gevent.sleep(0.005)  # so that the client may have to wait in between
            if self.finally_ == "stall":
                gevent.sleep(GUARD)
            elif self.finally_ == "reset":
                until(lambda: not unacknowledged(sock))  # which a reset would take back
                sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def unacknowledged(sock: Any) -> int:
    """Return how many bytes the peer has not got yet (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class Client(contextlib.ExitStack):
    """A connection to a server that follows a script, and files to copy to."""

    def __init__(self, directory: Path, script: Script, timeout: float | None = None) -> None:
        super().__init__()
        self.path = directory / "copy"
        ours, theirs = connection()
        server = gevent.spawn(script.serve, theirs)
        self.sock = ours
        ours.settimeout(timeout)
        self.connection = http.client.HTTPConnection("test")
        self.connection.auto_open = 0  # no second try by a connection of its own
        self.connection.sock = ours
        self.callback(theirs.close)
        self.callback(seen, self.connection.close)
        self.callback(server.kill)

    def get(self, method: str = "GET") -> http.client.HTTPResponse:
        self.connection.request(method, "/")
        return self.connection.getresponse()

    def sink(self) -> Any:
        return self.enter_context(open(self.path, "wb"))


def seen(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call, or the class and the number of what it raised."""
    try:
        return function(*args)
    except Exception as err:  # noqa: BLE001 - whatever it is, the other must raise it too
        return type(err), getattr(err, "errno", None)


def state(response: http.client.HTTPResponse) -> dict[str, Any]:
    return {
        "length": response.length,
        "closed": response.closed,
        "isclosed": response.isclosed(),
        "fp": response.fp is None,
        "then": response.read() if response.isclosed() else None,
    }


def download(
    copy: Callable[..., None],
    directory: Path,
    script: Script,
    method: str = "GET",
    before: Callable[[Any], Any] = lambda response: None,
    length: int = 0,
) -> dict[str, Any]:
    """Copy the response to a file, and tell all that can be seen then."""
    with gevent.Timeout(GUARD), Client(directory, script) as client:
        response = client.get(method)
        result: dict[str, Any] = {"before": before(response)}
        sink = client.sink()
        result["error"] = seen(copy, response, sink, length)
        result |= state(response)
        sink.close()
        result["arrived"] = client.path.read_bytes()

        def second() -> tuple[int, bytes]:
            response = client.get()
            return response.status, response.read()

        result["second"] = seen(second)
        return result


def compare(
    directory: Path, script: Script, *, fast: int | None, reason: str = "body", **options: Any
) -> dict[str, Any]:
    """Check that both copies leave the same; *fast*: the bytes moved by gsplice, None: all."""
    wanted = download(original, directory, script, **options)
    with counting() as grown:
        got = download(patched, directory, script, **options)
    assert got == wanted
    if fast is None:
        fast = len(wanted["arrived"])
    assert grown.bytes_spliced + grown.bytes_copied == fast
    assert grown.fallbacks == ({} if fast else {reason: 1})
    return wanted


def answers(*first: bytes) -> tuple[tuple[bytes, ...], ...]:
    return first, (SECOND,)


CRLF = b"\r\n"

#: Bodies that end on a multiple of every size in which they are read, and near one.
AROUND = sorted({size + more for size in (64 * KiB, 2 * MiB, 3 * MiB) for more in (-1, 0, 1, 77)})


def and_more(size: int, more: bytes, *before: bytes, tail: int = 100) -> Script:
    """Send *more* after a body, together with its *tail*, which comes late."""
    body = CONTENT[:size]
    pieces = (*before, head(size), body[:-tail], body[-tail:] + more)
    return Script(answers(*pieces), one_by_one=True)
