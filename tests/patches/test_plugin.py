"""``gevent.monkey.patch_all()`` alone is enough: the plugin, in interpreters of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from conftest import ended_with, file_of, run_program

GROUP = "gevent.plugins.monkey.did_patch_builtins"
SIZE = 1 << 20
TIMEOUT = 60

PATCH_AND_TELL = """
import sys, gevent.monkey
gevent.monkey.patch_all({})
print(gevent.monkey.is_object_patched("shutil", "copyfileobj"), "gsplice" in sys.modules)
"""
DONE, NOT_DONE = "True True\n", "False False\n"

#: Sends the file that is named in the environment; tells the counters of the process.
APP = """
import json, os

def application(environ, start_response):
    if environ["PATH_INFO"] == "/stats":
        import gsplice
        body = json.dumps({"pid": os.getpid(), **gsplice.stats().as_dict()}).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    file = open(os.environ["SERVED"], "rb")
    size = os.fstat(file.fileno()).st_size
    start_response("200 OK", [("Content-Length", str(size))])
    return environ["wsgi.file_wrapper"](file)
"""


def test_the_plugin_is_installed() -> None:
    assert "gsplice" in entry_points(group=GROUP).names


@pytest.mark.few(1)
@pytest.mark.parametrize("value", ["1", "true", "on", "yes", " YES "])
def test_the_variable_switches_it_on(value: str) -> None:
    assert run_program(PATCH_AND_TELL.format(""), GSPLICE_PATCH_ALL=value) == DONE


@pytest.mark.few(2)
@pytest.mark.parametrize("value", ["", "0", "false", "off", "no", " NO "])
def test_the_variable_leaves_it_off(value: str) -> None:
    assert run_program(PATCH_AND_TELL.format(""), GSPLICE_PATCH_ALL=value) == NOT_DONE


def test_without_the_variable_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPLICE_PATCH_ALL", raising=False)
    assert run_program(PATCH_AND_TELL.format("")) == NOT_DONE


@pytest.mark.few(1)
@pytest.mark.parametrize("value", ["1", "perhaps"])
def test_an_argument_switches_it_off_whatever_the_variable_says(value: str) -> None:
    assert run_program(PATCH_AND_TELL.format("gsplice=False"), GSPLICE_PATCH_ALL=value) == NOT_DONE


@pytest.mark.few(1)
@pytest.mark.parametrize("value", ["", "0"])
def test_an_argument_switches_it_on_whatever_the_variable_says(value: str) -> None:
    assert run_program(PATCH_AND_TELL.format("gsplice=True"), GSPLICE_PATCH_ALL=value) == DONE


@pytest.mark.few(1)
@pytest.mark.parametrize(("variable", "setting"), [("0", True), ("1", False)])
def test_the_setting_made_in_code_counts_more_than_the_variable(
    variable: str, setting: bool
) -> None:
    program = f"from gsplice.config import settings; settings.patch_all = {setting}"
    said = run_program(program + PATCH_AND_TELL.format(""), GSPLICE_PATCH_ALL=variable)
    assert said == f"{setting} True\n"


WRONG = "GSPLICE_PATCH_ALL must be true or false, not 'perhaps'; it counts as not set"


@pytest.mark.parametrize("warnings", ["default", "error::RuntimeWarning"])
def test_a_value_that_makes_no_sense_is_said_to_be_one(warnings: str) -> None:
    """Whoever has Python raise its warnings gets this one raised, too."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", PATCH_AND_TELL.format("")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"GSPLICE_PATCH_ALL": "perhaps"},
    )
    assert done.stderr.startswith(f"{WRONG}\n")  # the logger
    assert f"RuntimeWarning: {WRONG}\n" in done.stderr
    assert done.stdout == (NOT_DONE if warnings == "default" else "")
    assert done.returncode == (0 if warnings == "default" else 1)


