"""Responses of gevent.pywsgi on connections that are kept, with gsplice and without.

Unpatched, headers and body are two segments, and the second waits until the client has acknowledged
the first, 40 ms later.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _measure import KiB, MiB, Report, alternate
from _servers import HERE, Kind, Server, running

CONNECTIONS = 8
IN_A_ROW = 40

#: The paths of responses of which unpatched pywsgi makes the client wait, and what they are.
SMALL = {
    "list": "list of 1 KiB",
    "pieces": "list of 3 pieces",
    "chunk": "chunk of 1 KiB",
    "chunks": "3 chunks",
    "write": "write() of 1 KiB",
    "404": "404",
    "file-1K": "file of 1 KiB",
    "tiny-pieces": "list of 1,000 pieces of 10 B",
}
#: The others are of several segments anyway.
LARGER = {
    "list-64K": "list of 64 KiB",
    "list-256K": "list of 256 KiB",
    "file-64K": "file of 64 KiB",
    "large-pieces": "list of 128 pieces of 8 KiB",
    "large-chunks": "128 chunks of 8 KiB",
    "tiny-chunks": "1,000 chunks of 10 B",
}

CHUNKS = (
    "Each chunk leaves at once, in a segment of its own; unpatched, those that come while the "
    "client has not acknowledged the one before share one"
)
FILE = (
    "To know the file, the socket and what is in the page cache costs more than reading and "
    "sending so little"
)
CAUSES = {"tiny-chunks": CHUNKS, "large-chunks": CHUNKS, "file-64K": FILE}


class Found(NamedTuple):
    """What one round has given: times in seconds."""

    rate: float  # requests per second, on all connections
    cpu: float  # of the server, for each of them
    first: float  # the quartiles of the requests in a row, on one connection
    middle: float
    third: float


def start(**added: str) -> Any:
    def command(fd: int, port: int, folder: Path, scratch: Path) -> Any:
        return [sys.executable, HERE / "_respond.py", str(fd)], {
            "BENCHMARK_FOLDER": str(folder),
            **added,
        }

    return command


KINDS = (
    Kind("pywsgi", start()),
    Kind("gsplice, pywsgi", start(BENCHMARK_GSPLICE="1"), is_ours=True),
)


class Client:
    """Asks for one path, on connections that stay open."""

    def __init__(self, server: Server, path: str, sockets: list[socket.socket]) -> None:
        self._server = server
        self._sockets = sockets
        self._asked = f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(self._asked.replace(b"Host: x", b"Host: x\r\nConnection: close"))
            with sock.makefile("rb") as file:
                self._size = len(file.read())  # all its responses are of that

    def round(self, in_a_row: int, seconds: float) -> Found:
        taken = self._in_a_row(in_a_row)
        cpu, rate = self.loaded(seconds)
        return Found(rate, cpu, *statistics.quantiles(taken))

    def loaded(self, seconds: float) -> tuple[float, float]:
        """Ask on all connections; return the CPU seconds of each request, and how many a second."""
        cpu, begun = self._server.cpu(), time.perf_counter()
        done = self._at_once(begun + seconds)
        rate = done / (time.perf_counter() - begun)
        return (self._server.cpu() - cpu) / done, rate

    def _in_a_row(self, number: int) -> list[float]:
        """Return how long each of *number* requests on one connection has taken."""
        sock, taken = self._sockets[0], []
        for _ in range(number):
            begun = time.perf_counter()
            sock.sendall(self._asked)
            left = self._size
            while left:
                left -= len(sock.recv(min(left, MiB)))
            taken.append(time.perf_counter() - begun)
        return taken

    def _at_once(self, end: float) -> int:
        """Have a request on every connection until *end*; return how many have been answered."""
        done = 0
        left: dict[Any, int] = dict.fromkeys(self._sockets, self._size)
        with selectors.EpollSelector() as selector:
            for sock in self._sockets:
                selector.register(sock, selectors.EVENT_READ)
                sock.sendall(self._asked)
            while left:
                for key, _ in selector.select():
                    sock: Any = key.fileobj
                    left[sock] -= len(sock.recv(min(left[sock], MiB)))
                    if left[sock]:
                        continue
                    done += 1
                    if time.perf_counter() < end:
                        left[sock] = self._size
                        sock.sendall(self._asked)
                    else:
                        del left[sock]
                        selector.unregister(sock)
        return done


@contextlib.contextmanager
def both(report: Report) -> Iterator[dict[str, Server]]:
    """Run both servers on one core, with this process on another."""
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu = cpus[0] if len(cpus) > 1 else None
    if server_cpu is None:
        report.leave_out("a core for the servers alone", "there is one only")
    os.sched_setaffinity(0, cpus[-1:])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for size in (1, 64):
            (folder / f"file-{size}K").write_bytes(bytes(size * KiB))
        yield {
            kind.name: stack.enter_context(
                running(kind, folder, folder / f"server{number}", server_cpu)
            )
            for number, kind in enumerate(KINDS)
        }
    os.sched_setaffinity(0, cpus)


def measure(report: Report, servers: dict[str, Server], path: str) -> dict[str, Found]:
    in_a_row, seconds, rounds = report.pick((IN_A_ROW, 0.5, 6), (IN_A_ROW, 0.2, 2), (4, 0.01, 1))
    with contextlib.ExitStack() as stack:

        def side(server: Server) -> Callable[[], Found]:
            address = ("127.0.0.1", server.port)
            sockets = [
                stack.enter_context(socket.create_connection(address)) for _ in range(CONNECTIONS)
            ]
            client = Client(server, path, sockets)
            return lambda: client.round(in_a_row, seconds)

        sides = {name: side(server) for name, server in servers.items()}
        return alternate(sides, rounds, warm_up=0)


HEAD = ["", "requests/s", "times", "CPU us", "ratio", "quartiles, ms", "", ""]


def main() -> None:
    report = Report(__doc__)
    found: dict[str, dict[str, Found]] = {}
    kinds = SMALL | LARGER
    with both(report) as servers:
        for path in kinds:
            found[path] = measure(report, servers, path)
    theirs, ours = (kind.name for kind in KINDS)
    rows = []
    for path, by in found.items():
        for name, of in by.items():
            times, ratio = of.rate / by[theirs].rate, of.cpu / by[theirs].cpu
            quartiles = [1e3 * each for each in (of.first, of.middle, of.third)]
            title = f"{kinds[path]}: {name}"
            rows.append([title, of.rate, times, 1e6 * of.cpu, ratio, *quartiles])
    title = f"On {CONNECTIONS} connections at once; {IN_A_ROW} requests in a row on one of them"
    report.table(title, HEAD, rows)
    for path, by in found.items():
        what, cause = kinds[path], CAUSES.get(path, "")
        if path in SMALL:
            third = 1e3 * by[ours].third
            report.hold_to(f"{what}: ms that three quarters take at most", third, most=2)
            more = by[ours].rate / by[theirs].rate
            report.hold_to(f"{what}: requests per second/pywsgi", more, least=10)
        cpu = by[ours].cpu / by[theirs].cpu
        report.hold_to(f"{what}: CPU/pywsgi", cpu, most=1, cause=cause, cost=True)
    report.bars(
        "small_responses",
        f"pywsgi on {CONNECTIONS} kept connections: small responses",
        "requests per second (more is better)",
        {
            kinds[path]: {name: of.rate for name, of in found[path].items()}
            for path in ("list", "pieces", "chunk", "404")
        },
        [ours],
    )
    report.close()


if __name__ == "__main__":
    main()
