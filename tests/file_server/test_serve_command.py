"""``python -m gsplice serve``: the command, and its worker processes. What is served, the file
server's own tests look at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import file_of, run_program
from paths import PROJECT

from gsplice.config import MiB

TIMEOUT = 30
SERVE = [sys.executable, "-m", "gsplice", "serve"]


class Server:
    """The command, started, and what can be seen of its processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        address = re.search(r"(http://127\.0\.0\.1:(\d+)/)", lines[0])
        assert address, (lines, process.communicate(timeout=TIMEOUT))
        self.url, self.port = address[1], int(address[2])
        self.patched = lines[1]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=TIMEOUT) as answer:
            return bytes(answer.read())

    def figures(self) -> dict[str, Any]:
        return dict(json.loads(self.get(".stats.json")))

    def ask(self, path: str) -> socket.socket:
        """Send a request on a connection of its own, and wait for the beginning of the answer."""
        sock = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert sock.recv(12) == b"HTTP/1.1 200"
        return sock

    def workers(self) -> list[int]:
        parent = self.process.pid
        return [
            int(each) for each in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        ]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(root: Path, *options: str, command: list[str] = SERVE) -> Iterator[Server]:
    with subprocess.Popen(
        [*command, "--port", "0", *options, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()  # its workers end when it does


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    file_of(tmp_path / "root" / "file", 1 * MiB)
    with open(tmp_path / "root" / "huge", "wb") as file:
        file.truncate(1 << 30)
    return tmp_path / "root"


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def links(process: int) -> list[str]:
    """What the descriptors of a process are open on."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # it has ended
        for fd in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{process}/fd/{fd}"))
    return found


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_process(root: Path) -> None:
    with serving(root) as server:
        assert "sendfile" in server.patched
        assert server.get("file") == (root / "file").read_bytes()
        assert server.figures()["bytes_sendfile"] + server.figures()["bytes_spliced"] == 1 * MiB
        assert server.figures()["workers"] == 1
        assert server.workers() == []
        assert server.stop() == (0, "")


def test_the_console_script(root: Path, tmp_path: Path) -> None:
    """Made from pyproject.toml, as an installer makes it."""
    project = (PROJECT / "pyproject.toml").read_text()
    module, function = re.findall(r'^gsplice = "([\w.]+):(\w+)"$', project, re.MULTILINE)[0]
    script = tmp_path / "gsplice"
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    command = [sys.executable, str(script)]
    with serving(root, "--no-patch", command=[*command, "serve"]) as server:
        assert server.get("file") == (root / "file").read_bytes()
    (root / "program.py").write_text(
        "import sys, beside; print(__name__, sys.argv, beside.__name__)"
    )
    (root / "beside.py").write_text("")
    for arguments in (["program.py"], ["-m", "program"]):
        done = subprocess.run(
            [*command, *arguments, "x"], capture_output=True, text=True, timeout=TIMEOUT, cwd=root
        )
        assert done.stdout == f"__main__ ['{root}/program.py', 'x'] beside\n", done.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize("missing", ["werkzeug", "jinja2"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
sys.argv[1:] = ["serve"]
from gsplice.__main__ import main
try:
    main()
except SystemExit as err:
    print(err)
"""
    expected = f"gsplice: serve needs {missing}: pip install 'gsplice[serve]'\n"
    assert run_program(program) == expected


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "option",
    [
        "--workers=0",
        "--workers=many",
        "--port=-1",
        "--port=65536",
        "--header-timeout=-1",
        "--header-timeout=nan",
    ],
)
def test_a_number_that_makes_no_sense(option: str) -> None:
    done = subprocess.run([*SERVE, option], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (2, "")
    assert option.partition("=")[0] in done.stderr.splitlines()[-1]


def test_all_workers_serve_and_the_figures_are_those_of_all(root: Path) -> None:
    with serving(root, "--workers", "2") as server:
        before = {worker: len(links(worker)) for worker in server.workers()}
        assert len(before) == 2
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # all by chance to the same worker: once in 10**11
                sock = stack.enter_context(server.ask("file"))
                received = 12
                while received < 1 * MiB:
                    received += len(sock.recv(1 << 20))
            assert all(len(links(worker)) > number for worker, number in before.items())

        def all_counted() -> bool:
            figures = server.figures()
            return bool(figures["bytes_sendfile"] + figures["bytes_spliced"] == 40 * MiB)

        wait_until(all_counted)
        assert server.figures()["transfers"] == 40
        assert server.figures()["workers"] == 2
        with server.ask("huge"), server.ask("huge"):
            wait_until(lambda: server.figures()["responses"] == 2)
        wait_until(lambda: server.figures()["responses"] == 0)
        assert b"Of all 2 workers together" in server.get(".stats")
        assert server.stop() == (0, "")


def test_the_parent_has_no_hub_no_pipe_of_the_pool_and_no_thread(root: Path) -> None:
    with serving(root, "--workers", "2") as server:
        server.get("file")
        parent = links(server.process.pid)
        assert not [link for link in parent if "event" in link or "uring" in link], parent
        # Standard output and error, and the end of the lifeline that the parent keeps.
        assert len([link for link in parent if link.startswith("pipe:")]) <= 4
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1
        for worker in server.workers():
            assert any("event" in link or "uring" in link for link in links(worker))


def test_a_worker_that_dies_is_replaced(root: Path) -> None:
    with serving(root, "--workers", "2") as server:
        first, second = server.workers()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and first not in server.workers())
        assert second in server.workers()
        for _ in range(10):
            assert len(server.get("file")) == 1 * MiB
        code, errors = server.stop()
    assert code == 0
    assert errors == f"gsplice serve: worker {first} was ended by SIGKILL\n"


def test_workers_that_keep_dying_are_given_up() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from gsplice.file_server.prefork import prefork\n"
            "import sys; sys.exit(prefork(2, lambda worker, lifeline: 3))",
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    *deaths, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(deaths) == 7
    assert all(re.fullmatch(r"gsplice serve: worker \d+ ended with 3", line) for line in deaths)
    assert last == "gsplice serve: 7 workers ended within 10 s; giving up"


def test_an_error_of_a_worker_has_its_traceback() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from gsplice.file_server.prefork import prefork\n"
            "import sys; sys.exit(prefork(1, lambda worker, lifeline: 1 / 0))",
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: division by zero") == 6


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_in_the_middle_of_a_download(root: Path, number: int) -> None:
    with serving(root, "--workers", "2") as server, server.ask("huge"):
        workers = server.workers()
        if number == signal.SIGINT:  # which a terminal sends to all
            for worker in workers:
                os.kill(worker, number)
        code, errors = server.stop(number)
        assert code == 0
        assert "Traceback" not in errors
        assert not any(map(is_alive, workers))


def test_a_worker_that_does_not_end_is_killed() -> None:
    run_program("""
import os, signal, threading, time
from gsplice.file_server import prefork
prefork.PATIENCE = 0.1
ready = os.pipe()

def work(worker, lifeline):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(ready[1], b"x")
    time.sleep(100)

def end():
    os.read(ready[0], 1)
    os.kill(os.getpid(), signal.SIGTERM)

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for the thread; the parent takes it
threading.Thread(target=end).start()
began = time.monotonic()
assert prefork.prefork(1, work) == 0
assert time.monotonic() - began < 50
""")


def test_workers_end_with_a_parent_that_was_killed(root: Path) -> None:
    with serving(root, "--workers", "2") as server, server.ask("huge"):
        workers = server.workers()
        server.process.kill()
        try:
            wait_until(lambda: not any(map(is_alive, workers)))
        finally:
            for worker in filter(is_alive, workers):
                os.kill(worker, signal.SIGKILL)


def test_a_port_that_another_server_has_is_not_shared(root: Path) -> None:
    with serving(root, "--workers", "2") as server:
        for workers in ("1", "2"):
            command = [*SERVE, "--workers", workers, "--port", str(server.port), str(root)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"cannot listen on 127.0.0.1:{server.port}: ")
            assert done.stderr.count("\n") == 1


def test_stalls_are_measured_while_somebody_watches() -> None:
    run_program("""
import time, gevent
from gsplice.file_server import figures as its_figures
figures = its_figures.Figures()
figures.begin(0)
assert figures.watch()["hub_stall"] == 0
gevent.sleep(0.05)
time.sleep(0.2)  # as a disk would
gevent.sleep(0.05)
assert 0.15 < figures.watch()["hub_stall"], figures.watch()
meter = figures._stall
assert meter._greenlet
its_figures.WATCHED = 0
figures.watch()
meter._greenlet.join(20)
assert not meter._greenlet
assert figures.watch()["hub_stall"] == 0
""")
