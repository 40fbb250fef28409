"""Patching and putting back, each in an interpreter of its own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import warnings

import pytest


def run(program: str, **environ: str) -> str:
    """Run *program* in a new interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environ},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


#: What copyfile() calls, by the version of Python.
FAST_COPIES = [
    name for name in ("_fastcopy_sendfile", "_fastcopy_copy_file_range") if hasattr(shutil, name)
]

IN_HTTP_CLIENT = [f"http.client.HTTPConnection.{name}" for name in ("send", "_send_output")]
IN_PYWSGI = [
    f"pywsgi.WSGIHandler.{name}"
    for name in ("get_environ", "process_result", "handle", "_write_with_headers", "_sendall")
]

STRACE = ("strace", "-f", "-qq", "-o", "/dev/null", "-e")

SEND_A_FILE = """
import os, tempfile, gevent, gevent.socket, gsplice
a, b = gevent.socket.socketpair()
with tempfile.TemporaryFile() as f:
    f.write(bytes(200_000)); f.seek(0)
    def receive():
        received = 0
        while received < 200_000:
            received += len(b.recv(65536))
    receiving = gevent.spawn(receive)
    assert a.sendfile(f) == 200_000
    receiving.get()
a.close(); b.close()
print(gsplice.stats().bytes_spliced)
"""


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "patching",
    [
        "import gsplice; gsplice.patch_all()",
        "import gsplice; gsplice.patch_all(); gsplice.patch_all()",
        "import gevent.monkey, gsplice; gevent.monkey.patch_all(); gsplice.patch_all()",
        "import gevent.monkey, gsplice; gsplice.patch_all(); gevent.monkey.patch_all()",
    ],
)
def test_works_before_after_and_without_gevents_own_patching(patching: str) -> None:
    assert run(patching + SEND_A_FILE) == "200000\n"


def test_nothing_is_patched_by_importing() -> None:
    assert run("import gsplice" + SEND_A_FILE) == "0\n"


def test_gevents_queries_tell_the_truth_and_unpatching_restores_them() -> None:
    run("""
import gevent.monkey, gevent.pywsgi, http.client, shutil, urllib3
from gevent._socket3 import socket
fast = [name for name in vars(shutil) if name.startswith("_fastcopy_") and "fcopyfile" not in name]
assert fast
names = [*((shutil, name) for name in ["copyfileobj", *fast]),
         (socket, "sendfile"), (socket, "_sendfile_use_sendfile"),
         *((gevent.pywsgi.WSGIHandler, name) for name in
           ["get_environ", "process_result", "handle", "_write_with_headers", "_sendall"]),
         *((http.client.HTTPConnection, name) for name in ["send", "_send_output"]),
         (urllib3.connection.HTTPConnection, "request")]
before = [getattr(owner, name) for owner, name in names]
saved = {module: dict(items) for module, items in gevent.monkey.saved.items()}
import gsplice
for round in range(2):
    assert len(gsplice.patch_all().patched) == len(names)
    for (owner, name), original in zip(names, before):
        where = owner.__name__ if owner is shutil else f"{owner.__module__}.{owner.__name__}"
        assert getattr(owner, name) is not original
        assert gevent.monkey.get_original(where, name) is original
        assert gevent.monkey.is_object_patched(where, name)
    assert not gevent.monkey.is_module_patched("socket")
    gsplice.unpatch_all()
    assert [getattr(owner, name) for owner, name in names] == before
    assert gevent.monkey.saved == saved
gsplice.unpatch_all()
""")


def test_result_names_what_was_patched_and_why_not_the_rest() -> None:
    assert run("""
import gsplice
nothing = dict.fromkeys(gsplice.monkey.SWITCHES, False)
result = gsplice.patch_all(shutil=False)
print(bool(result), result.patched)
for name, reason in result.not_patched.items(): print(name, "--", reason)
again = gsplice.patch_all(**nothing)
print(bool(again), again.not_patched == result.not_patched)
gsplice.unpatch_all()
print(gsplice.patch_all(**nothing))
""").splitlines() == [
        "True ('socket.sendfile', 'socket._sendfile_use_sendfile')",
        "shutil.copyfileobj -- not asked for",
        *(f"shutil.{name} -- not asked for" for name in FAST_COPIES),
        *(f"{name} -- will be when gevent.pywsgi is imported" for name in IN_PYWSGI),
        "gunicorn.GeventWorker.handle_request -- will be when gunicorn.workers.ggevent is imported",
        *(f"{name} -- will be when http.client is imported" for name in IN_HTTP_CLIENT),
        "urllib3.HTTPConnection.request -- will be when urllib3.connection is imported",
        "True True",
        "patched: nothing; not patched: socket.sendfile (not asked for), "
        "socket._sendfile_use_sendfile (not asked for), shutil.copyfileobj (not asked for), "
        + "".join(f"shutil.{name} (not asked for), " for name in FAST_COPIES)
        + "".join(f"{name} (not asked for), " for name in IN_PYWSGI)
        + "gunicorn.GeventWorker.handle_request (not asked for), "
        + "".join(f"{name} (not asked for), " for name in IN_HTTP_CLIENT)
        + "urllib3.HTTPConnection.request (not asked for)",
    ]


