"""An HTTP proxy that knows one method, CONNECT: a tunnel for TLS, spliced.

    python examples/http_connect_proxy.py --listen 127.0.0.1:3128
    curl --proxy http://127.0.0.1:3128 https://example.com/

Once the request is read, ``gsplice.relay`` gets both sockets, and what the client has sent behind
its request.

It asks nobody who they are. Whoever reaches the port can have connections made from this machine,
also to itself and to a network behind it. That is why it listens on 127.0.0.1 by default, and why
only port 443 can be connected to: one that lets anybody have port 25 sends spam before long. Let
only such clients reach it as might make these connections themselves.

Signals, and what is printed for SIGUSR1, are as in tcp_proxy.py.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import socket
import sys
from http import HTTPStatus
from typing import Any

import gevent
import gevent.socket
from proxy_options import Address, host_and_port, seconds
from proxy_server import Counts, ProxyServer, main

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.[0-9]")
MOST_HEADER = 16 * 1024
#: Seconds for a client to stop sending, and to read why it is sent away.
LINGER = 10


class Answer(Exception):
    """A request that is answered, and no tunnel: the status, why, and header lines."""

    def __init__(self, status: HTTPStatus, text: object, *headers: str) -> None:
        self.status, self.text, self.headers = status, str(text), headers


class ConnectProxy(ProxyServer):
    def __init__(self, listener: Any, options: argparse.Namespace) -> None:
        super().__init__(listener, options)
        self.tunnels = Counts()
        self.answers: collections.Counter[int] = collections.Counter()

    def serve(self, client: gevent.socket.socket) -> None:
        try:
            header, rest = read_header(client, self.options.header_timeout or None)
            target = self.target(header)
            upstream = self.connect_to(target)
        except Answer as answer:
            self.answers[answer.status] += 1
            send_away(client, answer)
            return
        with upstream:
            self.answers[HTTPStatus.OK] += 1
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self.forward(client, upstream, self.tunnels, initial=rest)

    def target(self, header: bytes) -> Address:
        """Return what the request wants to be connected to. Raises Answer if it can't be."""
        match = REQUEST_LINE.fullmatch(header.partition(b"\r\n")[0])
        if match is None:
            raise Answer(HTTPStatus.BAD_REQUEST, "This is no request of HTTP/1.")
        if match[1] != b"CONNECT":
            raise Answer(HTTPStatus.METHOD_NOT_ALLOWED, "Only CONNECT is.", "Allow: CONNECT")
        try:
            target = host_and_port(match[2].decode())
        except argparse.ArgumentTypeError as error:
            raise Answer(HTTPStatus.BAD_REQUEST, error) from None
        if target[1] not in self.options.allow_port:
            raise Answer(HTTPStatus.FORBIDDEN, f"Port {target[1]} is not allowed.")
        return target

    def connect_to(self, target: Address) -> gevent.socket.socket:
        try:
            return self.connect(target, self.tunnels)
        except TimeoutError as error:
            raise Answer(HTTPStatus.GATEWAY_TIMEOUT, error) from None
        except OSError as error:
            raise Answer(HTTPStatus.BAD_GATEWAY, error) from None

    def counts(self) -> dict[str, Any]:
        return {"answers": self.answers, "tunnels": dataclasses.asdict(self.tunnels)}


def read_header(client: gevent.socket.socket, timeout: float | None) -> tuple[bytes, bytes]:
    """Receive a request's header; return it, and what has come behind it. Raises Answer."""
    data = b""
    with gevent.Timeout(timeout, Answer(HTTPStatus.REQUEST_TIMEOUT, "No request came.")):
        while b"\r\n\r\n" not in data:
            if len(data) > MOST_HEADER:
                raise Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The header is too long.")
            received = client.recv(MOST_HEADER + 1 - len(data))
            if not received:
                raise ConnectionResetError
            data += received
    header, _, rest = data.partition(b"\r\n\r\n")
    return header, rest


def port(text: str) -> int:
    number = int(text)
    if not 0 < number < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 1 to 65535")
    return number


def send_away(client: gevent.socket.socket, answer: Answer) -> None:
    text = answer.text.encode("utf-8", "replace") + b"\n"
    lines = [
        f"HTTP/1.1 {answer.status} {answer.status.phrase}",
        *answer.headers,
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(text)}",
        "Connection: close",
    ]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + text)
    # close() while something unread is left would send RST, which may overtake the answer.
    client.shutdown(socket.SHUT_WR)
    with gevent.Timeout(LINGER, False):
        while client.recv(MOST_HEADER):
            pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An HTTP proxy for CONNECT requests only.")
    parser.add_argument(
        "--allow-port",
        type=port,
        nargs="+",
        default=[443],
        metavar="PORT",
        help="that tunnels may lead to; default: 443",
    )
    parser.add_argument(
        "--header-timeout",
        type=seconds,
        default=30,
        metavar="SECONDS",
        help="for a request to come; default: %(default)s; 0 is for ever",
    )
    sys.exit(main(parser, ConnectProxy, "127.0.0.1:3128"))
