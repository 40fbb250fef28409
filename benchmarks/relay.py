"""A relay between two TCP connections: unpatched gevent, gsplice, asyncio, uvloop, Go, HAProxy, C.

Client, relay and backend are processes of their own; the backend drops what it gets, or echoes it.
What is not installed is left out.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import resource
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import gevent
import gevent.socket
from _measure import GiB, KiB, MiB, Report, Sample, alternate, in_turns
from _relays import Relay, in_python, installed
from gevent.server import StreamServer

SIZES = (1, 200, 4 * KiB, 60_000, 400_000)
DROP, DROP_OF_MANY, ECHO = b"D", b"M", b"E"
READY = b"R"
CONNECTIONS = (1, 50, 500, 2000)
#: Of the process that holds most: two sockets, and in C a pipe in each direction.
DESCRIPTORS = 6
HEADER = struct.Struct("<cI")
COUNT = struct.Struct("<Q")


class Latency(NamedTuple):
    """Seconds for a message to go there and back."""

    p50: float
    p99: float


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        {"threads": serve_threads, "gevent": serve_many}[sys.argv[2]]()
        return
    report = Report(__doc__)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # the relays inherit it
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(serving("threads"))
        relays = installed(report, stack, backend)
        bulk(report, relays)
        ping_pong(report, relays)
        fairness(report, {name: relays[name] for name in ("gevent", "gsplice")}, backend)
        threads(report, stack, backend)
        many(report, relays, limit)
    idle(report, limit)
    report.close()


# ---- peers


@contextlib.contextmanager
def serving(kind: str) -> Iterator[int]:
    """Run a backend; its port."""
    command = [sys.executable, __file__, "--serve", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def serve_threads() -> None:
    """Serve each connection in a native thread: the backend should not be what is measured."""
    many = selectors.EpollSelector()
    threading.Thread(target=drop_many, args=[many], daemon=True).start()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=[connection, many], daemon=True).start()


def drop_many(selector: selectors.BaseSelector) -> None:
    """Drop what comes on all of these connections: a thread for each would be the slowest part."""
    recv, total = ctypes.CDLL(None, use_errno=True).recv, collections.Counter[int]()
    while True:
        for key, _ in selector.select():
            if (number := recv(key.fd, None, 4 * MiB, socket.MSG_TRUNC)) > 0:
                total[key.fd] += number
                continue
            selector.unregister(key.fd)
            with key.data as connection, contextlib.suppress(OSError):
                connection.sendall(COUNT.pack(total.pop(key.fd, 0)))


def answer(connection: socket.socket, many: selectors.BaseSelector) -> None:
    with connection, contextlib.suppress(OSError, struct.error):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind, size = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
        connection.sendall(READY)
        if kind == DROP:
            recv, total = ctypes.CDLL(None, use_errno=True).recv, 0
            while (number := recv(connection.fileno(), None, 4 * MiB, socket.MSG_TRUNC)) > 0:
                total += number
            connection.sendall(COUNT.pack(total))
        elif kind == DROP_OF_MANY:
            theirs = connection.dup()
            many.register(theirs, selectors.EVENT_READ, theirs)
        else:
            buffer = memoryview(bytearray(size))
            while receive(connection, buffer):
                connection.sendall(buffer)


def serve_many() -> None:
    """Echo on thousands of connections."""

    def echo(connection: Any, address: object) -> None:
        while data := connection.recv(65536):
            connection.sendall(data)

    server = StreamServer(("127.0.0.1", 0), echo, backlog=1024)
    server.start()
    print(server.server_port, flush=True)
    gevent.wait()


def receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill *buffer*; False at the end."""
    while buffer:
        number = connection.recv_into(buffer)
        if not number:
            return False
        buffer = buffer[number:]
    return True


