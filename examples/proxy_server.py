"""What tcp_proxy.py and http_connect_proxy.py share: a server that counts, and its processes.

Nothing is patched: gevent's own StreamServer and sockets are all that ``gsplice.relay`` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.server import StreamServer
from gevent.socket import create_connection
from prefork import SIGNALS, listen, prefork
from proxy_options import Address, add_options, shown

import gsplice


@dataclasses.dataclass
class Counts:
    """What has happened with one backend, or with all."""

    open: int = 0
    total: int = 0
    #: How often there was no connection to be had.
    failed: int = 0
    #: Connections that ended by an error, the idle timeout, or the end of the program.
    broken: int = 0
    #: Both count when a connection ends; gsplice's own counters do at once.
    bytes_to_backend: int = 0
    bytes_to_client: int = 0


class ProxyServer(StreamServer):
    """Has :meth:`serve` called for each connection, if there are not too many."""

    def __init__(self, listener: socket.socket, options: argparse.Namespace) -> None:
        super().__init__(listener, spawn=Pool())
        self.options = options
        self.open = self.total = self.refused = 0

    def serve(self, client: gevent.socket.socket) -> None:
        """Do what the proxy is for. After an error, the client's connection is reset."""
        raise NotImplementedError

    def counts(self) -> dict[str, Any]:
        """Return what there is to tell besides the number of clients."""
        raise NotImplementedError

    def handle(self, client: gevent.socket.socket, _address: object) -> None:
        self.total += 1
        if self.open >= self.options.max_connections:
            self.refused += 1
            reset_on_close(client)
            return
        self.open += 1
        try:
            self.serve(client)
        except BaseException as error:
            reset_on_close(client)
            if not isinstance(error, OSError):  # those are daily bread, and have been counted
                raise
        finally:
            self.open -= 1

    def connect(self, address: Address, counts: Counts) -> gevent.socket.socket:
        """Connect, in time for the look-up of the name and all its addresses together."""
        seconds = self.options.connect_timeout
        try:
            backend = gevent.with_timeout(
                seconds or None, create_connection, address, timeout_value=None
            )
            if backend is None:
                raise TimeoutError(f"no connection within {seconds:g} seconds")
        except OSError:
            counts.failed += 1
            raise
        return backend

    def forward(
        self,
        client: gevent.socket.socket,
        backend: gevent.socket.socket,
        counts: Counts,
        initial: bytes = b"",
    ) -> None:
        """Relay between the two, *initial* from the client first, until both have ended."""
        for sock in (client, backend):  # no message waits for the ACK of the one before: tcp(7)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        counts.open += 1
        counts.total += 1
        try:
            relayed = gsplice.relay(
                client,
                backend,
                idle_timeout=self.options.idle_timeout or None,
                initial=(initial, b""),
            )
        except BaseException as error:  # OSError, or GreenletExit when the grace time is over
            relayed = error.relayed
            counts.broken += 1
            reset_on_close(backend)
            raise
        finally:
            counts.open -= 1
            counts.bytes_to_backend += relayed.a_to_b
            counts.bytes_to_client += relayed.b_to_a

    def print_counts(self) -> None:
        clients = {"open": self.open, "total": self.total, "refused": self.refused}
        counts = {"pid": os.getpid(), "clients": clients, **self.counts()}
        line = json.dumps({**counts, "gsplice": gsplice.stats().as_dict()})
        sys.stdout.write(line + "\n")  # in one piece, since workers write to it as well
        sys.stdout.flush()

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, and then let what is under way end, for the grace time."""
        self.start()
        gevent.signal_handler(signal.SIGINT, self.end)
        gevent.signal_handler(signal.SIGTERM, self.end)
        gevent.signal_handler(signal.SIGUSR1, self.print_counts)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.serve_forever(stop_timeout=self.options.grace)

    def end(self) -> None:
        """Stop accepting; the second time, end what is under way as well."""
        if self.started:
            self.close()
        else:
            self.pool.kill(block=False)


def reset_on_close(sock: gevent.socket.socket) -> None:
    """Have close() send RST: FIN would tell the peer that the other side has ended as it should."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def main(parser: argparse.ArgumentParser, server: type[ProxyServer], listen_on: str) -> int:
    """Run *server* with the options of the command line, in as many processes as these say."""
    add_options(parser, listen_on)
    options = parser.parse_args()
    # Each connection takes two descriptors, and the usual limit is 1024 for the sake of select().
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {signal.SIGCHLD})
    try:
        listeners = listen(options.listen, options.workers)
    except OSError as error:
        print(f"cannot listen on {shown(options.listen)}: {error}", file=sys.stderr)
        return 1
    print(f"Listening on {shown(listeners[0].getsockname())} (Ctrl-C to stop)", flush=True)
    listener = listeners[0] if options.workers == 1 else prefork(listeners)
    if listener is not None:
        server(listener, options).run()
    return 0
