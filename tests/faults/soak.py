"""Mixed transfers at full load, many of them killed, for as long as is asked for.

    python tests/faults/soak.py MINUTES FIGURES.json [PLOT.png]

Every second it is noted how much memory is resident, how many descriptors are open, how many pages
the kernel keeps for pipes, and how late a greenlet woke that sleeps a millisecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gevent
from mixed import Mixed

import gsplice

AT_ONCE = 30
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return how many bytes of this process are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def pipe_pages() -> int:
    """Return how many pages the kernel keeps for the pipes of this process."""
    sizes = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                sizes[os.fstat(fd).st_ino] = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    return sum(sizes.values()) // _PAGE


def soak(minutes: float, directory: Path) -> dict[str, Any]:
    """Run transfers for *minutes*; return what was noted."""
    gsplice.patch_all()
    gevent.get_hub().print_exception = lambda *args: None  # of those that are killed
    mixed = Mixed(directory, seed=1)
    end = time.monotonic() + 60 * minutes
    number = 0

    def work() -> None:
        nonlocal number
        while time.monotonic() < end:
            number += 1
            mixed.run(number)

    late: list[float] = []

    def sleep() -> None:
        while time.monotonic() < end:
            before = time.monotonic()
            gevent.sleep(0.001)
            late.append(time.monotonic() - before - 0.001)

    rows: list[dict[str, float]] = []
    start = time.monotonic()
    running = [gevent.spawn(work) for _ in range(AT_ONCE)] + [gevent.spawn(sleep)]
    while time.monotonic() < end:
        gevent.sleep(1)
        some, late[:] = sorted(late), []
        rows.append(
            {
                "seconds": round(time.monotonic() - start, 1),
                "resident MiB": int(Path("/proc/self/statm").read_text().split()[1])
                * _PAGE
                / 2**20,
                "descriptors": len(os.listdir("/proc/self/fd")) - 1,
                "pipe pages": pipe_pages(),
                "longest stall, ms": some[-1] * 1000 if some else 0,
                "stall p99, ms": some[len(some) * 99 // 100] * 1000 if some else 0,
                "transfers": sum(mixed.ended.values()),
            }
        )
    for greenlet in running:
        greenlet.get(timeout=60)
    gevent.sleep(0.1)
    return {
        "rows": rows,
        "strays": mixed.strays,
        "ended": mixed.ended,
        "stats": gsplice.stats().as_dict(),
    }


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in rows[0] if name not in ("seconds", "transfers")]
    figure, axes = plt.subplots(len(names), sharex=True, figsize=(9, 2 * len(names)))
    for axis, name in zip(axes, names, strict=True):
        axis.plot([row["seconds"] / 60 for row in rows], [row[name] for row in rows], linewidth=0.8)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        figures = soak(float(sys.argv[1]), Path(name))
    Path(sys.argv[2]).write_text(json.dumps(figures))
    if len(sys.argv) > 3:
        plot(figures["rows"], Path(sys.argv[3]))
