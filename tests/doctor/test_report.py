"""What servers tell on their logs: what is patched, and the counters."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import ended_with, file_of, run_program
from paths import PROJECT

import gsplice
from gsplice import _report
from gsplice.metrics import REASONS

SIZE = 1 << 20
TIMEOUT = 60

APP = """
import io, os

def application(environ, start_response):
    kind = environ["PATH_INFO"]
    file = open(os.environ["SERVED"], "rb")
    if kind == "/other":
        file = io.BytesIO(file.read())
    start_response("200 OK", [("X-Pid", str(os.getpid())), ("Content-Length", str(1 << 20))])
    return environ["wsgi.file_wrapper"](file)
"""

PATCHED = "gsplice: patched: socket.sendfile, shutil.copyfileobj"


class Process:
    """A server, and the lines that it writes."""

    def __init__(self, process: subprocess.Popen[bytes], address: Any) -> None:
        self.process = process
        self.address = address

    def line_with(self, *words: str) -> str:
        """Wait for a line that has all *words*."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line.decode().rstrip())
            if all(word in seen[-1] for word in words):
                return seen[-1]
        raise AssertionError("\n".join(seen))

    def ask(self, path: str) -> str:
        """Return the number of the process that has answered."""
        with closing(HTTPConnection(*self.address, timeout=TIMEOUT)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, len(answer.read())) == (200, SIZE)
            return answer.headers["X-Pid"]

    def rest(self) -> str:
        """End it; return all that it still had to say."""
        self.process.terminate()
        assert self.process.stdout is not None
        return self.process.stdout.read().decode()


@contextmanager
def serving(tmp_path: Path, command: list[str], **environ: str) -> Iterator[Process]:
    served = file_of(tmp_path / "served", SIZE)
    (tmp_path / "app.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        with ended_with(
            [sys.executable, *(part.replace("FD", str(fd)) for part in command)],
            cwd=tmp_path,
            pass_fds=[fd],
            stderr=subprocess.STDOUT,
            env=os.environ | {"SERVED": str(served), "PYTHONUNBUFFERED": "1"} | environ,
        ) as process:
            try:
                yield Process(process, listener.getsockname())
            finally:
                process.terminate()


def gunicorn(worker: str, *options: str) -> list[str]:
    fixed = ["-b", "fd://FD", "--graceful-timeout", "0", "-c", str(PROJECT / "tests/support/apps")]
    fixed[-1] += "/gunicorn.conf.py"
    level = ["--log-level", "info"]
    return ["-m", "gunicorn", "-k", worker, *fixed, *level, *options, "app:application"]


@pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
def test_each_gunicorn_worker_tells_what_is_patched_and_then_its_counters(
    worker: str, tmp_path: Path
) -> None:
    environ = {"GSPLICE_PATCH_ALL": "1", "GSPLICE_REPORT": "0.2"}
    with serving(tmp_path, gunicorn(worker, "-w", "2", "--preload"), **environ) as server:
        lines = [server.line_with("INFO", PATCHED, "gunicorn.GeventWorker") for _ in range(2)]
        pids = {re.findall(r"\[(\d+)\]", line)[0] for line in lines}
        assert len(pids) == 2
        pid = server.ask("/")
        line = server.line_with(f"process {pid}: transfers: 1")
        assert "(1.0 MiB by splice); not taken, or not to the end: none" in line
        (other,) = pids - {pid}
        server.line_with(f"process {other}: transfers: 0")


@pytest.mark.few(2)
@pytest.mark.parametrize("worker", ["sync", "gthread"])
@pytest.mark.parametrize("variable", ["GSPLICE_PATCH_ALL", "GSPLICE_REPORT"])
def test_a_gunicorn_worker_without_gevent_is_warned_of(
    worker: str, variable: str, tmp_path: Path
) -> None:
    with serving(tmp_path, gunicorn(worker), **{variable: "1"}) as server:
        server.line_with("WARNING", "gsplice does nothing here", "does not use gevent", "-k gevent")
        server.ask("/")
        assert "gsplice" not in server.rest()


@pytest.mark.parametrize("worker", ["gevent", "sync"])
def test_gunicorn_without_the_variables_says_nothing(worker: str, tmp_path: Path) -> None:
    with serving(tmp_path, gunicorn(worker)) as server:
        server.line_with("Booting worker")
        server.ask("/")
        assert "gsplice" not in server.rest()


PYWSGI = """
import socket, sys
import gevent.pywsgi
from app import application

listener = gevent.socket.socket(fileno=int(sys.argv[1]))
gevent.pywsgi.WSGIServer(listener, application, log=None).serve_forever()
"""


def test_pywsgi_tells_why_something_is_not_taken(tmp_path: Path) -> None:
    command = ["-c", PYWSGI, "FD"]
    environ = {"GSPLICE_PATCH_ALL": "1", "GSPLICE_REPORT": "0.2"}
    with serving(tmp_path, command, **environ) as server:
        assert server.line_with(PATCHED).startswith(f"{PATCHED}, pywsgi.WSGIHandler")
        server.ask("/other")
        server.line_with("transfers: 0; not taken, or not to the end: 1 source_type (the source is")
        server.ask("/")
        server.line_with("transfers: 1 (1.0 MiB by splice)", "1 source_type (the source is of a")


def test_only_asked_for_a_report_it_says_that_nothing_is_patched(tmp_path: Path) -> None:
    program = PYWSGI.replace("application, ", "None, ")
    with serving(tmp_path, ["-c", program, "FD"], GSPLICE_REPORT="60") as server:
        line = server.line_with("gsplice")
        what_to_do = "Set GSPLICE_PATCH_ALL=1, or call gsplice.patch_all()."
        assert line == f"gsplice: nothing is patched. {what_to_do}"


