"""Files of 64 KiB that are not in the page cache, by gevent.pywsgi, with gsplice and without.

Every request has a connection of its own: on one that is kept, unpatched pywsgi would have the
client wait for something else than the disk (see small_responses).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from _measure import KiB, MiB, Report, Sample, in_turns, medians
from _servers import Server, running
from small_responses import KINDS

SIZE = 64 * KiB
REQUEST = (
    "Without a disk, the request of such a file costs more with gsplice, too: see small_responses"
)


def written(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(random.randbytes(SIZE))
        file.flush()
        os.fsync(file.fileno())  # what is dirty would stay in the page cache
    return path


def drop(paths: Sequence[Path]) -> None:
    """Have the page cache forget *paths*."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fetch(port: int, name: str) -> None:
    """Ask for *name*, and drop what comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = 0
        while data := sock.recv(MiB):
            received += len(data)
    assert received > SIZE, received


def fetch_all(port: int, paths: Sequence[Path], connections: int) -> None:
    names = iter([path.name for path in paths])

    def work() -> None:
        for name in names:  # next() of a list's iterator is atomic
            fetch(port, name)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def side(server: Server, paths: Sequence[Path], connections: int) -> Callable[[], Sample]:
    def work() -> Sample:
        drop(paths)
        cpu, start = server.cpu(), time.perf_counter()
        fetch_all(server.port, paths, connections)
        elapsed = time.perf_counter() - start
        return Sample(elapsed / len(paths), (server.cpu() - cpu) / len(paths))

    return work


def main() -> None:
    report = Report(__doc__)
    number, rounds = report.pick((300, 12), (100, 2), (5, 1))
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        report.leave_out("a core for the servers alone", "there is one only")
    os.sched_setaffinity(0, cpus[-1:])
    theirs, ours = (kind.name for kind in KINDS)
    with contextlib.ExitStack() as stack:
        # /tmp is often in memory.
        place = os.environ.get("TMPDIR", "/var/tmp")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        paths = [written(folder / f"file-{each}") for each in range(number)]
        servers = {
            kind.name: stack.enter_context(
                running(kind, folder, folder / f"server{each}", cpus[0] if cpus[1:] else None)
            )
            for each, kind in enumerate(KINDS)
        }
        for connections in (1, 8):
            sides = {name: side(server, paths, connections) for name, server in servers.items()}
            samples = in_turns(sides, rounds)
            found = {name: medians(several) for name, several in samples.items()}
            base = found[theirs]
            rows = [
                [
                    name,
                    1e6 * of.elapsed,
                    1e6 * min(each.elapsed for each in samples[name]),
                    1e6 * of.cpu,
                    of.elapsed / base.elapsed,
                    of.cpu / base.cpu,
                ]
                for name, of in found.items()
            ]
            at_once = f"{connections} connection{'s' if connections > 1 else ''} at once"
            title = f"{number} cold files of 64 KiB, {at_once}, median of {rounds} rounds"
            head = ["", "us a file", "least", "CPU us", "time/pywsgi", "CPU/pywsgi"]
            report.table(title, head, rows)
            ratio = found[ours].elapsed / base.elapsed
            if connections == 1:
                report.hold_to(
                    f"cold files, {at_once}: time/pywsgi",
                    ratio,
                    most=1.05,
                    cause=REQUEST,
                    cost=True,
                )
            else:
                speed = 1 / ratio
                report.hold_to(
                    f"cold files, {at_once}: speed/pywsgi", speed, least=1.3, cause=REQUEST
                )
    os.sched_setaffinity(0, cpus)
    report.close()


if __name__ == "__main__":
    main()
