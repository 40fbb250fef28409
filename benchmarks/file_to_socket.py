"""Ways to move a file in the page cache to a TCP socket: gevent's, gsplice's, and the limits.

And to a blocking pipe, where a file is read and written: what it costs not to wait inside write(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _loops
from _measure import (
    GiB,
    KiB,
    MiB,
    Report,
    Sample,
    alternate,
    drained,
    dropping_peer,
    in_turns,
    no_collections,
    pinned,
    timed,
)
from _words import in_words
from gevent.socket import socket as GeventSocket

import gsplice
from gsplice._ends.small import SMALL_FILE

SMALL_SIZES = (1, 100, 1 * KiB, 2 * KiB, 4 * KiB, 8 * KiB, 16 * KiB, 64 * KiB)
#: Up to this size several calls are one measurement, and together move so much at least.
AT_ONCE = 16 * MiB
PIPES = (64, 256, 1024)

gevent_sendfile: Callable[..., int] = GeventSocket.sendfile  # nothing is patched here

#: Of each of these sizes the least and the median of many rounds are compared with bare loops.
BARE_SIZES = (16 * MiB, 128 * MiB, GiB)

#: Moves the first so many bytes of the file, once.
Way = Callable[[int], object]
#: Moves the first so many bytes of it so often; returns what it took once.
Side = Callable[[int, int], Sample]

# <sys/socket.h>, <linux/errqueue.h>: not in Python's socket module everywhere.
SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000


def main() -> None:
    report = Report(__doc__)
    # /tmp is often in memory, where other rules apply.
    place = os.environ.get("TMPDIR", "/var/tmp")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        sock = stack.enter_context(dropping_peer(stack.enter_context(pinned(report))))
        small_files(report, sock, directory / "small")
        all_sizes(report, sock, directory)
        pipes(report, directory / "big")
    report.close()


def all_sizes(report: Report, sock: Any, directory: Path) -> None:
    sizes = report.pick(
        (KiB, 4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB, MiB, 16 * MiB, 128 * MiB, GiB),
        (KiB, 16 * KiB, 64 * KiB, MiB, 64 * MiB),
        (KiB, 128 * KiB),
    )
    path = directory / "big"
    with path.open("wb") as file:
        left = sizes[-1]
        while left:
            left -= file.write(random.randbytes(min(left, MiB)))
        file.flush()
        os.fsync(file.fileno())  # or the disk would be written to meanwhile
    with contextlib.ExitStack() as stack:
        loops = gevent_loops(stack, sock, path)
        sides = {**gevent_ways(sock, path), **loops, **python_ways(stack, sock, path)}
        sides |= c_ways(stack, report, sock, directory, path)
        by_size = {size: one_size(report, size, sides) for size in sizes}
        for size in report.pick(BARE_SIZES, (16 * MiB, 64 * MiB), (128 * KiB,)):
            beside_bare_loops(report, size, {name: sides[name] for name in (*OURS, *loops)})
    pictures(report, by_size)
    targets(report, sizes[-1], by_size[sizes[-1]])


def one_size(report: Report, size: int, sides: dict[str, Side]) -> dict[str, Sample]:
    """Measure all ways with files of *size* bytes; return the medians, for one file."""
    rounds = report.pick(6 if size > AT_ONCE else 10, 3, 1)
    # Not more: gevent's ways open a file for each, and the limit is often 1,024.
    times = max(1, min(report.pick(500, 200, 2), report.pick(AT_ONCE, 4 * MiB, MiB) // size))
    medians = alternate(
        {name: lambda side=side: side(size, times) for name, side in sides.items()}, rounds
    )
    base = medians["gevent, unpatched"]
    rows = [
        [
            name,
            s.elapsed * 1e6,
            s.cpu * 1e6,
            s.cpu * GiB / size,
            size / GiB / s.elapsed,
            s.cpu / base.cpu,
            base.elapsed / s.elapsed,
        ]
        for name, s in medians.items()
    ]
    report.table(
        f"Files of {in_words(size)}, median of {rounds} rounds of {times}",
        ["", "us", "CPU us", "CPU s/GiB", "GiB/s", "CPU/gevent", "speed/gevent"],
        rows,
    )
    return medians


def beside_bare_loops(report: Report, size: int, sides: dict[str, Side]) -> None:
    """Print the least and the median of what files of *size* bytes cost.

    Ours is held to the bare loop of sendfile(2) by the better of the two: other work on the machine
    makes both worse, and seldom all rounds of one side only.
    """
    rounds = report.pick(25, 5, 1)
    samples = in_turns(
        {name: lambda side=side: side(size, 1) for name, side in sides.items()}, rounds
    )
    costs = {
        name: [
            least_or_median(s.cpu * GiB / size for s in each)
            for least_or_median in (min, statistics.median)
        ]
        for name, each in samples.items()
    }
    ratios = {
        name: [cost / base for cost, base in zip(each, costs[BARE_SENDFILE], strict=True)]
        for name, each in costs.items()
    }
    report.table(
        f"CPU seconds per GiB beside bare loops, files of {in_words(size)}, {rounds} rounds",
        ["", "least", "median", "least/sendfile", "median/sendfile"],
        [[name, *costs[name], *ratios[name]] for name in sides],
    )
    report.hold_to(
        f"file of {in_words(size)} to a socket: CPU/a bare gevent loop of sendfile, "
        "the better of least and median",
        min(ratios["gevent, gsplice"]),
        most=1.05,
    )


def fresh(path: Path) -> Any:
    """Open *path*: a file sent a second time may have its bytes in its buffer still."""
    return path.open("rb")


def gevent_ways(sock: Any, path: Path) -> dict[str, Side]:
    def side(sendfile: Callable[..., int], size: int, times: int) -> Sample:
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(fresh(path)) for _ in range(times)]

            def work() -> None:
                for file in files:
                    assert sendfile(sock, file, 0, size) == size

            sample = timed(work)
            drained(sock)
        return Sample(*(each / times for each in sample))

    def ours(size: int, times: int) -> Sample:
        before = gsplice.stats().bytes_spliced
        sample = side(gsplice.sendfile, size, times)
        if size > SMALL_FILE:
            spliced = gsplice.stats().bytes_spliced - before
            assert spliced >= 0.95 * size * times, f"{spliced} of {times} times {size} spliced"
        return sample

    return {
        "gevent, unpatched": lambda size, times: side(gevent_sendfile, size, times),
        "gevent, gsplice": ours,
    }


BARE_SENDFILE = "gevent, bare loop of sendfile"


def gevent_loops(stack: contextlib.ExitStack, sock: Any, path: Path) -> dict[str, Side]:
    """What gsplice can come near to: the system calls and gevent's waits, and nothing around."""
    fd = stack.enter_context(path.open("rb", buffering=0)).fileno()
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    stack.callback(os.close, null)
    held, emptied = (open_pipe(stack, _loops.CAPACITY, os.O_NONBLOCK) for _ in range(2))

    return repeated(
        sock,
        {
            BARE_SENDFILE: lambda size: _loops.by_sendfile(sock, fd, size),
            "gevent, bare splice, pipe held in waits": (
                lambda size: _loops.by_held_pipe(sock, fd, held, size)
            ),
            "gevent, bare splice, pipe emptied before waits": (
                lambda size: _loops.by_emptied_pipe(sock, fd, emptied, null, size)
            ),
        },
    )


