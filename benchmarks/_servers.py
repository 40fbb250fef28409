"""The file servers that are measured, each in processes of its own, all pinned to one processor."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _report import Report

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """Return the CPU time that it and its children have used, in seconds."""
        total, left = 0.0, [self.process.pid]
        while left:
            pid = left.pop()
            # The clock of another process (clock_getcpuclockid(3)): its ended threads count, too.
            total += time.clock_gettime(~pid << 3 | 2)
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):  # the thread has just ended
                    left += map(int, Path(task, "children").read_text().split())
        return total

    def stats(self) -> dict[str, Any]:
        """Return what gsplice has counted in it."""
        address = f"http://127.0.0.1:{self.port}/stats"
        with urllib.request.urlopen(address) as response:
            return json.load(response)  # type: ignore[no-any-return]


#: How a server is started: (descriptor it listens on, its port, folder of the files, scratch
#: folder) -> its command and what is added to its environment.
Start = Callable[[int, int, Path, Path], tuple[Sequence[str | Path], dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A server that can be measured."""

    name: str
    start: Start
    needs: Sequence[str] = ()  # programs, or modules of Python
    is_ours: bool = False
    is_python: bool = True
    #: Whether it makes its listening socket itself.
    listens: bool = False
    #: Whether "/stats" is what gsplice has counted.
    tells: bool = False


#: What werkzeug's and wsgiref's wrappers read at once; Django's reads 4 KiB.
PIECE = 8192


def in_python(name: str, *, gsplice: bool = False, piece: int = PIECE) -> Start:
    def start(fd: int, port: int, folder: Path, scratch: Path) -> Any:
        command = [sys.executable, HERE / "_serve.py", name, str(fd), folder]
        return command, environ(folder, gsplice, piece)

    return start


def environ(folder: Path, gsplice: bool, piece: int = PIECE) -> dict[str, str]:
    added = {"BENCHMARK_FOLDER": str(folder), "BENCHMARK_PIECE": str(piece)}
    return added | ({"BENCHMARK_GSPLICE": "1"} if gsplice else {})


def gsplice_serve(fd: int, port: int, folder: Path, scratch: Path) -> Any:
    return [sys.executable, "-m", "gsplice", "serve", "--port", str(port), folder], {}


def gunicorn(worker: str, *options: str, gsplice: bool = False) -> Start:
    def start(fd: int, port: int, folder: Path, scratch: Path) -> Any:
        options_of_all = ["--workers", "1", "--bind", f"fd://{fd}", "--chdir", HERE]
        limits = ["--worker-connections", "2000", "--keep-alive", "75", "--timeout", "0"]
        quiet = ["--log-level", "warning", "--worker-tmp-dir", scratch, "--no-control-socket"]
        if not any("control" in option for option in gunicorn_options()):
            quiet.pop()
        command = [sys.executable, "-m", "gunicorn", "-k", worker, *options]
        command += [*options_of_all, *limits, *quiet, "_serve:application"]
        return command, environ(folder, gsplice)

    return start


def gunicorn_options() -> Sequence[str]:
    from gunicorn.config import KNOWN_SETTINGS

    return [setting.name for setting in KNOWN_SETTINGS]


def go(fd: int, port: int, folder: Path, scratch: Path) -> Any:
    program = scratch / "serve"
    subprocess.run(
        ["go", "build", "-o", program, HERE / "serve_in_go.go"],
        check=True,
        env=os.environ | {"GO111MODULE": "off"},
    )
    # Go takes descriptor 3 only; a shell moves ours there.
    return ["sh", "-c", f'exec "$0" "$1" 3<&{fd}', program, folder], {}


NGINX = """
daemon off;
worker_processes 1;
{user}
pid {scratch}/pid;
error_log {scratch}/error.log;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 1000000000;
    default_type application/octet-stream;
    {temporary}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        root {folder};
    }}
}}
"""
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def nginx(fd: int, port: int, folder: Path, scratch: Path) -> Any:
    config = scratch / "nginx.conf"
    config.write_text(
        NGINX.format(
            user="user root;" if os.geteuid() == 0 else "",
            scratch=scratch,
            temporary=" ".join(f"{name}_temp_path {scratch}/{name};" for name in TEMPORARY),
            port=port,
            folder=folder,
        )
    )
    # It takes the socket over as from an older nginx that is being replaced.
    return ["nginx", "-e", scratch / "error.log", "-c", config], {"NGINX": f"{fd};"}


KINDS = (
    Kind("nginx", nginx, ["nginx"], is_python=False),
    Kind("Go http.FileServer", go, ["go"], is_python=False),
    Kind("gsplice, pywsgi", in_python("pywsgi", gsplice=True), is_ours=True, tells=True),
    Kind(
        "gsplice, gunicorn gevent",
        gunicorn("gevent", gsplice=True),
        ["gunicorn"],
        is_ours=True,
        tells=True,
    ),
    Kind(
        "gsplice serve",
        gsplice_serve,
        ["werkzeug", "jinja2"],
        is_ours=True,
        listens=True,
    ),
    Kind("pywsgi", in_python("pywsgi")),
    Kind("pywsgi, 64 KiB a piece", in_python("pywsgi", piece=65536)),
    Kind("gunicorn gevent", gunicorn("gevent"), ["gunicorn"]),
    Kind("gunicorn gthread", gunicorn("gthread", "--threads", "8"), ["gunicorn"]),
    Kind("aiohttp", in_python("aiohttp"), ["aiohttp"]),
    Kind("aiohttp, uvloop", in_python("aiohttp-uvloop"), ["aiohttp", "uvloop"]),
)


def installed(report: Report) -> list[Kind]:
    """Return the servers that can be run here, and say which can't."""
    found = []
    for kind in KINDS:
        missing = [
            need
            for need in kind.needs
            if shutil.which(need) is None and importlib.util.find_spec(need) is None
        ]
        if missing:
            report.leave_out(kind.name, f"there is no {' and no '.join(missing)}")
        else:
            found.append(kind)
    for need in sorted({need for kind in found for need in kind.needs}):
        report.version(need, _version(need))
    return found


def _version(need: str) -> str:
    if need == "go":
        return subprocess.check_output(["go", "version"], text=True).split()[2].removeprefix("go")
    if need == "nginx":
        command = ["nginx", "-v"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return said.strip().rpartition("/")[2]
    return version(need)


@contextlib.contextmanager
def running(kind: Kind, folder: Path, scratch: Path, cpu: int | None) -> Iterator[Server]:
    """Run a server on *cpu* until the end of the block."""
    scratch.mkdir()
    log = scratch / "log"
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, log.open("wb") as said:
        fd, port = listener.fileno(), listener.getsockname()[1]
        command, added = kind.start(fd, port, folder, scratch)
        if kind.listens:
            listener.close()
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        with subprocess.Popen(
            [*pinned, *command],
            stdout=said,
            stderr=said,
            pass_fds=[] if kind.listens else [fd],
            env=os.environ | added,
        ) as process:
            try:
                _await_answer(kind, port, process, log)
                yield Server(kind.name, port, process)
            finally:
                process.terminate()  # gunicorn's master ends its workers
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def _await_answer(kind: Kind, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it answers: the socket itself has been listening all the time."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1) as response:
                response.read()
                return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{kind.name} does not answer: {log.read_text()[-2000:]}")
