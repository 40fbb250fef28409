"""A hot file to hundreds of clients that take a little at a time: the pipes and CPU it needs.

The clients are in another process, on a core of its own. Each has a small receive buffer; in turn,
those that have something take a kilobyte.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.socket
from _measure import GiB, KiB, Report, in_turns, pinned, timed
from _words import in_words
from gevent.socket import socket as GeventSocket

import gsplice

READ = 1 * KiB
#: The least that Linux grants is a little more.
RECEIVE_BUFFER = 2 * KiB
#: So that most of a file has to wait: by itself a socket's buffer grows up to 4 MiB.
SEND_BUFFER = 64 * KiB
#: Seconds between two looks at the pipes in use. More looks would be a part of the CPU time.
LOOK = 0.02
#: Seconds after which a round has gone wrong.
LIMIT = 30

Send = Callable[[Any, Any], int]  # socket, file

SENDS: dict[str, Send] = {
    "gevent": GeventSocket.sendfile,  # nothing is patched here
    "gsplice": gsplice.sendfile,
}


class Served(NamedTuple):
    """What it took to serve all clients, in seconds, and the most pipes seen in use."""

    elapsed: float
    cpu: float
    in_use: int


def main() -> None:
    report = Report(__doc__)
    clients, size, rounds = report.pick(
        (300, 512 * KiB, 3), (300, 256 * KiB, 2), (20, 128 * KiB, 1)
    )
    place = os.environ.get("TMPDIR", "/var/tmp")
    with tempfile.TemporaryDirectory(dir=place) as directory, pinned(report) as cpus:
        path = Path(directory, "file")
        path.write_bytes(random.randbytes(size))
        before = gsplice.stats()
        samples = in_turns(
            {
                name: lambda send=send: serve(send, path, clients, cpus)
                for name, send in SENDS.items()
            },
            rounds,
        )
        after = gsplice.stats()
    copied = after.bytes_copied - before.bytes_copied
    assert copied < 0.05 * clients * size, f"gsplice has copied {copied} bytes"
    rows = []
    for name, several in samples.items():
        costs = [sample.cpu * GiB / size / clients for sample in several]
        in_use = max(sample.in_use for sample in several)
        made = after.pipes_created - before.pipes_created if name == "gsplice" else 0
        seconds = statistics.median(sample.elapsed for sample in several)
        rows.append([name, in_use, made, min(costs), statistics.median(costs), seconds])
    report.table(
        f"{clients} clients that take {in_words(READ)} at a time of {in_words(size)}, "
        f"{rounds} rounds",
        ["", "pipes in use at most", "pipes made", "CPU s/GiB, least", "median", "seconds"],
        rows,
    )
    in_use = max(sample.in_use for sample in samples["gsplice"])
    report.hold_to(f"{clients} slow readers: pipes in use at most", in_use, most=1)
    report.close()


def serve(send: Send, path: Path, clients: int, cpus: set[int]) -> Served:
    """Send the file *path* to so many new clients at once."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gevent.Timeout(LIMIT))
        listener = stack.enter_context(GeventSocket())
        # Those that are accepted inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = [sys.executable, __file__, "--read", str(port), str(clients)]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.kill)
        os.sched_setaffinity(process.pid, cpus)
        pairs = []
        for _ in range(clients):
            sock, _address = listener.accept()
            pairs.append((stack.enter_context(sock), stack.enter_context(path.open("rb"))))
        in_use = 0

        def look() -> None:
            nonlocal in_use
            while True:
                in_use = max(in_use, gsplice.stats().pipes_in_use)
                gevent.sleep(LOOK)

        def work() -> None:
            greenlets = [gevent.spawn(serve_one, send, *pair) for pair in pairs]
            looks = gevent.spawn(look)
            gevent.joinall(greenlets, raise_error=True)
            looks.kill()

        def serve_one(send: Send, sock: Any, file: Any) -> None:
            assert send(sock, file) == path.stat().st_size
            sock.shutdown(socket.SHUT_WR)

        sample = timed(work)
        while process.poll() is None:  # until they have taken what the sockets still hold
            gevent.sleep(LOOK)
        assert process.returncode == 0
        return Served(*sample, in_use)


def read(port: int, clients: int) -> None:
    """Be the clients, until each has reached the end."""
    socks: dict[int, socket.socket] = {}
    with select.epoll() as poll:
        for _ in range(clients):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.connect(("127.0.0.1", port))
            poll.register(sock, select.EPOLLIN)
            socks[sock.fileno()] = sock
        while socks:
            for fd, _events in poll.poll():
                if not socks[fd].recv(READ):
                    poll.unregister(fd)
                    socks.pop(fd).close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(*map(int, sys.argv[2:]))
    else:
        main()
