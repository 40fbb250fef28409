"""How long the hub stands still while files come from slow disks: gevent and gsplice."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.event
import gevent.socket
from _measure import (
    KiB,
    MiB,
    Report,
    Sample,
    alternate,
    drained,
    dropping_peer,
    in_turns,
    medians,
    timed,
)
from gevent.socket import socket as GeventSocket

import gsplice
from gsplice._ends.page_cache import Residency
from gsplice._move.account import PIECE
from gsplice.config import settings

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from slowfs import SlowFS

DELAY = 0.05
BEAT = 0.001
#: The fast file of a crowd is asked for when the slow ones are amid a read.
HEAD_START = 2.5 * DELAY

Copy = Callable[[Any, Any], object]  # from, to

gevent_sendfile: Callable[..., int] = GeventSocket.sendfile  # nothing is patched here
gevent_copyfileobj: Callable[..., None] = shutil.copyfileobj

SENDFILE: dict[str, Copy] = {
    "gevent": lambda src, sock: gevent_sendfile(sock, src),
    "gsplice": lambda src, sock: gsplice.sendfile(sock, src),
}
COPYFILEOBJ: dict[str, Copy] = {"gevent": gevent_copyfileobj, "gsplice": gsplice.copyfileobj}


class Beats(NamedTuple):
    """How long a piece of work took, and how late a greenlet woke up meanwhile; seconds."""

    elapsed: float
    p50: float
    p99: float
    longest: float


#: Way -> side -> the median.
Found = dict[str, dict[str, Beats]]


class Served(NamedTuple):
    """The same of many files at once, and after how long the fast one among them was sent."""

    elapsed: float
    p50: float
    p99: float
    longest: float
    fast: float


def main() -> None:
    report = Report(__doc__)
    with contextlib.ExitStack() as stack:
        # /tmp is often in memory.
        place = os.environ.get("TMPDIR", "/var/tmp")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        sock = stack.enter_context(dropping_peer())
        command = ["findmnt", "-no", "FSTYPE", "-T", directory]
        kind = subprocess.check_output(command, text=True).strip()
        report.figures["filesystem"] = kind
        print(f"files in {place} ({kind})")
        heartbeat_alone(report)
        found: dict[str, Found] = {}
        with mounted(report, directory / "slow", DELAY) as slow:
            if slow:
                found["FUSE, 50 ms a read"] = slow_file(report, sock, slow, directory / "copy")
                crowd(report, sock, slow, directory / "fast", kind)
                if Path("/dev/shm").is_dir():
                    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
                        crowd(report, sock, slow, Path(memory, "fast"), "tmpfs")
        size = report.pick(256, 64, 4) * MiB
        big = filled(directory / "big", size)
        found["cold"] = cold_file(report, sock, big, directory / "copy", kind)
        found["hot"] = hot_file(report, sock, big, directory / "copy", kind)
        picture(report, found)
        price(report, sock, big, kind, most=1.03)
        with mounted(report, directory / "warm", 0) as warm:
            if warm:
                filled(warm.directory / "big", size)
                price(report, sock, warm.mount / "big", "FUSE", most=1.1, cause=A_JOB, pairs=300)
    report.close()


def picture(report: Report, found: dict[str, Found]) -> None:
    panels = {
        place: {
            f"{side}, {what}": 1000 * beats.longest
            for what, by in ways.items()
            for side, beats in by.items()
        }
        for place, ways in found.items()
    }
    ours = [name for name in panels["hot"] if name.startswith("gsplice")]
    title = "How long the hub stands still while a file is sent or copied (less is better)"
    report.bars("stalls", title, "longest stall, ms", panels, ours)


@contextlib.contextmanager
def mounted(report: Report, place: Path, delay: float) -> Iterator[SlowFS | None]:
    """Mount a filesystem that sleeps *delay* seconds in each read, or say why not."""
    place.mkdir()
    with contextlib.ExitStack() as stack:
        slow = None
        try:
            if importlib.util.find_spec("fuse") is None:
                raise RuntimeError("fusepy is not installed")
            if shutil.which("fusermount3") is None:
                raise RuntimeError("there is no fusermount3")
            slow = stack.enter_context(SlowFS(place, "--delay", str(delay)))
        except (AssertionError, RuntimeError) as err:
            report.leave_out("all on a slow disk", str(err))
        yield slow


def filled(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(random.randbytes(min(size, MiB)))
    return path


def drop(path: Path) -> None:
    """Have the page cache forget *path*."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # what is dirty would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def beats_during(work: Callable[[], object]) -> Beats:
    """Do *work* while a greenlet keeps sleeping for a millisecond and notes how late it wakes."""
    late: list[float] = []
    done = gevent.event.Event()

    def heart() -> None:
        while not done.is_set():
            start = time.perf_counter()
            gevent.sleep(BEAT)
            late.append(time.perf_counter() - start - BEAT)

    greenlet = gevent.spawn(heart)
    gevent.sleep(10 * BEAT)
    late.clear()
    elapsed = timed(work).elapsed
    done.set()
    greenlet.join()  # it is asleep: if *work* has kept it from waking, it has to tell
    late.sort()
    p50, p99 = (late[math.ceil(share * len(late)) - 1] for share in (0.5, 0.99))
    return Beats(elapsed, p50, p99, late[-1])


