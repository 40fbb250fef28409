"""A pipe from the pool and back, against making one and closing it."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import threading
import time
from collections.abc import Callable

import gevent
from _measure import MiB, Report, Sample, alternate, timed

from gsplice.pipes import acquire, release

MOST_PER_CENT = 3.0


def from_pool(number: int) -> None:
    for _ in range(number):
        release(acquire())


def from_kernel(number: int) -> None:
    for _ in range(number):
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, MiB)
        os.close(read_fd)
        os.close(write_fd)


def one_hub(work: Callable[[int], None], number: int) -> Sample:
    sample = timed(lambda: work(number))
    return Sample(sample.elapsed / number, sample.cpu / number)


def two_hubs(work: Callable[[int], None], number: int) -> Sample:
    """Work in two native threads at once, each with its hub; the time is what each thread sees."""
    times: list[Sample] = []
    barrier = threading.Barrier(2)

    def thread() -> None:
        gevent.get_hub()
        work(1)
        barrier.wait()
        cpu, start = time.thread_time(), time.perf_counter()
        work(number)
        times.append(Sample(time.perf_counter() - start, time.thread_time() - cpu))
        barrier.wait()
        gevent.get_hub().destroy(destroy_loop=True)

    threads = [threading.Thread(target=thread) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return Sample(*(sum(several) / 2 / number for several in zip(*times, strict=True)))


def blocks_kept(number: int) -> float:
    """Return how many blocks of memory a call keeps, on average."""
    from_pool(100)
    gc.collect()
    before = sys.getallocatedblocks()
    from_pool(number)
    gc.collect()
    return (sys.getallocatedblocks() - before) / number


def main() -> None:
    report = Report(__doc__)
    gevent.get_hub()
    less = 10 if report.quick else 1
    rows = []
    # Short rounds, that seldom lose the processor; but two threads change over every 5 ms only.
    for label, run, rounds, many, few in (
        ("one hub", one_hub, 1_000 // less, 2_000, 100),
        ("two threads, each its hub", two_hubs, 40 // less, 100_000, 5_000),
    ):
        medians = alternate(
            {
                "kernel": lambda run=run, few=few: run(from_kernel, few),
                "pool": lambda run=run, many=many: run(from_pool, many),
            },
            rounds,
        )
        for clock in Sample._fields:
            kernel, pool = (getattr(medians[name], clock) * 1e9 for name in ("kernel", "pool"))
            share = 100 * pool / kernel
            what = f"{label}, {clock}"
            held_to = report.target(what, share, most=MOST_PER_CENT)
            rows.append([what, round(kernel), round(pool), share, held_to])
    head = ["", "make and close ns", "acquire and release ns", "per cent", "target"]
    report.table("One operation, median of all rounds", head, rows)
    kept = blocks_kept(1_000_000 // less)
    report.figures["blocks of memory kept per call"] = kept
    print(f"\n  blocks of memory kept per call: {kept:.4f}")
    report.close()


if __name__ == "__main__":
    main()
