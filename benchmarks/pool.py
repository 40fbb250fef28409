"""A pipe from the pool and back, against making and closing one, and against simpler pools."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from _measure import MiB, Report, Sample, alternate, timed

from gsplice import pipes
from gsplice.config import settings

MOST_PER_CENT = 2.0 if sys.version_info >= (3, 11) else 3.0
CAUSE = (
    "A bare list's pop and append take a part of that; finding the thread's list, two calls "
    "of Python functions and the account of the pipe (empty, idle, uses, room) come on top"
)
#: Of Go's own change from making pipes to a pool (internal/poll, sync.Pool), microseconds.
GO_QUOTED = (1.36, 0.02)
#: Reclamation is run once in so many operations: far more often than collections and timers do.
RECLAIM_EVERY = 1000

Work = Callable[[int], None]
Pair = tuple[int, int]


def make() -> Pair:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, MiB)
    return read_fd, write_fd


def close(pipe: Pair) -> None:
    for fd in pipe:
        os.close(fd)


class LinkedList:
    """The simplest pool: a linked list with one lock, which keeps what it is given for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._head: Any = None

    def acquire(self) -> Pair:
        with self._lock:
            if self._head is not None:
                pipe, self._head = self._head
                return pipe  # type: ignore[no-any-return]
        return make()

    def release(self, pipe: Pair) -> None:
        with self._lock:
            self._head = (pipe, self._head)

    def clear(self) -> None:
        while self._head is not None:
            close(self.acquire())


linked = LinkedList()
bare: list[Any] = [None] * 8  # more than there are threads


def from_kernel(number: int) -> None:
    for _ in range(number):
        close(make())


def from_list(number: int) -> None:
    acquire, release = linked.acquire, linked.release
    for _ in range(number):
        release(acquire())


def from_bare_list(number: int) -> None:
    """The least that Python can do, without any account of what is lent."""
    pop, append = bare.pop, bare.append
    for _ in range(number):
        append(pop())


def from_pool(number: int) -> None:
    acquire, release = pipes.acquire, pipes.release
    for _ in range(number):
        release(acquire())