def heartbeat_alone(report: Report) -> None:
    """What the machine itself does to a heartbeat."""
    rounds = report.pick(6, 2, 1)
    samples = in_turns({"nothing": lambda: beats_during(lambda: gevent.sleep(0.5))}, rounds)
    title = f"The heartbeat with nothing to disturb it, median of {rounds} rounds"
    report.table(title, BEATS_HEAD, [beats_row("nothing", samples["nothing"])])


BEATS_HEAD = ("", "seconds", "p50 ms", "p99 ms", "longest ms", "worst round")


def beats_row(name: str, samples: Sequence[Any]) -> list[object]:
    median = medians(samples)
    in_ms = [1000 * late for late in (median.p50, median.p99, median.longest)]
    return [name, median.elapsed, *in_ms, 1000 * max(sample.longest for sample in samples)]


def copies(
    report: Report, sock: Any, src: Path, dst: Path, title: str, rounds: int, *, hot: bool = False
) -> Found:
    """Copy *src*, cold each time or *hot*, in all ways; print the table; return the medians."""

    def side(copy: Copy, to_file: bool, makefile: bool) -> Beats:
        if not hot:
            drop(src)
        with contextlib.ExitStack() as stack:
            # Opening and closing may wait for a disk: what is measured is what comes between.
            file = stack.enter_context(src.open("rb"))
            to: Any = sock
            if to_file:
                stack.callback(dst.unlink)
                to = stack.enter_context(dst.open("wb"))
            elif makefile:
                to = stack.enter_context(sock.makefile("wb"))

            def work() -> None:
                copy(file, to)
                if to is not sock:
                    to.flush()

            beats = beats_during(work)
            drained(sock)
            return beats

    found: Found = {}
    rows = []
    for what, copiers, to_file, makefile in (
        ("sendfile", SENDFILE, False, False),
        ("copyfileobj to a socket", COPYFILEOBJ, False, True),
        ("copyfileobj to a file", COPYFILEOBJ, True, False),
    ):
        sides = {
            name: lambda copy=copy, f=to_file, m=makefile: side(copy, f, m)
            for name, copy in copiers.items()
        }
        samples = in_turns(sides, rounds, warm_up=report.pick(1, 0, 0))
        found[what] = {name: medians(several) for name, several in samples.items()}
        base = found[what]["gevent"].elapsed
        rows += [
            [*beats_row(f"{what}, {name}", several), medians(several).elapsed / base]
            for name, several in samples.items()
        ]
    report.table(title, [*BEATS_HEAD, "time/gevent"], rows)
    return found


def slow_file(report: Report, sock: Any, slow: SlowFS, dst: Path) -> Found:
    size, rounds = report.pick((8 * MiB, 6), (MiB, 1), (256 * KiB, 1))
    filled(slow.directory / "slow", size)
    title = (
        f"A file of {size // MiB} MiB, {1000 * DELAY:g} ms for each read, median of {rounds} rounds"
    )
    found = copies(report, sock, slow.mount / "slow", dst, title, rounds)
    for what, by in found.items():
        stock, ours = by["gevent"], by["gsplice"]
        report.hold_to(f"slow disk, {what}: longest ms", 1000 * ours.longest, most=25)
        report.hold_to(f"slow disk, {what}: p99 ms", 1000 * ours.p99, most=3)
        report.hold_to(f"slow disk, {what}: time/gevent", ours.elapsed / stock.elapsed, most=1.05)
    return found


def hot_file(report: Report, sock: Any, src: Path, dst: Path, kind: str) -> Found:
    size, rounds = src.stat().st_size, report.pick(8, 2, 1)
    with src.open("rb") as file:
        while file.read(MiB):  # into the page cache
            pass
    title = f"A hot file of {size // MiB} MiB on {kind}, median of {rounds} rounds"
    return copies(report, sock, src, dst, title, rounds, hot=True)


COPY_FILE_RANGE = (
    "A bare loop of copy_file_range(2) takes 1.02 to 1.16 of the time of read and write on this "
    "disk"
)


def cold_file(report: Report, sock: Any, src: Path, dst: Path, kind: str) -> Found:
    size, rounds = src.stat().st_size, report.pick(8, 2, 1)
    title = f"A cold file of {size // MiB} MiB on {kind}, median of {rounds} rounds"
    found = copies(report, sock, src, dst, title, rounds)
    for what, by in found.items():
        stock, ours = by["gevent"], by["gsplice"]
        report.hold_to(f"cold, {what}: longest/gevent", ours.longest / stock.longest, most=0.1)
        report.hold_to(
            f"cold, {what}: time/gevent",
            ours.elapsed / stock.elapsed,
            most=1.0,
            cause=COPY_FILE_RANGE if what == "copyfileobj to a file" else "",
        )
    return found


