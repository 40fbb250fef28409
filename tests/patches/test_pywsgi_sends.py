"""What pywsgi sends with gsplice leaves at once, and in as few segments as that allows."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.socket
import gevent.ssl
import pytest
from answers import APPS, FILE
from conftest import receive_all
from ends import GUARD
from gevent import pywsgi
from unpatched import unpatched
from wsgi import request, split

IPPROTO_TCP, TCP_NODELAY = gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY
TCP_INFO, TCP_QUICKACK = 11, 12  # linux/tcp.h

#: How many bytes have been written to a TCP socket that have not left yet (linux/sockios.h).
SIOCOUTQNSD = 0x894B


class Watched(pywsgi.WSGIHandler):
    """Notes how much has not left when a response has been sent."""

    unsent: list[int]

    def log_request(self) -> None:
        self.unsent.append(not_left(self.socket))


def not_left(sock: Any) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), SIOCOUTQNSD, bytes(4)), sys.byteorder)


def segments_in(sock: Any) -> int:
    """Return how many segments with data have come (tcpi_data_segs_in)."""
    return int.from_bytes(sock.getsockopt(IPPROTO_TCP, TCP_INFO, 232)[152:156], sys.byteorder)


def acknowledge_late(sock: Any) -> None:
    """Have the client's system wait, as it usually does, before it says what has come."""
    sock.setsockopt(IPPROTO_TCP, TCP_QUICKACK, 0)


#: Of each kind: what its body looks like on the wire, and the segments it comes in.
WIRE: dict[str, tuple[bytes, int]] = {
    "list": (b"body", 1),
    "list, length declared": (b"body", 1),
    "empty list": (b"", 1),
    "several pieces": (b"first second third", 1),
    "tuple": (b"first second third", 1),
    "many pieces": (b"a piece " * 1000, 1),
    "404": (b"not here", 1),
    "204": (b"", 1),
    "304": (b"", 1),
    "chunked": (b"4\r\nbody\r\n0\r\n\r\n", 2),
    "chunked, several": (b"6\r\nfirst \r\n7\r\nsecond \r\n5\r\nthird\r\n0\r\n\r\n", 4),
    "iterator, length declared": (b"first second third", 3),
    "write": (b"4\r\nbody\r\n0\r\n\r\n", 2),
    "write, length declared": (b"firstsecondthird", 3),
    "file": (FILE.read_bytes(), 1),
}


@pytest.mark.parametrize("kind", WIRE)
def test_a_response_leaves_at_once_in_as_few_segments_as_it_has_pieces(
    serve: Any, kind: str
) -> None:
    body, number = WIRE[kind]
    Watched.unsent = []
    in_more = 0
    with gevent.Timeout(GUARD), serve(APPS[kind], Watched).connect() as sock:
        for _ in range(20):
            before = segments_in(sock)
            sock.sendall(request(close=False).encode())
            acknowledge_late(sock)
            received = b""
            while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < len(
                body
            ):
                received += sock.recv(65536)
            assert split(received)[2] == body
            in_more += segments_in(sock) - before > number  # two may be made one on the way
    assert in_more <= 3  # the kernel may send one again while it waits for the acknowledgement
    assert Watched.unsent == [0] * 20


@pytest.mark.parametrize("how", ["chunked", "declared", "write"])
def test_each_piece_of_a_stream_leaves_before_the_next_is_there(serve: Any, how: str) -> None:
    """Server-sent events: the client sees one, and only then there is another."""
    seen = gevent.event.Event()
    unsent = []

    def events(sock: Any) -> Iterator[bytes]:
        for number in range(20):
            yield b"data: %02d\n\n" % number
            unsent.append(not_left(sock))
            assert seen.wait(GUARD)
            seen.clear()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        sock = environ["wsgi.input"].rfile.raw._sock
        headers = [("Content-Length", "220")] if how == "declared" else []
        write = start_response("200 OK", [("Content-Type", "text/event-stream"), *headers])
        if how != "write":
            return events(sock)
        for event in events(sock):
            write(event)
        return []

    with gevent.Timeout(GUARD), serve(app).connect() as sock:
        sock.sendall(request().encode())
        received = b""
        for number in range(20):
            acknowledge_late(sock)
            while b"data: %02d\n\n" % number not in received:
                received += sock.recv(65536)
            seen.set()
        receive_all(sock)
    # The first of them is noted when it has been written, by whoever asks for the next.
    assert unsent[:20] == [0] * 20


def option_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """Answer with whether the connection holds nothing back."""
    start_response("200 OK", [])
    sock = environ["wsgi.input"].rfile.raw._sock
    return [str(sock.getsockopt(IPPROTO_TCP, TCP_NODELAY)).encode()]


def test_without_gsplice_pywsgi_does_not_ask_for_it(serve: Any) -> None:
    assert split(serve(option_app).ask(request()))[2] != b"0"
    with unpatched():
        assert split(serve(option_app).ask(request()))[2] == b"0"