def test_servers_are_patched_when_they_are_imported_and_not_before() -> None:
    run("""
import sys, gsplice
gsplice.patch_all()
assert "gevent.pywsgi" not in sys.modules and "ssl" not in sys.modules
import gevent.pywsgi
assert gevent.monkey.is_object_patched("gevent.pywsgi.WSGIHandler", "process_result")
import http.client
assert [*gsplice.patch_all(http_client=False).not_patched] == [
    "gunicorn.GeventWorker.handle_request", "urllib3.HTTPConnection.request"]
assert not [name for name in sys.modules if name.startswith("gunicorn")]
import gunicorn.workers.ggevent
worker = "gunicorn.workers.ggevent.GeventWorker"
assert gevent.monkey.is_object_patched(worker, "handle_request")
import urllib3
assert not gsplice.patch_all().not_patched
assert "gsplice" not in str(sys.meta_path)
gsplice.unpatch_all()
assert not gevent.monkey.is_module_patched(worker)
""")


def test_a_server_that_is_being_imported_is_left_alone() -> None:
    run("""
import sys, types, gsplice
sys.modules["gevent.pywsgi"] = types.ModuleType("gevent.pywsgi")
assert "pywsgi.WSGIHandler.get_environ" in gsplice.patch_all().not_patched
""")


def test_pywsgi_is_patched_however_often_it_was_looked_for() -> None:
    run("""
import importlib.util, sys, gsplice
gsplice.patch_all()
importlib.util.find_spec("gevent.pywsgi")
sys.modules["gevent.server"] = None
try:
    import gevent.pywsgi
except ImportError:
    del sys.modules["gevent.server"]
else:
    raise AssertionError("imported without gevent.server")
import gevent.pywsgi
assert gevent.monkey.is_object_patched("gevent.pywsgi.WSGIHandler", "process_result")
assert gsplice.monkey._awaited == {"gunicorn", "urllib3"}
""")


def test_pywsgi_imported_after_unpatching_stays_as_it_is() -> None:
    run("""
import sys, gsplice
finders = list(sys.meta_path)
gsplice.patch_all()
gsplice.unpatch_all()
assert sys.meta_path == finders
import gevent.pywsgi
assert not gevent.monkey.is_module_patched("gevent.pywsgi.WSGIHandler")
""")


def test_patching_creates_no_hub_and_no_thread_and_imports_nothing_that_must_wait() -> None:
    run("""
import sys
import gsplice
gsplice.patch_all()
import _thread
from gevent._hub_local import get_hub_if_exists
assert get_hub_if_exists() is None
assert _thread._count() == 0
early = {"ssl", "concurrent.futures", "gevent.fileobject", "gevent.pywsgi"}
assert not early & set(sys.modules), early & set(sys.modules)
import warnings, gevent.monkey
warnings.simplefilter("error", gevent.monkey.MonkeyPatchWarning)
gevent.monkey.patch_all()
""")


def test_a_subscriber_may_forbid_it() -> None:
    run("""
import gevent.events, gsplice, shutil
def forbid(event):
    if type(event).__name__ == "GeventWillPatchModuleEvent" and event.module_name == "shutil":
        raise gevent.events.DoNotPatch
gevent.events.subscribers.append(forbid)
before = shutil.copyfileobj
result = gsplice.patch_all()
assert shutil.copyfileobj is before
assert "subscriber" in result.not_patched["shutil.copyfileobj"]
""")


