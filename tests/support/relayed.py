"""A client and a server with a relay between them."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
from conftest import (
    digest,
    receiver,
)
from ends import GUARD, MiB, connection, is_waited_for, until

import gsplice

#: As in Go's TestSplice: the kinds of the two connections.
KINDS = ["tcp-to-tcp", "unix-to-tcp", "tcp-to-unix", "unix-to-unix"]
BIG = 5 * MiB + 7


class OwnRecv(gevent.socket.socket):
    """A socket that is used through its methods."""

    def recv(self, *args: Any) -> bytes:
        return super().recv(*args)


class Relayed(contextlib.ExitStack):
    """A client and a server, with a relay between them: ``client - a : b - server``."""

    def __init__(self, kinds: str = "tcp-to-tcp", buffers: int | None = None, **options: Any):
        super().__init__()
        kind_a, kind_b = kinds.split("-to-")
        self.client, self.a = connection(kind_a, buffers)
        self.b, self.server = connection(kind_b, buffers)
        for sock in (self.client, self.a, self.b, self.server):
            self.callback(sock.close)
        self.options = options

    def start(self) -> gevent.Greenlet:
        self.relay = gevent.spawn(gsplice.relay, self.a, self.b, **self.options)
        self.callback(self.relay.kill)
        return self.relay

    def waiting(self) -> Relayed:
        """Wait until both directions wait for their sources."""
        until(lambda: is_waited_for(self.a, "read") and is_waited_for(self.b, "read"))
        return self

    def __enter__(self) -> Relayed:
        self.start()
        return self

    def result(self) -> Any:
        return self.relay.get(timeout=GUARD)

    def error(self) -> BaseException:
        """Wait for the relay to fail; check that nothing is at work any more."""
        self.relay.join(GUARD)
        assert self.relay.dead
        assert self.relay.exception is not None
        for sock in (self.a, self.b):
            for event in (sock._read_event, sock._write_event):
                assert event is None or event.callback is None
        assert gsplice.stats().pipes_in_use == 0
        return self.relay.exception


def reset(sock: Any) -> None:
    """Close a TCP socket with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_and_end(sock: Any, data: bytes) -> None:
    """Send all of *data*, then end."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def exchange(relayed: Relayed, forth: bytes, back: bytes) -> None:
    """Send both ways at once, end both, and pass if all has arrived."""
    arrived = [receiver(relayed.server), receiver(relayed.client)]
    senders = [
        gevent.spawn(send_and_end, relayed.client, forth),
        gevent.spawn(send_and_end, relayed.server, back),
    ]
    gevent.joinall(senders, timeout=GUARD, raise_error=True)
    assert [digest(each.get(timeout=GUARD)) for each in arrived] == [digest(forth), digest(back)]
    assert relayed.result() == (len(forth), len(back))


def feed(sock: Any, data: bytes) -> None:
    """Send all of *data*, then end, if the other side lets us."""
    with contextlib.suppress(OSError):
        send_and_end(sock, data)