def crowd(report: Report, sock: Any, slow: SlowFS, fast: Path, kind: str) -> None:
    """Ten files on a slow disk at once, and one on another that is asked for a little later."""
    size, rounds = 512 * KiB, report.pick(6, 1, 1)
    ten = [slow.mount / str(number) for number in range(10)]
    for path in ten:
        filled(slow.directory / path.name, size)
    filled(fast, 4 * MiB)
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(gevent.socket.create_connection(sock.getpeername())) for _ in ten
        ]

        def side(copy: Copy, crowd: list[Path]) -> Served:
            for path in (*crowd, fast):
                drop(path)
            with contextlib.ExitStack() as opened:
                files = [opened.enter_context(path.open("rb")) for path in crowd]
                fast_file = opened.enter_context(fast.open("rb"))
                sent = math.nan

                def work() -> None:
                    due = time.perf_counter() + HEAD_START

                    def late_comer() -> None:
                        nonlocal sent
                        gevent.sleep(HEAD_START)
                        copy(fast_file, sock)
                        sent = time.perf_counter() - due

                    greenlets = [
                        gevent.spawn(copy, file, to) for file, to in zip(files, socks, strict=False)
                    ]
                    greenlets.append(gevent.spawn(late_comer))
                    gevent.joinall(greenlets, raise_error=True)

                beats = beats_during(work)
                for each in (sock, *socks):
                    drained(each)
                return Served(*beats, sent)

        samples = in_turns(
            {
                f"{name}, {what}": lambda copy=copy, crowd=crowd: side(copy, crowd)
                for name, copy in SENDFILE.items()
                for what, crowd in (("alone", []), ("among ten", ten))
            },
            rounds,
            warm_up=report.pick(1, 0, 0),
        )
    fast.unlink()
    title = (
        f"A file of 4 MiB on {kind}, dropped from the cache, among ten of {size // KiB} KiB "
        f"on the slow disk, median of {rounds} rounds"
    )
    rows = [[*beats_row(name, each), 1000 * medians(each).fast] for name, each in samples.items()]
    report.table(title, [*BEATS_HEAD, "fast file ms"], rows)
    ours = medians(samples["gsplice, among ten"])
    report.hold_to(f"ten slow files and one on {kind}: longest ms", 1000 * ours.longest, most=25)
    report.hold_to(f"ten slow files and one on {kind}: p99 ms", 1000 * ours.p99, most=3)


A_JOB = "Nobody can say whether a file on FUSE is in the page cache, so a thread sends it"


def price(
    report: Report,
    sock: Any,
    path: Path,
    kind: str,
    most: float,
    cause: str = "",
    pairs: int = 1000,
) -> None:
    """What it costs to ask whether a file is in the page cache that is."""
    size, pairs = path.stat().st_size, pairs // report.pick(1, 20, 100)
    # One call can take four times as long as the next, by what the receiver is doing: hence many.
    part = 16 * MiB
    with path.open("rb") as file:

        def side(offload: str, offset: int) -> Sample:
            settings.offload = offload
            file.seek(offset)  # an offset of 0 means the position
            sample = timed(lambda: gsplice.sendfile(sock, file, 0, part))
            settings.offload = "auto"
            drained(sock)
            return sample

        def questions() -> int:
            residency, fd, offset = Residency(os.fstat(file.fileno())), file.fileno(), 0
            while cached := residency.cached(fd, offset, min(PIECE, size - offset)):
                offset += cached
            return offset

        while file.read(MiB):  # into the page cache
            pass
        offsets = {policy: itertools.cycle(range(0, size, part)) for policy in ("never", "auto")}
        before = gsplice.stats().offloads
        by = alternate(
            {policy: lambda p=policy, o=each: side(p, next(o)) for policy, each in offsets.items()},
            pairs,
        )
        jobs = gsplice.stats().offloads - before
        alone = alternate({"": lambda: timed(questions)}, 20)[""]
        asked = questions()

    never, auto = (Sample(*(size / part * each for each in by[policy])) for policy in offsets)
    lines = {"never": never, "auto": auto}
    if asked == size:  # else a page has left the cache
        lines["the questions alone"] = alone
    rows = [
        [name, 1000 * s.elapsed, 1000 * s.cpu, s.elapsed / never.elapsed, s.cpu / never.cpu]
        for name, s in lines.items()
    ]
    title = (
        f"{size // MiB} MiB in the page cache on {kind}, offload=auto against never, "
        f"median of {pairs} pairs of calls of {part // MiB} MiB"
    )
    report.table(title, ["", "ms", "CPU ms", "time/never", "CPU/never"], rows)
    print(f"  jobs for threads: {jobs}")
    report.figures[f"{title}: jobs"] = jobs
    for clock in Sample._fields:
        ratio = getattr(auto, clock) / getattr(never, clock)
        report.hold_to(
            f"warm file on {kind}: {clock}, auto/never", ratio, most=most, cause=cause, cost=True
        )


if __name__ == "__main__":
    main()
