"""What the benchmarks share: alternating rounds, a receiver that costs little, tables and targets.

Run as a script this is the receiver.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gevent
import gevent.socket

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
def dropping_peer() -> Iterator[gevent.socket.socket]:
    """Connect to a process that receives without copying: else it would be what is measured."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
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


class Report:
    """Prints what is measured, and keeps it for ``--json``. A target missed is no failure."""

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="fewer rounds: a rough idea only")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
        parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them (matplotlib)")
        self.options = parser.parse_args()
        machine = f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs"
        versions = f"Python {platform.python_version()}, gevent {gevent.__version__}"
        self.figures: dict[str, Any] = {"machine": machine, "versions": versions, "targets": []}
        print(f"{versions}, {machine}")

    @property
    def quick(self) -> bool:
        return bool(self.options.quick)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print *rows*, each a name and numbers, and keep them under *title*."""
        cells = [[_text(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        print(f"\n{title}")
        for line in [head, *cells]:
            first, *others = (
                cell.ljust(width) if not number else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print(" ", first, *others, sep="  ")
        self.figures[title] = [dict(zip(head, row, strict=True)) for row in rows]

    def target(self, what: str, value: float, *, most: float = 0, least: float = 0) -> str:
        """Keep whether *value* is what it should be; return it in words."""
        met = value <= most if most else value >= least
        bound = f"at most {most:g}" if most else f"at least {least:g}"
        part = {"what": what, "value": value, "bound": bound, "of bound": value / (most or least)}
        self.figures["targets"].append(part | {"met": met})
        return f"{bound}: {'met' if met else 'MISSED'}"

    def close(self) -> None:
        """Write the files that were asked for."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.figures, indent=1) + "\n")
        if self.options.picture:
            self._draw(self.options.picture)

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure  # only the extra "bench" brings it

        targets = self.figures["targets"][::-1]
        figure = Figure(figsize=(9, 1.5 + 0.35 * len(targets)), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            [f"{target['what']} ({target['bound']})" for target in targets],
            [target["of bound"] for target in targets],
            color=["tab:green" if target["met"] else "tab:red" for target in targets],
        )
        axes.axvline(1, color="black")
        axes.set_xlabel("measured, as a multiple of its bound (green: met)")
        axes.set_title(f"{self.figures['versions']}, {self.figures['machine']}", fontsize=9)
        figure.savefig(path)


def _text(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    _receive_for_ever()