def test_a_report_that_makes_no_sense_is_said_to_be_one(tmp_path: Path) -> None:
    with serving(tmp_path, ["-c", PYWSGI, "FD"], GSPLICE_REPORT="often") as server:
        server.line_with(
            "GSPLICE_REPORT must be a number of seconds from 0 to 1073741824, not 'often'; it"
            " counts as not set"
        )


FORKING = """
import os, sys
if "monkey" in sys.argv:
    import gevent.monkey; gevent.monkey.patch_all()
import gevent, gevent.os
from gevent.server import StreamServer

server = StreamServer(("127.0.0.1", 0), print)
if "before" in sys.argv:
    server.start()
else:
    server.init_socket()
pid = gevent.os.fork()
if pid:
    os.waitpid(pid, 0)
    os._exit(0)
print(f"child {os.getpid()}", flush=True)
if "before" not in sys.argv:
    server.start()
gevent.sleep(60)
"""


@pytest.mark.few
@pytest.mark.parametrize("monkey", ["monkey", "plain"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_process_reports_for_itself(monkey: str, when: str, tmp_path: Path) -> None:
    environ = {"GSPLICE_PATCH_ALL": "1", "GSPLICE_REPORT": "0.2"}
    with serving(tmp_path, ["-c", FORKING, monkey, when], **environ) as server:
        child = server.line_with("child").removeprefix("child ")
        if when == "after":
            server.line_with(PATCHED)
        server.line_with(f"gsplice: process {child}: transfers: 0")
        os.kill(int(child), 9)


def test_the_report_does_not_keep_the_loop_alive() -> None:
    program = """
import gevent
from gevent.server import StreamServer
from gevent.pywsgi import WSGIServer
with WSGIServer(("127.0.0.1", 0), print, error_log=None) as server:
    server.start()
server.stop()
print(gevent.get_hub().join())
"""
    assert run_program(program, GSPLICE_REPORT="0.01") == "True\n"


LOGS = """
import logging, sys
from gevent.pywsgi import WSGIServer
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(levelname)s %(message)s")
{}
server = WSGIServer(("127.0.0.1", 0), print, log=None, error_log={})
server.start()
server.stop()
"""


@pytest.mark.parametrize(
    ("before", "log", "said"),
    [
        ("", "logging.getLogger('mine')", f"INFO {PATCHED}, pywsgi.WSGIHandler"),
        ("", "sys.stdout", f"{PATCHED}, pywsgi.WSGIHandler"),
        ("", "None", ""),
        ("file = open('/dev/null', 'w'); file.close()", "file", ""),
        ("import io; file = io.StringIO(); file.close()", "file", ""),
    ],
)
def test_the_line_is_on_the_log_of_the_server(before: str, log: str, said: str) -> None:
    program = LOGS.format(before, log)
    lines = run_program(program, GSPLICE_PATCH_ALL="1").splitlines()
    lines = [line for line in lines if "not patched" not in line]  # it is the logger gsplice's
    assert len(lines) == bool(said)
    assert all(line.startswith(said) for line in lines)


def test_one_line_for_several_servers() -> None:
    program = """
import sys
from gevent.pywsgi import WSGIServer
for _ in range(3):
    server = WSGIServer(("127.0.0.1", 0), print, log=None, error_log=sys.stdout)
    server.start()
    server.stop()
"""
    assert run_program(program, GSPLICE_PATCH_ALL="1").count("gsplice") == 1


def test_a_program_that_patches_itself_finds_nothing_in_its_log() -> None:
    program = "import gevent.monkey; gevent.monkey.patch_all(); import gsplice; gsplice.patch_all()"
    program += "\nfrom gevent.pywsgi import WSGIServer\nWSGIServer(('127.0.0.1', 0), print).start()"
    assert run_program(program, GSPLICE_PATCH_ALL="", GSPLICE_REPORT="") == ""


def test_a_log_that_must_wait_does_not_stop_the_hub() -> None:
    """A handler may wait for a connection; in the hub it could not."""
    import gevent
    from gevent.event import Event

    waited = Event()

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gevent.sleep(0)
            waited.set()

    logger = logging.getLogger("waits")
    logger.setLevel("INFO")
    logger.addHandler(Waits())
    try:
        hub = gevent.get_hub()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gsplice.config.settings, "report", 0.001)
            patch.setattr(_report, "_reports", reports := _report._Reports())
            _report._report_from(hub, _report._Log(logger))
            assert waited.wait(TIMEOUT)
        reports.timer.close()
    finally:
        logger.handlers.clear()


def test_amounts() -> None:
    amounts = [0, 1, 1023, 1024, 1 << 20, 3 << 40, 1 << 60]
    assert [_report._amount(number) for number in amounts] == [
        *("0 B", "1 B", "1023 B", "1.0 KiB", "1.0 MiB", "3.0 TiB", "1048576.0 TiB")
    ]


def test_every_reason_has_its_words_and_they_are_those_of_the_documentation() -> None:
    table = (PROJECT / "docs" / "taken.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    meanings = {name: meaning for name, meaning in rows if name in REASONS}
    assert {*meanings} == {*REASONS}
    assert [name for name in REASONS if not meanings[name].startswith(REASONS[name])] == []


def test_no_other_reason_is_given() -> None:
    given = set()
    for path in (PROJECT / "gsplice").rglob("*.py"):
        given |= {*re.findall(r'(?:NotOurs|fell_back)\("(\w+)"\)', path.read_text())}
    assert given <= {*REASONS}
    assert len(given) > 10
