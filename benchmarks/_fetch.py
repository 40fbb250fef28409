"""A client that costs little: it has the kernel drop the bodies, so that the server is measured.

``_fetch.py PORT CONNECTIONS SECONDS NAME...`` asks for the files in turn, on so many connections
that stay open, for so many seconds, or, if these are 0, for each file once. Prints JSON: the bytes
of the bodies, the responses that were complete, the seconds, what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import select
import socket
import sys
import time
from collections.abc import Iterator

MiB = 1 << 20

_recv = ctypes.CDLL(None, use_errno=True).recv


class Failed(Exception):
    """A response was not what it should be."""


class Connection:
    """One that stays open."""

    def __init__(self, port: int, names: Iterator[str]) -> None:
        self.names = names
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = b""
        self.left = 0
        self.bytes = self.complete = 0

    def ask(self) -> bool:
        """Ask for the next file; return False if there is none."""
        name = next(self.names, None)
        if name is None:
            return False
        self.sock.send(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return True

    def is_readable(self) -> bool:
        """Take what has come. Returns False when a response is over and there is no next one."""
        if not self.left:
            data = self.sock.recv(65536)
            if not data:
                raise Failed("the server has closed the connection")
            head, end, body = (self.head + data).partition(b"\r\n\r\n")
            if not end:
                self.head = head
                return True
            self.head = b""
            self.left = self._length(head) - len(body)
            self.bytes += len(body)
        if self.left:
            # Dropped, not copied (tcp(7), MSG_TRUNC).
            asked = min(self.left, 8 * MiB)
            number = _recv(self.sock.fileno(), None, asked, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
            if number < 0:
                return True  # not there yet
            if not number:
                raise Failed("the server has closed the connection amid a body")
            self.left -= number
            self.bytes += number
        if self.left:
            return True
        self.complete += 1
        return self.ask()

    def _length(self, head: bytes) -> int:
        status, *headers = head.split(b"\r\n")
        if status.split()[1] != b"200":
            raise Failed(status.decode())
        for header in headers:
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                return int(value)
        raise Failed("there is no Content-Length")


def names_for_ever(names: list[str]) -> Iterator[str]:
    while True:
        yield from names


def main() -> None:
    port, number, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    given = sys.argv[4:]
    names = names_for_ever(given) if seconds else iter(given)
    epoll = select.epoll()
    connections = {}
    waiting = [Connection(port, names) for _ in range(number)]
    start = time.perf_counter()
    for connection in waiting:
        if connection.ask():
            epoll.register(connection.sock, select.EPOLLIN)
            connections[connection.sock.fileno()] = connection
    everybody = [*connections.values()]
    errors: list[str] = []
    end = start + (seconds or 3600)
    while connections and time.perf_counter() < end:
        for fd, _ in epoll.poll(0.1):
            try:
                goes_on = connections[fd].is_readable()
            except (Failed, OSError) as err:
                errors.append(str(err))
                goes_on = False
            if not goes_on:
                epoll.unregister(fd)
                del connections[fd]
    found = {
        "bytes": sum(each.bytes for each in everybody),
        "requests": sum(each.complete for each in everybody),
        "seconds": time.perf_counter() - start,
        "errors": len(errors),
        "first error": errors[0] if errors else "",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
