"""How a handler of ``gevent.pywsgi`` sends: at once, and in as few segments as that allows.

pywsgi sends the headers, and then what the application gives, each with a send of its own. The
second waits for the client's acknowledgement of the first (Nagle's algorithm), which the client
delays by 40 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any, Final

from .._ends.recognise import NotOurs, stream_socket
from ..config import KiB, MiB

#: Methods through which a handler sends its response. One that overrides any of these has to see
#: every byte.
_SENDERS = frozenset({"write", "_write", "_sendall", "_write_with_headers"})

#: The attribute in which a handler without a way of its own to send keeps its socket, if that is a
#: plain one of TCP. It may get another under way, as for TLS.
_PLAIN: Final = "_gsplice_plain"

#: Up to this size, pieces are copied into one for one send. At 64 KiB that saves 10 us of 140, at
#: 200 KiB nothing any more.
JOINED: Final = 64 * KiB

#: Up to this size, headers and what follows are copied into one for send(2), which takes less than
#: sendmsg(2) then.
COPIED: Final = 4 * KiB

#: Most that is sent by one send(2): as much as gevent sends at once, so that others get their turn.
AT_ONCE: Final = 1 * MiB


def send_at_once(handler: Any, handler_class: Any) -> None:
    """Have all that *handler* sends leave at once, if it is on a plain TCP connection.

    Also what has no part in a response: the last piece of a file, what a websocket sends.
    """
    try:
        stream_socket(handler.socket)
        handler.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    except (NotOurs, OSError):
        return  # a TLS or Unix socket, or a closed one
    if not overrides_a_sender(handler, handler_class):
        setattr(handler, _PLAIN, handler.socket)


def overrides_a_sender(handler: Any, handler_class: Any) -> bool:
    """Return whether *handler* has its own way to send, which has to see every byte."""
    return not handler.__dict__.keys().isdisjoint(_SENDERS) or any(
        getattr(type(handler), name) is not getattr(handler_class, name) for name in _SENDERS
    )


def is_plain(handler: Any) -> bool:
    """Return whether what *handler* sends goes to its TCP socket as it is."""
    return handler.__dict__.get(_PLAIN, handler) is handler.socket


def joins(handler: Any) -> bool:
    """Return whether nobody but the client sees in how many pieces *handler* sends."""
    return is_plain(handler) and handler.__dict__.keys().isdisjoint(_SENDERS)


def collect(handler: Any, write: Callable[..., None], *args: Any) -> list[bytes]:
    """Return the pieces that *write* would send by *handler*."""
    pieces: list[bytes] = []
    handler._sendall = pieces.append
    try:
        write(*args)
    finally:
        del handler._sendall
    return pieces


def send_together(handler: Any, pieces: Sequence[bytes]) -> None:
    """Send *pieces* with one send, as far as the socket takes them.

    Lets out the errors of the socket. These are recorded, and is counted what has been sent, as if
    the pieces had been sent one by one.
    """
    size = sum(map(len, pieces))
    sock = handler.socket._sock
    if size <= COPIED:
        sent = send_some(handler, sock.send, b"".join(pieces))
    else:
        sent = send_some(handler, sock.sendmsg, pieces)
    if sent == size:
        handler.response_length += size
        return
    for piece in pieces:
        if sent < len(piece):
            handler._sendall(piece[sent:])
            handler.response_length += sent
            sent = 0
        else:
            handler.response_length += len(piece)
            sent -= len(piece)


def send_some(handler: Any, send: Callable[..., int], *args: Any) -> int:
    """Return how many bytes ``send(*args)`` has sent now. Lets out its errors, recorded."""
    try:
        sent = send(*args)
    except BlockingIOError:
        return 0
    except OSError as err:
        record(handler, err)
        raise
    return sent


def record(handler: Any, err: OSError) -> None:
    """Record an error of the socket in *handler*, as its own sends do."""
    handler.status = f"socket error: {err}"
    if handler.code > 0:
        handler.code = -handler.code


def has_pieces(result: Any) -> bool:
    """Return whether *result* consists of several pieces, all of which are there already."""
    return (
        type(result) in (list, tuple)
        and len(result) > 1
        and all(type(piece) is bytes for piece in result)
    )


def in_fewer_pieces(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the same bytes, in as few pieces as are worth copying, none of them empty."""
    together: list[bytes] = []
    size = 0
    for piece in pieces:
        if size and size + len(piece) > JOINED:
            yield b"".join(together)
            together, size = [], 0
        together.append(piece)
        size += len(piece)
    if size:
        yield b"".join(together)