@pytest.mark.parametrize("fault", ["ENOSYS", "EPERM"])
def test_where_splice_is_refused_nothing_is_patched(fault: str) -> None:
    program = """
import shutil, gsplice
before = shutil.copyfileobj
result = gsplice.patch_all()
print(bool(result), shutil.copyfileobj is before, sorted(set(result.not_patched.values())))
"""
    done = subprocess.run(
        [*STRACE, f"inject=splice:error={fault}", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    said = {"ENOSYS": "Function not implemented", "EPERM": "Operation not permitted"}[fault]
    assert done.stdout == f"False True ['splice(2) is refused here: {said}']\n"


def test_what_lacked_a_descriptor_once_is_tried_again() -> None:
    assert run("""
import os, resource, gsplice
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, limit[1]))
print(gsplice.patch_all().not_patched["shutil.copyfileobj"])
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
print(bool(gsplice.patch_all()))
""").splitlines() == ["splice(2) is refused here: Too many open files", "True"]


def test_elsewhere_than_on_linux_it_imports_patches_nothing_and_copies_all_the_same() -> None:
    run("""
import os, sys
import gevent.socket, io, shutil, tempfile
for name in ("splice", "pipe2", "copy_file_range", "register_at_fork", "SPLICE_F_MOVE"):
    delattr(os, name)
sys.platform = "darwin"
sys.modules["fcntl"] = None
import gsplice
sys.platform = "linux"
result = gsplice.patch_all()
assert not result, result
assert set(result.not_patched.values()) == {"needs splice(2), which only Linux has"}
a, b = gevent.socket.socketpair()
with a, b, tempfile.TemporaryFile() as src, tempfile.TemporaryFile() as dst:
    src.write(bytes(100_000)); src.seek(0)
    assert gsplice.copy(src, dst) == 100_000
    src.seek(0); gsplice.copyfileobj(src, dst)
    assert dst.tell() == 200_000
    assert gsplice.sendfile(a, src, 99_990) == 10
    assert b.recv(20) == bytes(10)
assert gsplice.pipes.acquire() is None
""")


def test_a_wrapper_that_is_there_before_us_is_what_the_rest_goes_to() -> None:
    run("""
import io, shutil, gevent.socket, gsplice
called = []
def wrapped(original):
    def wrapper(*args):
        called.append(original.__name__)
        return original(*args)
    return wrapper
shutil.copyfileobj = wrapped(shutil.copyfileobj)
gevent.socket.socket.sendfile = wrapped(gevent.socket.socket.sendfile)
gsplice.patch_all()
a, b = gevent.socket.socketpair()
with a, b:
    a.sendfile(io.BytesIO(b"one"))
    shutil.copyfileobj(io.BytesIO(b"two"), io.BytesIO())
assert called == ["sendfile", "copyfileobj"]
""")


def test_a_loader_may_serve_several_modules() -> None:
    run("""
import importlib.machinery, sys
import gevent.monkey, gsplice
class OneForAll:
    loaders = {}
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        self.loaders[name], spec.loader = spec.loader, self
        return spec
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)
sys.meta_path.insert(0, OneForAll())
gsplice.patch_all()
sys.modules.pop("html", None)
import gevent.pywsgi
assert "pywsgi.WSGIHandler.get_environ" in gsplice.patch_all().patched
""")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["proxy", "slots", "legacy"])
def test_an_import_does_not_fail_because_of_a_loader(kind: str) -> None:
    """As wrapt puts one around another's, or as old ones are."""
    run(
        """
import importlib.machinery, importlib.util, sys
import gevent.monkey, gsplice
class Base:
    __slots__ = ["inner"]
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return None
class Slots(Base):
    __slots__ = []
    def exec_module(self, module): self.inner.exec_module(module)
class Legacy(Base):
    def load_module(self, name):
        module = sys.modules[name] = type(sys)(name)
        module.__file__ = self.inner.path
        self.inner.exec_module(module)
        return module
class Proxy:
    def __init__(self, inner): object.__setattr__(self, "inner", inner)
    def __getattr__(self, name): return getattr(self.inner, name)
    def __setattr__(self, name, value): setattr(self.inner, name, value)
    def exec_module(self, module): self.inner.exec_module(module)
class Finder:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if name != "gevent.pywsgi" or self.busy:
            return None
        self.busy = True
        if kind == "proxy":  # around whatever the others find
            spec = importlib.util.find_spec(name)
        else:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        self.busy = False
        spec.loader = {"proxy": Proxy, "slots": Slots, "legacy": Legacy}[kind](spec.loader)
        return spec
kind = """
        + repr(kind)
        + """
for first in (True, False):
    finder = Finder()
    if first:
        sys.meta_path.insert(0, finder)
    gsplice.patch_all()
    if not first:
        sys.meta_path.insert(0, finder)
    import warnings
    warnings.simplefilter("ignore")  # about old loaders
    import gevent.pywsgi
    assert gevent.pywsgi.WSGIServer
    if kind != "legacy":
        assert "pywsgi.WSGIHandler.get_environ" in gsplice.patch_all().patched
        assert "gsplice" not in type(gevent.pywsgi.__spec__.loader).__module__
    gsplice.unpatch_all()
    sys.meta_path.remove(finder)
    del sys.modules["gevent.pywsgi"], gevent.pywsgi
"""
    )


def test_settings_come_from_the_environment() -> None:
    assert (
        run(
            "from gsplice.config import settings; print(*vars(settings).values())",
            GSPLICE_PIPE_SIZE="65536",
            GSPLICE_MAX_PIPES="7",
            GSPLICE_PATCH_ALL="yes",
            GSPLICE_REPORT="0.5",
        )
        == "65536 7 16 64 auto 8 True 0.5\n"
    )


DEFAULTS = {
    "pipe_size": 1 << 20,
    "max_pipes": 256,
    "max_idle_hub": 16,
    "max_idle": 64,
    "offload": "auto",
    "threads": 8,
    "patch_all": False,
    "report": 0.0,
}
NUMBERS = sorted({*DEFAULTS} - {"offload", "patch_all", "report"})
NONSENSE = ["abc", "-1", "1e3", "1.5", "0x10", "5 6", "999999999999999999999", "9" * 5000]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, " 5 ", 5) for name in NUMBERS),
        *((name, str(1 << 30), 1 << 30) for name in NUMBERS),
        *((name, "0", 0) for name in NUMBERS if name != "threads"),
        *((name, value, DEFAULTS[name]) for name in DEFAULTS for value in ("", " ")),
        ("offload", " never ", "never"),
        ("patch_all", " YES ", True),
        ("patch_all", "0", False),
        ("report", " 60 ", 60.0),
        ("report", "0", 0.0),
        ("report", "1.5", 1.5),
    ],
)
def test_a_variable_that_makes_sense(name: str, value: str, expected: object) -> None:
    from gsplice.config import Settings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = Settings({f"GSPLICE_{name.upper()}": value})
    assert vars(settings) == DEFAULTS | {name: expected}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in DEFAULTS if name != "report" for value in NONSENSE),
        *(("report", value) for value in ("abc", "-1", "5 6", "1e99", "inf", "nan")),
        ("threads", "0"),
        ("offload", "AUTO!"),
        ("patch_all", "2"),
    ],
)
def test_a_variable_that_makes_no_sense_counts_as_not_set(
    name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    from gsplice.config import Settings

    variable = f"GSPLICE_{name.upper()}"
    with pytest.warns(RuntimeWarning) as warned:
        settings = Settings({variable: value, "GSPLICE_UNKNOWN": "abc"})
    assert vars(settings) == DEFAULTS
    [warning] = warned
    said = str(warning.message)
    assert said.startswith(f"{variable} must be ")
    assert said.endswith(f", not {value!r}; it counts as not set")
    assert caplog.record_tuples == [("gsplice", logging.WARNING, said)]
    with pytest.raises(ValueError, match="^" + name):
        setattr(settings, name, value)
    assert vars(settings) == DEFAULTS


def test_importing_gsplice_survives_variables_that_make_no_sense() -> None:
    wrong = {f"GSPLICE_{name.upper()}": "nonsense" for name in DEFAULTS}
    done = subprocess.run(
        [sys.executable, "-c", "import gsplice; print(vars(gsplice.config.settings))"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | wrong,
    )
    assert (done.returncode, done.stdout) == (0, f"{DEFAULTS}\n")
    for variable in wrong:
        assert done.stderr.count(f"RuntimeWarning: {variable} must be ") == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_pipes", "many", "max_pipes must be a whole number from 0 up, not 'many'"),
        ("max_pipes", -1, "max_pipes must be a whole number from 0 up, not -1"),
        ("max_idle", True, "max_idle must be a whole number from 0 up, not True"),
        ("max_idle", "", "max_idle must be a whole number from 0 up, not ''"),
        ("max_pipes", 10**21, "max_pipes must be at most 1073741824, not 10{21}$"),
        ("threads", 0, "threads must be at least 1, not 0"),
        ("offload", "maybe", "offload must be one of auto, never, always, not 'maybe'"),
        ("patch_all", "perhaps", "patch_all must be true or false, not 'perhaps'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, value: object, said: str) -> None:
    from gsplice.config import settings

    with pytest.raises(ValueError, match=said):
        setattr(settings, name, value)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    from gsplice.config import settings

    with pytest.raises(AttributeError, match="no setting 'max_pips'"):
        settings.max_pips = 3