def from_reclaimed_pool(number: int) -> None:
    for _ in range(max(1, number // RECLAIM_EVERY)):
        from_pool(min(number, RECLAIM_EVERY))
        pipes.reclaim()


#: What is measured, and how many operations are worth as much time as one of the kernel's.
WAYS: dict[str, tuple[Work, int]] = {
    "make and close each time": (from_kernel, 1),
    "linked list, one lock": (from_list, 20),
    "bare list, no account": (from_bare_list, 20),
    "gsplice": (from_pool, 20),
    "gsplice, reclaiming": (from_reclaimed_pool, 20),
}


def hubs(threads: int, work: Work, number: int) -> Sample:
    """Work in native threads at once, each with its hub; return what an operation took of each."""
    if threads == 1:
        sample = timed(lambda: work(number))
        return Sample(sample.elapsed / number, sample.cpu / number)
    times: list[Sample] = []
    barrier = threading.Barrier(threads)

    def thread() -> None:
        gevent.get_hub()
        work(1)
        barrier.wait()
        cpu, start = time.thread_time(), time.perf_counter()
        work(number)
        times.append(Sample(time.perf_counter() - start, time.thread_time() - cpu))
        barrier.wait()
        gevent.get_hub().destroy(destroy_loop=True)

    workers = [threading.Thread(target=thread) for _ in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    return Sample(*(sum(several) / threads / number for several in zip(*times, strict=True)))


def operations(report: Report) -> None:
    bars: dict[str, dict[str, float]] = {}
    for threads in (1, 2, 4):
        label = "one hub" if threads == 1 else f"{threads} threads, each its hub"
        # Short rounds, that seldom lose the processor; but threads change over every 5 ms only.
        rounds, few = (
            report.pick((500, 100), (50, 100), (2, 10))
            if threads == 1
            else report.pick((20, 5_000), (3, 2_000), (1, 10))
        )
        medians = alternate(
            {
                name: lambda work=work, n=threads, many=few * many: hubs(n, work, many)
                for name, (work, many) in WAYS.items()
            },
            rounds,
        )
        kernel = medians["make and close each time"]
        rows = []
        for name, sample in medians.items():
            elapsed, cpu = sample.elapsed * 1e9, sample.cpu * 1e9
            share = 100 * sample.cpu / kernel.cpu
            held_to = ""
            if name == "gsplice":
                held_to = report.target(
                    f"pool, {label}: per cent of the CPU of making and closing",
                    share,
                    most=MOST_PER_CENT,
                    cause=CAUSE,
                    cost=True,
                )
            rows.append([name, round(elapsed), round(cpu), share, held_to])
        head = ["", "ns", "ns of CPU", "per cent of making", "target"]
        report.table(f"One operation, {label}, median of {rounds} rounds", head, rows)
        bars[label] = {name: sample.cpu * 1e9 for name, sample in medians.items()}
    report.bars(
        "pool",
        "To have a pipe of 1 MiB and give it back",
        "ns of CPU for one operation",
        bars,
        ours=[name for name in WAYS if name.startswith("gsplice")],
    )


def room_of_pipes() -> tuple[int, int]:
    """Return how many pipes this process has open, and their capacity in bytes."""
    ends, capacity = set(), 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("pipe:") and target not in ends:
                ends.add(target)
                capacity += fcntl.fcntl(int(name), fcntl.F_GETPIPE_SZ)
    return len(ends), capacity


def kept_after_burst(report: Report) -> None:
    """What stays open after as many transfers at once as the pool has pipes."""
    burst = report.pick(settings.max_pipes, settings.max_pipes, 20)
    before = room_of_pipes()
    rows = []

    def note(name: str) -> None:
        number, room = (now - then for now, then in zip(room_of_pipes(), before, strict=True))
        rows.append([name, number, room / MiB])

    for pair in [make() for _ in range(burst)]:
        close(pair)
    note("make and close each time")
    for pair in [linked.acquire() for _ in range(burst)]:
        linked.release(pair)
    note("linked list, for ever")
    linked.clear()
    for pipe in [pipes.acquire() for _ in range(burst)]:
        assert pipe is not None
        pipes.release(pipe)
    note("gsplice, at once")
    gc.collect()
    gc.collect()
    note("gsplice, reclaimed: after two full collections, or 20 s")
    report.table(f"Kept after {burst} at once", ["", "pipes", "MiB of pipe room"], rows)


def blocks_kept(report: Report) -> None:
    """How many blocks of memory a call keeps, on average."""
    number = report.pick(1_000_000, 100_000, 1_000)
    from_pool(100)
    gc.collect()
    before = sys.getallocatedblocks()
    from_pool(number)
    gc.collect()
    kept = (sys.getallocatedblocks() - before) / number
    report.figures["blocks of memory kept per call"] = kept
    print(f"\n  blocks of memory kept per call: {kept:.4f}")


def go(report: Report) -> None:
    """The same in Go, as its internal/poll does it, beside what Go says of it."""
    rows: list[list[object]] = [["quoted from Go's own change", *GO_QUOTED]]
    if shutil.which("go") is None:
        report.leave_out("Go's pool", "there is no go")
    elif report.options.check:
        report.leave_out("Go's pool", "it takes long to compile")
    else:
        with tempfile.TemporaryDirectory() as directory:
            program = Path(directory, "pool")
            subprocess.run(
                ["go", "build", "-o", program, Path(__file__).with_name("pool_in_go.go")],
                check=True,
                env=os.environ | {"GO111MODULE": "off"},
            )
            effort = report.pick("500ms", "50ms", "1ms")
            found = json.loads(subprocess.check_output([program, effort]))
        report.version("Go", found["version"])
        for label, per_operation in found["microseconds"].items():
            rows.append([f"here, {label}", *per_operation])
    report.table("In Go, microseconds", ["", "make and close", "pool"], rows)


def main() -> None:
    report = Report(__doc__)
    gevent.get_hub()
    kept_after_burst(report)  # first: nothing is in the pool yet
    operations(report)
    blocks_kept(report)
    go(report)
    report.close()


if __name__ == "__main__":
    main()