def test_a_value_that_makes_no_sense_does_not_undo_an_argument() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PATCH_AND_TELL.format("gsplice=True")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"GSPLICE_PATCH_ALL": "perhaps"},
    )
    assert done.stdout == DONE
    assert f"RuntimeWarning: {WRONG}\n" in done.stderr  # gsplice's settings


def test_switched_off_it_imports_nothing_but_itself() -> None:
    run_program(
        """
import sys, gevent.monkey, gevent.events  # as patch_all() itself does
before = set(sys.modules)
import _gsplice_plugin
assert set(sys.modules) - before == {"_gsplice_plugin"}
gevent.monkey.patch_all()
assert "gsplice" not in sys.modules
""",
        GSPLICE_PATCH_ALL="0",
    )


def test_where_nothing_can_be_patched_it_says_so() -> None:
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=splice:error=ENOSYS"]
        + [sys.executable, "-c", PATCH_AND_TELL.format("gsplice=True")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stdout == "False True\n"
    assert "RuntimeWarning: gsplice patched nothing: " in done.stderr
    assert "splice(2) is refused here: Function not implemented" in done.stderr


#: Python does not warn of anything, and what is patched works.
THEN = """
import ssl, threading, concurrent.futures, subprocess, logging
from gevent import _hub_local
assert _hub_local.get_hub_if_exists() is None
context = ssl.create_default_context()
context.minimum_version = ssl.TLSVersion.TLSv1_2
context.options |= ssl.OP_NO_COMPRESSION
import gevent.pywsgi, queue
assert gevent.monkey.is_object_patched("gevent.pywsgi.WSGIHandler", "process_result")
with concurrent.futures.ThreadPoolExecutor(1) as pool:
    assert pool.submit(subprocess.check_output, ["echo", "hello"]).result() == b"hello\\n"
"""


@pytest.mark.few(2)
@pytest.mark.parametrize("before", ["", "import gsplice", "import queue, shutil, socket"])
def test_what_it_imports_half_way_through_the_patching_breaks_nothing(before: str) -> None:
    program = f"{before}\nimport gevent.monkey\ngevent.monkey.patch_all(gsplice=True)\n{THEN}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_what_is_not_patched_yet_can_be_later_and_gsplice_patches_once() -> None:
    run_program("""
import shutil, sys, warnings
import gevent.monkey
original = shutil.copyfileobj
gevent.monkey.patch_all(ssl=False, queue=False, gsplice=True)
assert "ssl" not in sys.modules
first = shutil.copyfileobj
assert first is not original
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    gevent.monkey.patch_all(gsplice=True)
assert [str(w.message) for w in caught] == [
    "Patching more than once will result in the union of all True parameters being patched"]
assert shutil.copyfileobj is first
assert gevent.monkey.get_original("shutil", "copyfileobj") is original
import ssl
assert gevent.monkey.is_module_patched("ssl")
ssl.create_default_context().minimum_version = ssl.TLSVersion.TLSv1_2
import gsplice
gsplice.unpatch_all()
assert shutil.copyfileobj is original
""")


def test_it_comes_with_a_later_call_that_patches_more() -> None:
    program = "import warnings, gevent.monkey; gevent.monkey.patch_all(queue=False, gsplice=False)"
    program += "\nassert not gevent.monkey.is_module_patched('shutil')"
    program += "\nwarnings.simplefilter('ignore')"
    assert run_program(program + PATCH_AND_TELL.format(""), GSPLICE_PATCH_ALL=1) == DONE


def test_a_subscriber_that_has_patched_already_is_no_trouble() -> None:
    program = "import gsplice; gsplice.patch_all()"
    assert run_program(program + PATCH_AND_TELL.format(""), GSPLICE_PATCH_ALL=1) == DONE


def test_gevents_runner_is_enough(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PATCH_AND_TELL.format(""))
    done = subprocess.run(
        [sys.executable, "-m", "gevent.monkey", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"GSPLICE_PATCH_ALL": "1"},
    )
    assert (done.stdout, done.stderr) == (DONE, "")


def gunicorn_command(directory: Path, bind: str, **settings: object) -> list[str]:
    """Write APP and gunicorn's settings into *directory*; return what is to be run there."""
    (directory / "app.py").write_text(APP)
    # Older versions of gunicorn pass over settings that they don't know, here only.
    settings |= {"bind": bind, "keepalive": TIMEOUT, "control_socket_disable": True}
    settings["graceful_timeout"] = 0
    lines = (f"{name} = {value!r}\n" for name, value in settings.items())
    (directory / "gunicorn.conf.py").write_text("".join(lines))
    return [sys.executable, "-m", "gunicorn", "app:application"]


@contextmanager
def gunicorn(
    directory: Path, environ: dict[str, str], **settings: object
) -> Iterator[tuple[str, int]]:
    """Run gunicorn with APP on a socket that listens before it starts; give its address.

    So nothing has to wait for the server: a connection waits to be accepted, and is reset if
    gunicorn ends.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    with ended_with(
        gunicorn_command(directory, f"fd://{listener.fileno()}", **settings),
        cwd=directory,
        pass_fds=[listener.fileno()],
        stderr=subprocess.STDOUT,
        env=os.environ | environ,
    ) as process:
        address = listener.getsockname()
        listener.close()
        try:
            yield address
        finally:
            process.terminate()
            assert process.stdout is not None
            print(process.stdout.read().decode())  # for pytest to show when a test fails


def get(connection: HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read()


def stats(connection: HTTPConnection) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(get(connection, "/stats"))
    return told


@pytest.mark.few
@pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
@pytest.mark.parametrize("switch", ["1", "0"])
def test_gunicorn_with_an_unchanged_app(worker: str, switch: str, tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    environ = {"SERVED": str(served), "GSPLICE_PATCH_ALL": switch}
    with (
        gunicorn(tmp_path, environ, worker_class=worker) as address,
        closing(HTTPConnection(*address, timeout=TIMEOUT)) as connection,
    ):
        assert get(connection, "/") == served.read_bytes()
        told = stats(connection)
    fast = told["bytes_sendfile"] + told["bytes_spliced"]
    assert (fast, told["bytes_copied"]) == (SIZE if switch == "1" else 0, 0)
    assert told["fallbacks"] == {}


def test_gunicorn_with_an_app_loaded_before_its_two_workers_fork(tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    environ = {"SERVED": str(served), "GSPLICE_PATCH_ALL": "1"}
    # A worker that has one connection takes no other: the second goes to the other worker.
    settings = {"preload_app": True, "workers": 2, "worker_connections": 1}
    with (
        gunicorn(tmp_path, environ, worker_class="gevent", **settings) as address,
        closing(HTTPConnection(*address, timeout=TIMEOUT)) as first,
        closing(HTTPConnection(*address, timeout=TIMEOUT)) as second,
    ):
        pids = set()
        for connection in (first, second):
            assert get(connection, "/") == served.read_bytes()
            told = stats(connection)
            assert told["bytes_sendfile"] + told["bytes_spliced"] == SIZE
            assert told["bytes_copied"] == 0
            pids.add(told["pid"])
        assert len(pids) == 2


def test_gunicorn_serves_whatever_is_wrong_with_the_variables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = file_of(tmp_path / "served", SIZE)
    environ = {"SERVED": str(served), "GSPLICE_PATCH_ALL": "perhaps", "GSPLICE_THREADS": "0"}
    with (
        gunicorn(tmp_path, environ, worker_class="gevent") as address,
        closing(HTTPConnection(*address, timeout=TIMEOUT)) as connection,
    ):
        assert get(connection, "/") == served.read_bytes()
        assert stats(connection)["transfers"] == 0
    log = capsys.readouterr().out
    assert f"RuntimeWarning: {WRONG}\n" in log
    assert "GSPLICE_THREADS must be at least 1, not '0'; it counts as not set\n" in log