def connect(relay: Relay, kind: bytes, size: int = 0) -> socket.socket:
    """Return a connection that has reached the backend."""
    sock = socket.create_connection(("127.0.0.1", relay.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(HEADER.pack(kind, size))
    assert sock.recv(1) == READY
    return sock


class Source:
    """Sends without copying: the sender should not be what is measured either."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("source")
        os.write(self.fd, os.urandom(16 * MiB))

    def send(self, sock: socket.socket, size: int) -> None:
        while size:
            size -= os.sendfile(sock.fileno(), self.fd, 0, min(size, 16 * MiB))

    def send_all(self, socks: Sequence[socket.socket], size: int) -> None:
        """Send *size* bytes on each of *socks* at once, and their ends."""
        left = dict.fromkeys(socks, size)
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_WRITE, sock)
            while left:
                for key, _ in selector.select():
                    sock = key.data
                    piece = min(left[sock], 16 * MiB)
                    with contextlib.suppress(BlockingIOError):  # TCP is short of memory
                        left[sock] -= os.sendfile(sock.fileno(), self.fd, 0, piece)
                    if not left[sock]:
                        del left[sock]
                        selector.unregister(sock)
                        sock.setblocking(True)
                        sock.shutdown(socket.SHUT_WR)


# ---- what is measured


def bulk(report: Report, relays: dict[str, Relay]) -> None:
    size, rounds = report.pick(512, 128, 8) * MiB, report.pick(15, 2, 1)
    source = Source()

    def side(relay: Relay) -> Sample:
        with connect(relay, DROP) as sock:
            cpu, start = relay.cpu(), time.perf_counter()
            source.send(sock, size)
            sock.shutdown(socket.SHUT_WR)
            (total,) = COUNT.unpack(sock.recv(COUNT.size, socket.MSG_WAITALL))
            elapsed = time.perf_counter() - start
            assert total == size
            assert not sock.recv(1)
        return Sample(elapsed * GiB / size, (relay.cpu() - cpu) * GiB / size)

    median = alternate({name: partial(side, relay) for name, relay in relays.items()}, rounds)
    stock, ours = median["gevent"], median["gsplice"]
    target = partial(report.target, "bulk")
    rows = []
    for name, sample in median.items():
        speed = stock.elapsed / sample.elapsed
        rows.append([name, sample.elapsed, sample.cpu, speed, sample.cpu / stock.cpu])
    report.table(
        f"Bulk, {size // MiB} MiB at a time, median of {rounds} rounds",
        ["", "s/GiB", "CPU s/GiB of the relay", "speed/gevent", "CPU/gevent"],
        rows,
    )
    panels = {
        "GiB per second": {name: 1 / sample.elapsed for name, sample in median.items()},
        "CPU seconds per GiB": {name: sample.cpu for name, sample in median.items()},
    }
    title = "A relay between two TCP connections: throughput, and CPU time of the relay"
    report.bars("relay", title, "one stream", panels, ours=["gsplice"])
    print("    speed", target(value=stock.elapsed / ours.elapsed, least=1.6))
    print("    CPU", report.target("bulk, CPU", ours.cpu / stock.cpu, most=0.35))
    for name, least in (("Go", 1.0), ("HAProxy", 0.9)):
        if name in median:
            value = median[name].elapsed / ours.elapsed
            said = report.target(f"bulk, speed/{name}", value, least=least)
            print(f"    speed/{name} {value:.2f}, {said}")


def ping_pong(report: Report, relays: dict[str, Relay]) -> None:
    rows = []
    series: dict[str, dict[int, float]] = {name: {} for name in relays}
    rounds = report.pick(80, 4, 1)
    for size in SIZES:
        number = max(10, 100 // (1 + size // 30_000))
        message, buffer = os.urandom(size), memoryview(bytearray(size))

        def side(
            relay: Relay,
            size: int = size,
            number: int = number,
            message: bytes = message,
            buffer: memoryview = buffer,
        ) -> Sample:
            with connect(relay, ECHO, size) as sock:
                for warm in range(5 + number):
                    if warm == 5:
                        cpu, start = relay.cpu(), time.perf_counter()
                    sock.sendall(message)
                    assert receive(sock, buffer)
                elapsed, used = time.perf_counter() - start, relay.cpu() - cpu
            return Sample(elapsed / number * 1e6, used / number * 1e6)

        median = alternate({name: partial(side, relay) for name, relay in relays.items()}, rounds)
        for name, sample in median.items():
            series[name][size] = sample.elapsed
        ours = median["gsplice"].elapsed
        said = [report.target(f"{size} B, gevent", median["gevent"].elapsed / ours, least=1.0)]
        if "Go" in median:
            said.append(report.target(f"{size} B, Go", median["Go"].elapsed / ours, least=0.9))
        times = [f"{sample.elapsed:.1f} ({sample.cpu:.1f})" for sample in median.values()]
        ratios = [f"{median[n].elapsed / ours:.2f}" for n in ("gevent", "Go") if n in median]
        rows.append([f"{size} B", *times, *ratios, "; ".join(said)])
    report.table(
        f"Ping-pong: us there and back, and the relay's CPU time; median of {rounds} rounds",
        ["", *relays, *[f"{n}/gsplice" for n in ("gevent", "Go") if n in relays], "targets"],
        rows,
    )
    title = "A message through a relay, and back"
    y = "microseconds (less is better)"
    report.lines("relay_ping_pong", title, "size of the message", y, series, ours=["gsplice"])


def percentiles(samples: Sequence[float]) -> Latency:
    ordered = sorted(samples)
    return Latency(statistics.median(ordered), ordered[len(ordered) * 99 // 100])


def fairness(report: Report, relays: dict[str, Relay], backend: int) -> None:
    """A hundred connections send 200 bytes each in turn, while one moves as much as it can."""
    rounds, turns = report.pick((9, 10), (1, 3), (1, 1))
    source = Source()

    def side(relay: Relay) -> Latency:
        stop = threading.Event()

        def load() -> None:
            with connect(relay, DROP) as sock:
                while not stop.is_set():
                    source.send(sock, 16 * MiB)

        message, buffer = bytes(200), memoryview(bytearray(200))
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(relay, ECHO, 200)) for _ in range(100)]
            loading = threading.Thread(target=load)
            loading.start()
            samples = []
            for sock in socks * turns:
                start = time.perf_counter()
                sock.sendall(message)
                assert receive(sock, buffer)
                samples.append(time.perf_counter() - start)
            stop.set()
            loading.join()
        return percentiles(samples)

    median = alternate({name: partial(side, relay) for name, relay in relays.items()}, rounds)
    ratio = median["gsplice"].p99 / median["gevent"].p99
    rows = [[name, each.p50 * 1e6, each.p99 * 1e6] for name, each in median.items()]
    report.table("100 ping-pong relays beside a bulk relay, us", ["", "p50", "p99"], rows)
    print("    p99/gevent", f"{ratio:.2f},", report.target("fairness, p99/gevent", ratio, most=2.0))


def threads(report: Report, stack: contextlib.ExitStack, backend: int) -> None:
    """Two streams through one hub, and through two hubs in two native threads."""
    size, rounds = report.pick(512, 64, 8) * MiB, report.pick(9, 1, 1)
    relay = stack.enter_context(in_python("gsplice", backend, RELAY_HUBS="2"))
    source = Source()

    def stream(port: int) -> None:
        with connect(Relay(port, relay.process), DROP) as sock:
            source.send(sock, size)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(COUNT.size, socket.MSG_WAITALL)

    def side(ports: Sequence[int]) -> Sample:
        cpu, start = relay.cpu(), time.perf_counter()
        streams = [threading.Thread(target=stream, args=[port]) for port in ports]
        for each in streams:
            each.start()
        for each in streams:
            each.join()
        elapsed = time.perf_counter() - start
        return Sample(elapsed * GiB / size / 2, (relay.cpu() - cpu) * GiB / size / 2)

    assert relay.process.stdout is not None
    second = int(relay.process.stdout.readline())
    sides: dict[str, Callable[[], Sample]] = {
        "one hub": lambda: side([relay.port] * 2),
        "two hubs": lambda: side([relay.port, second]),
    }
    median = alternate(sides, rounds)
    ratio = median["one hub"].elapsed / median["two hubs"].elapsed
    rows = [[name, each.elapsed, each.cpu] for name, each in median.items()]
    report.table("Two streams at once", ["", "s/GiB", "CPU s/GiB"], rows)
    print("    speed/one hub", f"{ratio:.2f},", report.target("two hubs", ratio, least=1.0))


def many(report: Report, relays: dict[str, Relay], limit: int) -> None:
    """Move the same number of bytes in all over ever more connections at once."""
    total, rounds = report.pick(512, 128, 8) * MiB, report.pick(3, 1, 1)
    source = Source()
    most = limit // DESCRIPTORS - 50
    wanted = report.pick(CONNECTIONS, (1, 50, 500), (1, 10))
    numbers = sorted({min(number, most) for number in wanted})
    if most < wanted[-1]:
        why = f"{limit} descriptors are enough for {most}"
        report.leave_out(f"{wanted[-1]} connections at once", why)

    def side(relay: Relay, number: int) -> Sample:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(relay, DROP_OF_MANY)) for _ in range(number)]
            each = total // number
            cpu, start = relay.cpu(), time.perf_counter()
            source.send_all(socks, each)
            for sock in socks:
                assert COUNT.unpack(sock.recv(COUNT.size, socket.MSG_WAITALL)) == (each,)
            elapsed, used = time.perf_counter() - start, relay.cpu() - cpu
        return Sample(elapsed * GiB / (each * number), used * GiB / (each * number))

    medians = {
        number: alternate(
            {name: partial(side, relay, number) for name, relay in relays.items()}, rounds
        )
        for number in numbers
    }
    for name, what, y, value in (
        ("speed", "throughput", "GiB per second", lambda sample: 1 / sample.elapsed),
        ("cpu", "CPU time of the relay", "CPU seconds per GiB", lambda sample: sample.cpu),
    ):
        series = {
            relay: {number: value(medians[number][relay]) for number in numbers} for relay in relays
        }
        report.table(
            f"{total // MiB} MiB over several connections at once, {y}, median of {rounds} rounds",
            ["connections", *relays],
            [[str(n), *(by[n] for by in series.values())] for n in numbers],
        )
        title, x = f"Relays for several connections at once: {what}", "connections"
        name = f"relay_connections_{name}"
        report.lines(name, title, x, y, series, ours=["gsplice"], in_bytes=False)


def idle(report: Report, limit: int) -> None:
    """Many relays that have each carried something and now wait."""
    number = min(report.pick(10_000, 200, 20), limit // 2 - 200)
    rows = []
    rounds = report.pick(3, 1, 1)
    with serving("gevent") as backend:

        def side(name: str) -> tuple[float, ...]:
            with in_python(name, backend) as relay, contextlib.ExitStack() as stack:
                before, held = relay.memory(), relay.holds()
                socks = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
                    for _ in range(number)
                ]
                echo(socks, os.urandom(1000))
                now = relay.holds()
                memory = (relay.memory() - before) / number
                assert now["pipes_in_use"] == 0
                start = time.perf_counter()
                echo(socks, os.urandom(100_000))
                burst = time.perf_counter() - start
                after = relay.holds()
                assert after["pipes_in_use"] == 0
                blocks = (now["blocks"] - held["blocks"]) / number
                spliced = (after["bytes_spliced"] - now["bytes_spliced"]) / MiB
                return (
                    memory / KiB,
                    blocks,
                    burst,
                    spliced,
                    after["fallbacks"].get("no_pipe", 0),
                    after["pipes_created"],
                    after["pipes_idle"],
                )

        sides = {name: partial(side, name) for name in ("gevent", "gsplice")}
        for name, samples in in_turns(sides, rounds, warm_up=0).items():
            rows.append([name, *map(statistics.median, zip(*samples, strict=True))])
    report.table(
        f"{number} relays: idle after a message of 1 KB; then 100 KB at once through each",
        ["", "KiB each", "blocks", "burst s", "MiB spliced", "without pipe", "pipes made", "idle"],
        rows,
    )
    ratio = rows[1][1] / rows[0][1]
    print("    memory/gevent", f"{ratio:.3f},", report.target("idle memory", ratio, most=1.0))


def echo(socks: Sequence[socket.socket], message: bytes) -> None:
    """Send *message* on all of *socks* at once, and get it back."""
    sender = threading.Thread(target=lambda: [sock.sendall(message) for sock in socks])
    sender.start()
    buffer = memoryview(bytearray(len(message)))
    for sock in socks:
        assert receive(sock, buffer)
        assert buffer == message
    sender.join()


if __name__ == "__main__":
    main()
