"""GSPLICE_PATCH_ALL reaches servers of programs that never call gevent.monkey.patch_all()."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, file_of, run_program
from paths import PROJECT

SIZE = 1 << 20
TIMEOUT = 60

#: Ask the server for all it has; tell that, and what gsplice has done.
ASK = """
import hashlib, json, sys
import gevent, gevent.socket

def ask(address):
    with gevent.socket.create_connection(address) as sock:
        sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    return answer.partition(b"\\r\\n\\r\\n")[2]

server.start()
body = gevent.spawn(ask, server.address).get()
server.stop()
gsplice = sys.modules.get("gsplice")
stats = gsplice.stats().as_dict() if gsplice else None
short = f"{len(body)} bytes {hashlib.sha256(body).hexdigest()[:12]}"
print(json.dumps({"body": short, "stats": stats}))
"""

PYWSGI = """
from gevent.pywsgi import WSGIServer

class Wrapper:
    def __init__(self, file): self.file = file
    def __iter__(self): return iter(lambda: self.file.read(8192), b"")
    def close(self): self.file.close()

def app(environ, start_response):
    start_response("200 OK", [])
    return environ.get("wsgi.file_wrapper", Wrapper)(open(sys.argv[1], "rb"))

server = WSGIServer(("127.0.0.1", 0), app, log=None, error_log=None)
"""

STREAM = """
from gevent.server import StreamServer

def handle(sock, address):
    sock.recv(1 << 16)
    sock.sendall(b"\\r\\n\\r\\n")
    with open(sys.argv[1], "rb") as file:
        sock.sendfile(file)

sys.stderr = None  # such a server has no log of its own
server = StreamServer(("127.0.0.1", 0), handle)
"""

PATCH = "import gevent.monkey; gevent.monkey.patch_all({})\n"

PROGRAMS = {
    "pywsgi": PYWSGI,
    "pywsgi, patched by gevent": PATCH.format("") + PYWSGI,
    "pywsgi, patched by gevent after it": "import gevent.pywsgi\n" + PATCH.format("") + PYWSGI,
    "StreamServer": STREAM,
    "StreamServer, patched by gevent": PATCH.format("") + STREAM,
    "gsplice for something else": "import gsplice\n" + PYWSGI,
    "patched again by gevent": PATCH.format("queue=False, gsplice=False")
    + "import warnings; warnings.simplefilter('ignore')\n"
    + PATCH.format("")
    + PYWSGI,
}

#: What the program says counts more.
LEFT = {
    "gevent, patched without": PATCH.format("gsplice=False") + PYWSGI,
    "put back": "import gsplice; gsplice.patch_all(); gsplice.unpatch_all()\n" + PYWSGI,
    "a setting": "from gsplice.config import settings; settings.patch_all = False\n" + PYWSGI,
}


def run(program: str, served: Path, value: str) -> dict[str, Any]:
    told = run_program("import sys\n" + program + ASK, served, GSPLICE_PATCH_ALL=value)
    answer: dict[str, Any] = json.loads(told)
    return answer


@pytest.mark.few(4)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_server_is_reached(name: str, tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    told = run(PROGRAMS[name], served, "1")
    assert told["body"] == digest(served.read_bytes())
    assert told["stats"]["bytes_spliced"] == SIZE
    assert told["stats"]["fallbacks"] == {}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("value", ["", "0", " No "])
def test_switched_off_it_is_not(name: str, value: str, tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    told = run(PROGRAMS[name], served, value)
    assert told["body"] == digest(served.read_bytes())
    assert told["stats"] is None or told["stats"]["transfers"] == 0


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LEFT)
def test_what_the_program_decides_counts_more(name: str, tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    told = run(LEFT[name], served, "1")
    assert told["body"] == digest(served.read_bytes())
    assert told["stats"] is None or told["stats"]["transfers"] == 0
    assert (told["stats"] is None) == (
        "gsplice;" not in LEFT[name] and "settings" not in LEFT[name]
    )


def test_only_what_the_program_imports_is_imported_before_a_server_starts() -> None:
    program = """