def repeated(sock: Any, ways: dict[str, Way]) -> dict[str, Side]:
    """Return the sides for *ways* to send to *sock*."""

    def side(way: Way, size: int, times: int) -> Sample:
        def work() -> None:
            for _ in range(times):
                way(size)

        sample = timed(work)
        drained(sock)
        return Sample(*(each / times for each in sample))

    return {name: lambda *args, way=way: side(way, *args) for name, way in ways.items()}


def open_pipe(stack: contextlib.ExitStack, capacity: int, flags: int = 0) -> tuple[int, int]:
    pipe = os.pipe2(os.O_CLOEXEC | flags)
    for end in pipe:
        stack.callback(os.close, end)
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, capacity)
    return pipe


def blocking_socket(sock: Any) -> socket.socket:
    """Connect to the same receiver by a socket that has nothing to do with gevent."""
    return socket.create_connection(sock.getpeername())


def python_ways(stack: contextlib.ExitStack, sock: Any, path: Path) -> dict[str, Side]:
    """What plain Python can do, with blocking sockets and nothing around."""
    plain = stack.enter_context(blocking_socket(sock))
    file = stack.enter_context(path.open("rb", buffering=0))
    fd, to = file.fileno(), plain.fileno()

    def read_and_send(piece: int, size: int) -> None:
        offset = 0
        while offset < size:
            data = os.pread(fd, min(piece, size - offset), offset)
            plain.sendall(data)
            offset += len(data)

    def mmap_and_send(size: int) -> None:
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as data:
            plain.sendall(data)

    def sendfile(size: int) -> None:
        offset = 0
        while offset < size:
            offset += os.sendfile(to, fd, offset, size - offset)

    def splice(pipe: tuple[int, int], capacity: int, size: int) -> None:
        offset, (read_fd, write_fd) = 0, pipe
        while offset < size:
            held = os.splice(fd, write_fd, min(capacity, size - offset), offset_src=offset)
            offset += held
            while held:
                held -= os.splice(read_fd, to, held)

    ways: dict[str, Way] = {
        "Python, read and send 8 KiB": lambda size: read_and_send(8 * KiB, size),
        "Python, read and send 64 KiB": lambda size: read_and_send(64 * KiB, size),
        "Python, mmap and send": mmap_and_send,
        "Python, sendfile": sendfile,
    }
    for capacity in PIPES:
        pipe = open_pipe(stack, capacity * KiB)
        ways[f"Python, splice by {in_words(capacity * KiB)}"] = (
            lambda size, pipe=pipe, most=capacity * KiB: splice(pipe, most, size)
        )
    ways["Python, MSG_ZEROCOPY"] = zero_copy(plain, fd)
    return repeated(plain, ways)


