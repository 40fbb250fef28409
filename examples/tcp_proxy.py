"""A TCP proxy on gevent's StreamServer: what comes in is spliced to one of several backends.

    python examples/tcp_proxy.py --listen 127.0.0.1:8080 --to 127.0.0.1:8000 --to 127.0.0.1:8001

The backends take turns. When one can't be reached, the next one is tried. ``gsplice.relay`` does
the rest: it passes on what each side sends, and that it has ended, and takes a pipe of the pool for
as long as there are bytes in it.

SIGUSR1 has each process print its counters as a line of JSON. SIGINT (Ctrl-C) or SIGTERM ends the
program: it accepts no more, and what is under way may go on for the grace time; a second one ends
that, too. What does not end as both sides want it is reset, so that nobody takes a part for the
whole. ``--proxy-protocol`` tells the backend who the client is, as HAProxy does with ``send-proxy``
(https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt, version 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import itertools
import sys
from typing import Any

import gevent.socket
from proxy_options import Address, host_and_port, shown
from proxy_server import Counts, ProxyServer, main


@dataclasses.dataclass
class Backend:
    address: Address
    counts: Counts = dataclasses.field(default_factory=Counts)
    #: Said once, not for each connection.
    is_down: bool = False


class TcpProxy(ProxyServer):
    def __init__(self, listener: Any, options: argparse.Namespace) -> None:
        super().__init__(listener, options)
        self.backends = [Backend(address) for address in dict.fromkeys(options.to)]
        self.turn = itertools.cycle(range(len(self.backends)))

    def serve(self, client: gevent.socket.socket) -> None:
        backend, upstream = self.connect_one()
        with upstream:
            if self.options.proxy_protocol:
                upstream.sendall(proxy_header(client))
            self.forward(client, upstream, backend.counts)

    def connect_one(self) -> tuple[Backend, gevent.socket.socket]:
        """Connect to the backend whose turn it is, or else to one that follows it."""
        first = next(self.turn)
        for backend in self.backends[first:] + self.backends[:first]:
            try:
                upstream = self.connect(backend.address, backend.counts)
            except OSError as error:
                self.note(backend, error)
            else:
                self.note(backend)
                return backend, upstream
        raise ConnectionError("no backend can be reached")

    def note(self, backend: Backend, error: OSError | None = None) -> None:
        is_down = error is not None
        if is_down != backend.is_down:
            news = f"can't be reached: {error}" if is_down else "can be reached again"
            print(f"Backend {shown(backend.address)} {news}", file=sys.stderr, flush=True)
        backend.is_down = is_down

    def counts(self) -> dict[str, Any]:
        return {
            "backends": {
                shown(backend.address): dataclasses.asdict(backend.counts)
                for backend in self.backends
            }
        }


def proxy_header(client: gevent.socket.socket) -> bytes:
    """Return the line of the PROXY protocol that says who is connected with whom."""
    (their_host, their_port), (our_host, our_port) = (
        (plain_ip(name[0]), name[1]) for name in (client.getpeername(), client.getsockname())
    )
    hosts = f"TCP{their_host.version} {their_host} {our_host}"
    return f"PROXY {hosts} {their_port} {our_port}\r\n".encode()


def plain_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without the interface of a link-local one, and as IPv4 if it came to an IPv6 socket so."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Forward TCP connections to backends, which take turns.",
        epilog="SIGUSR1 prints counters; the file itself tells the rest.",
    )
    parser.add_argument(
        "--to",
        type=host_and_port,
        action="append",
        required=True,
        metavar="HOST:PORT",
        help="a backend; may be given several times",
    )
    parser.add_argument(
        "--proxy-protocol",
        action="store_true",
        help="begin with a line that tells the backend the client's address",
    )
    sys.exit(main(parser, TcpProxy, "127.0.0.1:8080"))
