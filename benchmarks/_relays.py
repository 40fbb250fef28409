"""The relays that are measured, each a process that forwards every connection to a backend.

Run as a script this is one of those in Python: the pattern of unpatched gevent, or gsplice's. On
SIGUSR1 it prints what it holds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.socket
from _report import Report
from gevent.server import StreamServer

import gsplice

HERE = Path(__file__).parent


class Relay(NamedTuple):
    """A relay that runs: where it listens, and its process."""

    port: int
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """Return the CPU time that it has used, in seconds."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # the thread has just ended
                total += int(Path(task, "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self) -> int:
        """Return its memory, in bytes: what it has alone (smaps_rollup, Private)."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def holds(self) -> dict[str, Any]:
        """Ask one in Python what it holds."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGUSR1)
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]


@contextlib.contextmanager
def running(command: Sequence[str | Path], **environ: str) -> Iterator[Relay]:
    """Run a relay that prints the port on which it listens."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environ) as process:
        try:
            assert process.stdout is not None
            yield Relay(int(process.stdout.readline()), process)
        finally:
            process.kill()


def in_python(name: str, backend: int, **environ: str) -> Any:
    """Run this script."""
    return running([sys.executable, __file__, name, str(backend)], **environ)


def in_asyncio(name: str, backend: int) -> Any:
    """Run asyncio's streams on the loop *name*: asyncio's own, or uvloop."""
    return running([sys.executable, HERE / "_relay_in_asyncio.py", name, str(backend)])


@contextlib.contextmanager
def in_c(backend: int) -> Iterator[Relay]:
    """Run epoll and splice(2) in C."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "relay")
        subprocess.run(["cc", "-O2", "-o", program, HERE / "relay_splice.c"], check=True)
        with running([program, str(backend)]) as relay:
            yield relay


@contextlib.contextmanager
def go(backend: int) -> Iterator[Relay]:
    """Run Go's io.Copy, on one processor."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "relay")
        subprocess.run(
            ["go", "build", "-o", program, HERE / "relay_io_copy.go"],
            check=True,
            env=os.environ | {"GO111MODULE": "off"},
        )
        with running([program, f"127.0.0.1:{backend}"], GOMAXPROCS="1") as relay:
            yield relay


HAPROXY = """
global
    nbthread 1
    maxconn {most}
    tune.pipesize 1048576
    maxpipes {most}
defaults
    mode tcp
    option splice-auto  # by itself it did not begin to splice here
    option splice-request
    option splice-response
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen relay
    bind 127.0.0.1:{port}
    server backend 127.0.0.1:{backend}
"""


@contextlib.contextmanager
def haproxy(backend: int) -> Iterator[Relay]:
    """Run HAProxy with ``option splice-auto``, one thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # It does not start if the limit of descriptors is too low for all it may need.
    most = min(2500, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 4 - 50)
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as config:
        config.write(HAPROXY.format(port=port, backend=backend, most=most))
        config.flush()
        with subprocess.Popen(["haproxy", "-db", "-q", "-f", config.name]) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(ConnectionRefusedError):
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
                    time.sleep(0.01)
                yield Relay(port, process)
            finally:
                process.kill()


def installed(report: Report, stack: contextlib.ExitStack, backend: int) -> dict[str, Relay]:
    """Start all that can run here, and say which can't."""
    kinds: dict[str, tuple[Any, bool, str]] = {
        "gevent": (partial(in_python, "gevent"), True, ""),
        "gsplice": (partial(in_python, "gsplice"), True, ""),
        "asyncio": (partial(in_asyncio, "asyncio"), True, ""),
        "uvloop": (
            partial(in_asyncio, "uvloop"),
            importlib.util.find_spec("uvloop") is not None,
            "it is not installed",
        ),
        "Go": (go, shutil.which("go") is not None, "there is no go"),
        "HAProxy": (haproxy, shutil.which("haproxy") is not None, "there is no haproxy"),
        "C": (in_c, shutil.which("cc") is not None, "there is no cc"),
    }
    relays = {}
    for name, (start, can, why_not) in kinds.items():
        if can:
            relays[name] = stack.enter_context(start(backend))
        else:
            report.leave_out(f"the relay of {name}", why_not)
    return relays


def pump(src: Any, dst: Any) -> None:
    while data := src.recv(65536):
        dst.sendall(data)
    with contextlib.suppress(OSError):  # the peer has closed
        dst.shutdown(socket.SHUT_WR)


def pattern(a: Any, b: Any) -> None:
    """Forward as programs on gevent do: a greenlet more, recv() and sendall()."""
    other = gevent.spawn(pump, b, a)
    pump(a, b)
    other.join()


RELAYS: dict[str, Callable[[Any, Any], object]] = {"gevent": pattern, "gsplice": gsplice.relay}


def serve(name: str, backend: int) -> StreamServer:
    """Start to relay, in this thread's hub, on a new port."""
    relay = RELAYS[name]

    def handle(a: Any, address: object) -> None:
        with gevent.socket.create_connection(("127.0.0.1", backend)) as b:
            for sock in (a, b):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            relay(a, b)

    server = StreamServer(("127.0.0.1", 0), handle, backlog=1024)
    server.start()
    return server


def print_what_is_held() -> None:
    gc.collect()
    figures = gsplice.stats().as_dict()
    figures["blocks"] = sys.getallocatedblocks()
    figures["objects"] = len(gc.get_objects())
    print(json.dumps(figures), flush=True)


def main() -> None:
    name, backend = sys.argv[1], int(sys.argv[2])
    gevent.signal_handler(signal.SIGUSR1, print_what_is_held)
    print(serve(name, backend).server_port, flush=True)
    if os.environ.get("RELAY_HUBS") == "2":
        threading.Thread(target=second_hub, args=[name, backend], daemon=True).start()
    gevent.wait()


def second_hub(name: str, backend: int) -> None:
    """Serve in another native thread, on another port."""
    print(serve(name, backend).server_port, flush=True)
    gevent.wait()


if __name__ == "__main__":
    main()