import sys
print(*sorted(sys.modules))
from gevent.pywsgi import WSGIServer
server = WSGIServer(("127.0.0.1", 0), print)
print(*sorted(sys.modules))
"""
    plain, on = (run_program(program, GSPLICE_PATCH_ALL=value) for value in ("", "1"))
    for without, with_it in zip(plain.splitlines(), on.splitlines(), strict=True):
        more = {*with_it.split()} - {*without.split()}
        assert more - {"__future__"} == {"_gsplice_start", "_gsplice_after_import"}


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_variable_nothing_at_all_is_imported(value: str) -> None:
    program = "import sys; print([name for name in sys.modules if 'gsplice' in name])"
    imported = run_program(program, GSPLICE_PATCH_ALL=value, GSPLICE_REPORT="")
    assert imported == ("[]\n" if not value else "['_gsplice_after_import', '_gsplice_start']\n")


def test_where_nothing_can_be_patched_the_log_says_so(tmp_path: Path) -> None:
    served = file_of(tmp_path / "served", SIZE)
    program = "import sys\n" + PYWSGI.replace(", error_log=None", "") + ASK
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=splice:error=ENOSYS"]
        + [sys.executable, "-c", program, served],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"GSPLICE_PATCH_ALL": "1"},
    )
    assert json.loads(done.stdout)["body"] == digest(served.read_bytes())
    assert done.stderr == (
        "gsplice: nothing is patched: splice(2) is refused here: Function not implemented."
        " See: python -m gsplice doctor\n"
    )


def test_a_server_that_cannot_start_raises_its_error() -> None:
    program = """
import errno, socket, warnings
warnings.simplefilter("ignore")  # gevent leaves its socket open
from gevent.server import StreamServer
with socket.create_server(("127.0.0.1", 0)) as taken:
    try:
        StreamServer(taken.getsockname(), print).start()
    except OSError as err:
        print(err.errno == errno.EADDRINUSE)
"""
    assert run_program(program, GSPLICE_PATCH_ALL="1") == "True\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has gsplice installed from a wheel, and nothing else."""
    directory = tmp_path_factory.mktemp("wheel")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, PROJECT]
    subprocess.run(wheel, check=True, timeout=TIMEOUT)
    venv.create(directory / "venv", symlinks=True)
    interpreter: Path = directory / "venv" / "bin" / "python"
    install = ["install", "-q", "--no-deps", *directory.glob("*.whl")]
    pip = [sys.executable, "-m", "pip", "--python", interpreter, *install]
    subprocess.run(pip, check=True, timeout=TIMEOUT)
    return interpreter


def imported(python: Path, *options: str) -> str:
    done = subprocess.run(
        [python, *options, "-c", "import sys; print(*[n for n in sys.modules if 'gsplice' in n])"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd="/",
        env={"GSPLICE_PATCH_ALL": "1"},
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.strip()


@pytest.mark.thorough
def test_an_installed_wheel_waits_for_servers_also_where_there_is_no_gevent(python: Path) -> None:
    assert imported(python) == "_gsplice_after_import _gsplice_start"
    assert imported(python, "-I") == "_gsplice_after_import _gsplice_start"
    assert imported(python, "-S") == ""


@pytest.mark.thorough
def test_an_installed_wheel_reaches_a_server(python: Path, tmp_path: Path) -> None:
    """gevent is lent to it, from a folder whose .pth files are not read."""
    import gevent

    site = next(python.parents[1].glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(os.path.dirname(os.path.dirname(gevent.__file__)))
    served = file_of(tmp_path / "served", SIZE)
    program = f"import sys\n{PYWSGI}{ASK}\nprint(gsplice.__file__, file=sys.stderr)"
    done = subprocess.run(
        [python, "-c", program, served],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd="/",
        env={"GSPLICE_PATCH_ALL": "1"},
    )
    assert done.stderr == f"{site}/gsplice/__init__.py\n"
    told = json.loads(done.stdout)
    assert told["body"] == digest(served.read_bytes())
    assert told["stats"]["bytes_spliced"] == SIZE