def zero_copy(plain: socket.socket, fd: int) -> Way:
    """Return the way by MSG_ZEROCOPY of a mapped file (Documentation/networking/msg_zerocopy.rst).

    On the loopback device the kernel copies after all.
    """
    plain.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)

    def notes() -> int:
        """Take the notes that memory is no longer needed; each is for a range of calls."""
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                flags = socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT
                _, ((_, _, note),), _, _ = plain.recvmsg(1, 256, flags)
                first, last = (int.from_bytes(note[at : at + 4], sys.byteorder) for at in (8, 12))
                taken += last - first + 1
        return taken

    def way(size: int) -> None:
        calls = noted = offset = 0
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            while offset < size:
                with contextlib.suppress(OSError):  # ENOBUFS: too many notes not taken yet
                    offset += plain.send(view[offset : offset + MiB], MSG_ZEROCOPY)
                    calls += 1
                noted += notes()
            while noted < calls:
                time.sleep(0)
                noted += notes()

    return way


def c_ways(
    stack: contextlib.ExitStack, report: Report, sock: Any, directory: Path, path: Path
) -> dict[str, Side]:
    """The same in C."""
    if shutil.which("cc") is None:
        report.leave_out("the limits in C", "there is no cc")
        return {}
    program = directory / "ways"
    source = Path(__file__).with_name("ways.c")
    subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    compiler = subprocess.check_output(["cc", "-dumpfullversion"], text=True).strip()
    report.version("C compiler", compiler)
    plain = stack.enter_context(blocking_socket(sock))
    process = stack.enter_context(
        subprocess.Popen(
            [program, str(plain.fileno()), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[plain.fileno()],
            text=True,
        )
    )
    stack.callback(process.kill)

    def side(way: str, size: int, times: int) -> Sample:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{way} {size} {times}\n")
        process.stdin.flush()
        sample = Sample(*map(float, process.stdout.readline().split()))
        drained(plain)
        return Sample(*(each / times for each in sample))

    ways = {
        "C, read and send 8 KiB": "read8",
        "C, read and send 64 KiB": "read64",
        "C, mmap and send": "mmap",
        "C, sendfile": "sendfile",
        **{f"C, splice by {in_words(size * KiB)}": f"splice{size}" for size in PIPES},
        "C, MSG_ZEROCOPY": "zerocopy",
    }
    return {name: lambda *args, way=way: side(way, *args) for name, way in ways.items()}


OURS = ["gevent, gsplice"]


def pictures(report: Report, by_size: dict[int, dict[str, Sample]]) -> None:
    drawn = [
        "gevent, unpatched",
        "gevent, gsplice",
        "Python, read and send 64 KiB",
        "Python, sendfile",
        "C, read and send 64 KiB",
        "C, splice by 1 MiB",
        "C, sendfile",
    ]
    for name, what, y, value in (
        ("file_to_socket_cpu", "CPU time", "CPU seconds per GiB", lambda s, n: s.cpu * GiB / n),
        ("file_to_socket_speed", "throughput", "GiB per second", lambda s, n: n / GiB / s.elapsed),
    ):
        series: dict[str, dict[int, float]] = {}
        for size, medians in by_size.items():
            for way in drawn:
                if way in medians:
                    series.setdefault(way, {})[size] = value(medians[way], size)
        report.lines(name, f"A file to a socket: {what}", "size of the file", y, series, ours=OURS)
    size, medians = [*by_size.items()][-1]
    bars = {name: sample.cpu * GiB / size for name, sample in medians.items()}
    ordered = dict(sorted(bars.items(), key=lambda bar: bar[1]))
    title = f"Ways to send a file of {in_words(size)} (less is better)"
    report.bars("ways", title, "CPU seconds per GiB", {"": ordered}, ours=OURS)


WAITS = (
    "To ask whether the file is in the page cache costs 3 to 4 % (stalls.py); the rest are trips "
    "through the hub where C waits inside the call, when the socket is full and every 2 MiB"
)

RECEIVER = (
    "The receiver, on its own core, sleeps between pieces, and waking it is the sender's time"
)


def targets(report: Report, size: int, medians: dict[str, Sample]) -> None:
    ours, base = medians["gevent, gsplice"], medians["gevent, unpatched"]
    what = f"file of {in_words(size)} to a socket"
    report.hold_to(f"{what}: CPU/gevent", ours.cpu / base.cpu, most=0.35, cause=RECEIVER)
    report.hold_to(f"{what}: speed/gevent", base.elapsed / ours.elapsed, least=2.5, cause=RECEIVER)
    limits = [s.cpu for name, s in medians.items() if name.startswith("C, ")]
    if limits:
        report.hold_to(
            f"{what}: CPU/the best loop in C", ours.cpu / min(limits), most=1.1, cause=WAITS
        )


def small_files(report: Report, sock: Any, path: Path) -> None:
    rounds = report.pick(60, 12, 1)
    rows = []
    for size in report.pick(SMALL_SIZES, SMALL_SIZES[::2], SMALL_SIZES[:1]):
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
        held_to = report.target(
            f"file of {in_words(size)}: time/gevent", ratio, most=1.05, cost=True
        )
        rows.append([in_words(size), *medians, ratio, held_to])
    title = f"Small files, microseconds a call, median of {rounds} rounds of up to 200 calls"
    report.table(title, ["", "gevent", "gsplice", "ratio", "target"], rows)


def small_calls(
    sock: Any,
    path: Path,
    calls: list[Callable[..., int]],
    times: dict[Callable[..., int], list[int]],
) -> None:
    with contextlib.ExitStack() as stack, no_collections():
        files = [stack.enter_context(fresh(path)) for _ in calls]
        for call, file in zip(calls, files, strict=True):
            start = time.perf_counter_ns()
            call(sock, file)
            times[call].append(time.perf_counter_ns() - start)


LAST_CORE = max(os.sched_getaffinity(0))

TURNS = (
    "Where the pipe is full, gsplice goes through the hub: 8 us a time under libev, 90 under libuv"
)


def pipes(report: Report, path: Path) -> None:
    """Copy to a reader on another core; this process stays where it is."""
    size, rounds = report.pick(24 * MiB, 24 * MiB, 128 * KiB), report.pick(11, 5, 1)
    copies: dict[str, Callable[[Any, Any], object]] = {
        "gevent": shutil.copyfileobj,  # nothing is patched here
        "gsplice": gsplice.copyfileobj,
    }
    os.truncate(path, size)
    rows = []
    for name, opened in (("os.pipe()", os_pipe), ("stdin of a subprocess", stdin)):
        sides = {
            side: lambda copy=copy, opened=opened: to_pipe(copy, opened, path)
            for side, copy in copies.items()
        }
        before = gsplice.stats().bytes_copied
        samples = in_turns(sides, rounds)
        assert gsplice.stats().bytes_copied == before + (1 + rounds) * size
        least = {side: min(sample.cpu for sample in samples[side]) for side in sides}
        median = {side: statistics.median(s.cpu for s in samples[side]) for side in sides}
        ratio = median["gsplice"] / median["gevent"]
        what = f"file of {in_words(size)} to {name}: CPU/gevent"
        held_to = report.target(what, ratio, most=1.2, cause=TURNS)
        figures = [1000 * by[side] for side in sides for by in (least, median)]
        rows.append([name, *figures, least["gsplice"] / least["gevent"], ratio, held_to])
    report.table(
        f"{in_words(size)} to blocking pipes, CPU milliseconds, {rounds} rounds",
        [
            "",
            "gevent, least",
            "median",
            "gsplice, least",
            "median",
            "CPU/gevent, least",
            "median",
            "target for the median",
        ],
        rows,
    )


def to_pipe(copy: Callable[[Any, Any], object], opened: Any, path: Path) -> Sample:
    with path.open("rb") as src, opened() as dst:
        time.sleep(0.02)  # so that the reader waits already
        return timed(lambda: copy(src, dst))


@contextlib.contextmanager
def os_pipe() -> Iterator[Any]:
    read_fd, write_fd = os.pipe()
    with open(write_fd, "wb") as dst, reader(read_fd):
        os.close(read_fd)
        yield dst
        dst.close()


@contextlib.contextmanager
def stdin() -> Iterator[Any]:
    with reader(subprocess.PIPE) as process:
        yield process.stdin


def reader(source: int) -> subprocess.Popen[bytes]:
    """Start a process that reads all from *source*, on the last core."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LAST_CORE})
    try:
        return subprocess.Popen(["sh", "-c", "exec cat >/dev/null"], stdin=source)
    finally:
        os.sched_setaffinity(0, ours)


if __name__ == "__main__":
    main()
