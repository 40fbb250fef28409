"""A file in the page cache to a socket: gevent's own sendfile, gsplice's, and the limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measure import (
    GiB,
    KiB,
    MiB,
    Report,
    Sample,
    alternate,
    drained,
    dropping_peer,
    no_collections,
    timed,
)
from gevent.socket import socket as GeventSocket

import gsplice

SIZES = (1, 100, 1 * KiB, 2 * KiB, 4 * KiB, 8 * KiB, 16 * KiB, 64 * KiB)


gevent_sendfile: Callable[..., int] = GeventSocket.sendfile  # nothing is patched here


def main() -> None:
    report = Report(__doc__)
    with tempfile.TemporaryDirectory() as directory, dropping_peer() as sock:
        big_file(report, sock, Path(directory, "big"))
        small_files(report, sock, Path(directory, "small"))
    report.close()


def big_file(report: Report, sock: Any, path: Path) -> None:
    size, rounds = (64 * MiB, 3) if report.quick else (512 * MiB, 8)
    with path.open("wb") as file:
        for _ in range(size // MiB):
            file.write(random.randbytes(MiB))
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, MiB)
    ways: dict[str, Callable[[Any, Any], object]] = {
        "gevent": gevent_sendfile,
        "gsplice": gsplice.sendfile,
        "os.sendfile loop": sendfile_loop,
        "splice through 1 MiB": lambda sock, file: splice_loop(sock, file, read_fd, write_fd),
    }

    def side(way: Callable[[Any, Any], object]) -> Sample:
        with path.open("rb") as file:
            sample = timed(lambda: way(sock, file))
            drained(sock)
            return sample

    with path.open("rb") as file:
        while file.read(MiB):  # into the page cache
            pass
    before = gsplice.stats().bytes_sendfile
    medians = alternate({name: (lambda way=way: side(way)) for name, way in ways.items()}, rounds)
    assert gsplice.stats().bytes_sendfile > before
    os.close(read_fd)
    os.close(write_fd)
    path.unlink()

    base = medians["gevent"]
    rows = [
        [
            name,
            s.cpu * GiB / size,
            size / GiB / s.elapsed,
            s.cpu / base.cpu,
            base.elapsed / s.elapsed,
        ]
        for name, s in medians.items()
    ]
    title = f"One file of {size // MiB} MiB, median of {rounds} rounds"
    report.table(title, ["", "CPU s/GiB", "GiB/s", "CPU/gevent", "speed/gevent"], rows)
    ours = medians["gsplice"]
    cpu, speed = ours.cpu / base.cpu, base.elapsed / ours.elapsed
    print(f"  CPU of gevent's {cpu:.3f}, {report.target('CPU', cpu, most=0.35)}")
    print(f"  times its speed {speed:.3f}, {report.target('speed', speed, least=2.5)}")


def sendfile_loop(sock: Any, file: Any) -> None:
    """What one system call can do, with nothing around it."""
    offset, fd, to = 0, file.fileno(), sock.fileno()
    while sent := when_writable(to, os.sendfile, fd, offset, 2 * MiB):
        offset += sent


def splice_loop(sock: Any, file: Any, read_fd: int, write_fd: int) -> None:
    """The same through a pipe."""
    offset, fd, to = 0, file.fileno(), sock.fileno()
    while held := os.splice(fd, write_fd, MiB, offset_src=offset):
        offset += held
        while held:
            held -= when_writable(to, lambda to, left: os.splice(read_fd, to, left), held)


def when_writable(fd: int, call: Callable[..., int], *args: int) -> int:
    while True:
        try:
            return call(fd, *args)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def small_files(report: Report, sock: Any, path: Path) -> None:
    rounds = 12 if report.quick else 60
    rows = []
    for size in SIZES:
        path.write_bytes(random.randbytes(size))
        times: dict[Callable[..., int], list[int]] = {gevent_sendfile: [], gsplice.sendfile: []}
        stock, ours = times
        for number in range(rounds + 2):
            if number == 2:  # the first two were the warm-up
                for side in times.values():
                    side.clear()
            # Blocks of such short calls differ by chance: the sides take turns call by call.
            calls = [stock, ours] * max(8, min(100, MiB // size // 2))
            random.shuffle(calls)
            small_calls(sock, path, calls, times)
            drained(sock)
        medians = [statistics.median(side) / 1000 for side in times.values()]
        ratio = medians[1] / medians[0]
        held_to = report.target(f"{size} bytes", ratio, most=1.05)
        rows.append([f"{size:,} B", *medians, ratio, held_to])
    title = f"Small files, microseconds a call, median of {rounds} rounds of up to 200 calls"
    report.table(title, ["", "gevent", "gsplice", "ratio", "target"], rows)


def small_calls(
    sock: Any,
    path: Path,
    calls: list[Callable[..., int]],
    times: dict[Callable[..., int], list[int]],
) -> None:
    with contextlib.ExitStack() as stack, no_collections():
        # A file sent a second time may have its bytes in its buffer still; these have not.
        files = [stack.enter_context(path.open("rb")) for _ in calls]
        for call, file in zip(calls, files, strict=True):
            start = time.perf_counter_ns()
            call(sock, file)
            times[call].append(time.perf_counter_ns() - start)


if __name__ == "__main__":
    main()
