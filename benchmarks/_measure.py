"""What the benchmarks share: alternating rounds, and a receiver that costs little.

Run as a script this is the receiver.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import socket
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import gevent
import gevent.socket
from _report import Report as Report  # what a benchmark needs comes from here

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


class Sample(NamedTuple):
    """What one piece of work took, in seconds: by the clock, and of this process's CPU time."""

    elapsed: float
    cpu: float


#: A sample: a named tuple of numbers.
S = TypeVar("S", bound=tuple[float, ...])


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Collect the garbage now, and no more until the end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(work: Callable[[], object]) -> Sample:
    """Do *work* once."""
    cpu, start = time.process_time(), time.perf_counter()
    work()
    return Sample(time.perf_counter() - start, time.process_time() - cpu)


def in_turns(
    sides: Mapping[str, Callable[[], S]], rounds: int, warm_up: int = 1
) -> dict[str, list[S]]:
    """Measure each side once a round, in an order that turns round; return what each gave.

    Times of different minutes cannot be compared on a machine that has other things to do, so all
    sides share every minute.
    """
    samples: dict[str, list[S]] = {name: [] for name in sides}
    with no_collections():
        for number in range(warm_up + rounds):
            for name in sides if number % 2 else reversed(sides):
                sample = sides[name]()
                if number >= warm_up:
                    samples[name].append(sample)
    return samples


def medians(samples: Sequence[S]) -> S:
    """Return the median of each field."""
    return type(samples[0])(*map(statistics.median, zip(*samples, strict=True)))


def alternate(sides: Mapping[str, Callable[[], S]], rounds: int, warm_up: int = 1) -> dict[str, S]:
    """Measure the sides in turns; return the medians by side."""
    return {name: medians(several) for name, several in in_turns(sides, rounds, warm_up).items()}


@contextlib.contextmanager
def pinned(report: Report) -> Iterator[set[int]]:
    """Stay on one core until the end; yield the one that is for the receiver.

    Left to the scheduler, the same call took from 0.14 to 0.43 CPU seconds per GiB, by whether the
    two shared a core.
    """
    all_cpus = os.sched_getaffinity(0)
    ours, *others = sorted(all_cpus)
    if not others:
        report.leave_out("a core for the receiver alone", "there is one only")
    os.sched_setaffinity(0, [ours])
    try:
        yield {*others[:1]} or all_cpus
    finally:
        os.sched_setaffinity(0, all_cpus)


@contextlib.contextmanager
def dropping_peer(cpus: set[int] | None = None) -> Iterator[gevent.socket.socket]:
    """Connect to a process that receives without copying: else it would be what is measured.

    It runs on *cpus*, if given.
    """
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            if cpus:  # its threads, one a connection, are started later
                os.sched_setaffinity(process.pid, cpus)
            with gevent.socket.create_connection(("127.0.0.1", port)) as sock:
                yield sock
        finally:
            process.kill()


def drained(sock: gevent.socket.socket) -> None:
    """Wait until the peer has acknowledged all, so that no side starts with the other's backlog."""
    while int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder):
        gevent.sleep(0.0005)


def _drop(connection: socket.socket) -> None:
    recv = ctypes.CDLL(None, use_errno=True).recv
    while recv(connection.fileno(), None, 4 * MiB, socket.MSG_TRUNC) > 0:
        pass
    connection.close()


def _receive_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_drop, args=[connection], daemon=True).start()


if __name__ == "__main__":
    _receive_for_ever()
