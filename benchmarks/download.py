"""A download to a file, by urlopen() and copyfileobj(): Python's own under gevent, and gsplice's.

The server is another process, which sends from the page cache by sendfile(2).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent.monkey

if __name__ == "__main__" and sys.argv[1:] != ["--serve"]:
    gevent.monkey.patch_all()

import socket

from _measure import GiB, KiB, MiB, Report, Sample, alternate, timed
from _words import in_words

import gsplice
from gsplice._ends.small import SMALL_BODY

SIZES = (64 * KiB, 1 * MiB, 2 * MiB, 8 * MiB, 64 * MiB)

#: From a size on, the most CPU time of gsplice's over gevent's.
BOUNDS = ((8 * MiB, 0.55), (2 * MiB, 0.75), (0, 1.0))

RECOGNISED = "Both sides do the same: what is above 1 is a look at the length, and the machine"
COPIED = (
    "Both sides copy the bytes into the page cache: bare loops of recv and write, and of splice, "
    "differ by a factor of 0.6; a trip to a thread costs 0.15 to 0.3 ms more"
)

stock_copy: Callable[..., None] = shutil.copyfileobj  # gsplice patches nothing here


def main() -> None:
    report = Report(__doc__)
    rounds = report.pick(15, 2, 1)
    with server() as url:
        for place in ("/var/tmp", "/dev/shm"):
            with tempfile.TemporaryDirectory(dir=place) as directory:
                downloads(report, url, Path(directory, "copy"), rounds)
    report.close()


def downloads(report: Report, url: str, path: Path, rounds: int) -> None:
    rows = []
    series: dict[str, dict[int, float]] = {"gevent": {}, "gsplice": {}}
    for size in report.pick(SIZES, SIZES, SIZES[:2]):
        several = max(1, min(200, 4 * MiB // size))

        def side(copy: Callable[..., None], size: int = size, several: int = several) -> Sample:
            cpu = elapsed = 0.0
            for _ in range(several):
                path.unlink(missing_ok=True)
                with urllib.request.urlopen(f"{url}{size}") as response, path.open("wb") as file:
                    sample = timed(lambda: copy(response, file))
                elapsed, cpu = elapsed + sample.elapsed, cpu + sample.cpu
                assert path.stat().st_size == size
            return Sample(elapsed / several, cpu / several)

        median = alternate(
            {"gevent": lambda: side(stock_copy), "gsplice": lambda: side(gsplice.copyfileobj)},
            rounds,
        )
        stock, ours = median["gevent"], median["gsplice"]
        ratio = ours.cpu / stock.cpu
        most = next(bound for least, bound in BOUNDS if size >= least)
        target = report.target(
            f"body of {in_words(size)} to {path.parent.parent}: CPU/gevent",
            ratio,
            most=most,
            cause=COPIED if size > SMALL_BODY else RECOGNISED,
            cost=size <= SMALL_BODY,
        )
        per_gib = [sample.cpu * GiB / size for sample in (stock, ours)]
        for name, cost in zip(series, per_gib, strict=True):
            series[name][size] = cost
        rows.append([in_words(size), *per_gib, ratio, stock.elapsed / ours.elapsed, target])
    report.table(
        f"To a new file in {path.parent.parent}, median of {rounds} rounds",
        ["", "gevent CPU s/GiB", "gsplice", "CPU/gevent", "speed/gevent", "target for the CPU"],
        rows,
    )
    where = path.parent.parent
    report.lines(
        f"download_to_{where.name}",
        f"Downloads to new files in {where}",
        "size of the body",
        "CPU seconds per GiB",
        series,
        ours=["gsplice"],
    )


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start a server in another process, whose path is the number of bytes it gives."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
        finally:
            process.kill()


def serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryFile() as file:
        for _ in range(max(SIZES) // MiB):
            file.write(os.urandom(MiB))
        file.flush()
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                answer(connection, file)


def answer(connection: Any, file: Any) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(4096)
    size = int(request.split()[1][1:])
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    sent = 0
    while sent < size:
        sent += os.sendfile(connection.fileno(), file.fileno(), sent, size - sent)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
