"""What runs on a thread of ours imports nothing, takes no lock of gevent's and makes no hub.

gevent makes the locks of imports its own. A thread that meets another at one gets a hub: two wait
for each other for ever, and where no descriptor is left libev ends the process. So every job is
done here in an interpreter that has done nothing before, with a watch on its threads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program
from ends import mounted
from slowfs import SlowFS

LOOPS = ["libev-cext", "libuv"]

#: When gevent patches the standard library: it may have what gsplice has imported already, or not.
ORDERS = {
    "patched before": "import gevent.monkey; gevent.monkey.patch_all(); import gsplice",
    "patched after": "import gsplice, gevent.monkey; gevent.monkey.patch_all()",
    "not patched": "import gsplice",
}

#: Notes what is imported elsewhere than on the main thread, a module that is there already, too.
WATCH_IMPORTS = """
import _thread, builtins, sys
native_ident, main = _thread.get_ident, _thread.get_ident()
wrong = []

def note(what):
    if native_ident() != main:
        wrong.append(what)

plain_import = builtins.__import__
def watched_import(name, *args, **kwargs):
    note(f"import {name}")
    return plain_import(name, *args, **kwargs)
builtins.__import__ = watched_import
sys.addaudithook(lambda event, args: note(f"import {args[0]}") if event == "import" else None)
"""

#: Notes the hubs made there, and which files and types the functions called in a job are of.
WATCH_CALLS = """
import gevent, gevent.hub, gevent.socket, shutil, os, threading, time
plain_init = gevent.hub.Hub.__init__
def watched_init(self, *args, **kwargs):
    note("a hub")
    plain_init(self, *args, **kwargs)
gevent.hub.Hub.__init__ = watched_init

called, jobs = set(), set()
def profile(frame, event, arg):
    if event == "call":
        code = frame.f_code
        called.add(code.co_filename)
        if "gsplice" in code.co_filename:
            jobs.add(code.co_name)
    elif event == "c_call":
        owner = arg.__self__
        called.add(owner.__name__ if isinstance(owner, type(sys)) else type(owner).__module__)
        jobs.add(arg.__name__)
threading.setprofile(profile)
"""

#: Every kind of job, on each of the directories, without and with an error.
JOBS = """
import contextlib, json
from gsplice.config import settings
*plain, mount, control = sys.argv[1:]
gsplice.patch_all()
content = os.urandom(300_000)
errors = set()

def cold(path):
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path

def send(path):
    near, far = gevent.socket.socketpair()
    received = gevent.spawn(lambda: b"".join(iter(lambda: far.recv(65536), b"")))
    with contextlib.closing(far), near, open(path, "rb") as file:
        try:
            near.sendfile(file)
            near.shutdown(1)
            assert received.get() == content
        finally:
            received.kill()

def copy(path, to):
    shutil.copyfile(path, to)
    assert os.stat(to).st_size == len(content)

def copy_object(path, to):
    with open(path, "rb") as src, open(to, "wb") as dst:
        shutil.copyfileobj(src, dst)

def download(to):
    near, far = gevent.socket.socketpair()
    sending = gevent.spawn(lambda: (far.sendall(content * 20), far.shutdown(1)))
    with contextlib.closing(far), near, open(to, "wb") as file:
        try:
            assert gsplice.copy(near, file) == 20 * len(content)
        finally:
            sending.kill()

def tell(name, number):
    with open(f"{control}/new", "w") as file:
        file.write(str(number))
    os.rename(f"{control}/new", f"{control}/{name}")

def begun(line):
    with open(f"{control}/log") as log:
        return line in log.read()

def killed(name, operation, function, *args):
    "Kill a greenlet while the filesystem keeps its thread waiting, which cleans up then."
    tell(f"hold-{operation}-{name}", 0)
    moving = gevent.spawn(function, *args)
    while not begun(f"begun {operation} {name} "):
        gevent.sleep(0.001)
    moving.kill()
    os.unlink(f"{control}/hold-{operation}-{name}")
    gone(gevent.get_hub())

def gone(hub):
    while len(hub._gsplice_threads._workers):
        gevent.sleep(0.001)

def failed(function, *args):
    try:
        function(*args)
    except OSError as err:
        errors.add(err.errno)

def each_job(name, directories):
    pipes = settings.max_pipes
    for directory in directories:
        for other in directories:
            for way in (copy, copy_object):
                for number in (pipes, 0):  # without a pipe: pread(2) and pwrite(2)
                    settings.max_pipes = number
                    gsplice.pipes.reclaim(), gsplice.pipes.reclaim()
                    way(cold(f"{directory}/{name}"), f"{other}/{name}-to")
        for number in (pipes, 0):
            settings.max_pipes = number
            gsplice.pipes.reclaim(), gsplice.pipes.reclaim()
            send(cold(f"{directory}/{name}"))
            download(f"{directory}/{name}-down")
        settings.max_pipes = pipes

def run():
    for settings.offload in ("auto", "always"):
        name = settings.offload
        each_job(name, [*plain, mount])
        source = cold(f"{mount}/{name}-in")
        cold(f"{mount}/{name}-bad"), cold(f"{mount}/{name}-out")
        killed(f"{name}-in", "read", send, source)
        killed(f"{name}-out", "write", copy, f"{plain[0]}/{name}", f"{mount}/{name}-out")
        killed(f"{name}-down", "write", download, f"{mount}/{name}-down")
        tell(f"EIO-read-{name}-bad", 0)
        tell(f"ENOSPC-write-{name}-bad", 0)
        failed(send, f"{mount}/{name}-bad")
        failed(copy, f"{mount}/{name}-bad", f"{plain[0]}/{name}-to")
        failed(copy, f"{plain[0]}/{name}", f"{mount}/{name}-bad")
        failed(download, f"{mount}/{name}-bad")
    gone(gevent.get_hub())

gevent.spawn(run).get()
stats = gsplice.stats().as_dict()
print(json.dumps({"wrong": wrong, "called": [*called], "jobs": [*jobs], "errors": [*errors],
                  "bytes": {name: number for name, number in stats.items() if "bytes" in name}}))
"""

#: Where functions may come from: of gevent's only what brings the result, or a turn, to the hub.
HARMLESS = (
    "/gsplice/",
    "/contextlib.py",
    "/gevent/_ffi/loop.py",
    "/gevent/libuv/loop.py",
    "/gevent/libuv/watcher.py",
    "/gevent/_ffi/watcher.py",
    "/gevent/_socket3.py",
    "/gevent/_socketcommon.py",  # fileno()
)

ERRNO_EIO, ERRNO_ENOSPC = 5, 28


@contextmanager
def filesystems(tmp_path: Path, *options: str) -> Iterator[list[Path]]:
    """Give directories on a disk, in memory and on an overlay, and a FUSE mount and its control."""
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        places = [tmp_path / name for name in ("disk", "lower", "upper", "work", "overlay")]
        for place in places:
            place.mkdir()
        disk, lower, upper, work, overlay = places
        directories = [disk, memory]
        if os.geteuid() == 0:
            layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
            stack.enter_context(mounted(overlay, "-t", "overlay", "-o", layers, "overlay"))
            directories.append(overlay)
        slow = stack.enter_context(SlowFS(tmp_path, *options))
        yield [*directories, slow.mount, slow.control]


@pytest.mark.few(2)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("options", [(), ("--direct-io",)], ids=["cached", "direct_io"])
def test_no_job_does_what_a_thread_must_not(
    tmp_path: Path, loop: str, order: str, options: tuple[str, ...]
) -> None:
    program = WATCH_IMPORTS + ORDERS[order] + WATCH_CALLS + JOBS
    with filesystems(tmp_path, *options) as places:
        told: dict[str, Any] = json.loads(run_program(program, *places, GEVENT_LOOP=loop))
    assert told["wrong"] == []
    files = {name for name in told["called"] if "/" in name}
    assert {name for name in files if not any(part in name for part in HARMLESS)} == set()
    assert not {name for name in told["called"] if name in ("importlib", "_imp", "logging")}
    assert {
        *(
            "_fill_and_drain",
            "_copy_range",
            "_splice_range",
            "_drain_and_fill",
            "_write_at",
            "pread",
            "close",
        ),
        *("filesystem_type", "refuse_uncached", "can_be_mapped", "close_now"),
    } <= {*told["jobs"]}
    assert {ERRNO_EIO, ERRNO_ENOSPC} <= {*told["errors"]}
    assert told["bytes"]["bytes_spliced"] and told["bytes"]["bytes_copy_file_range"], told["bytes"]


def test_without_ctypes_the_questions_have_no_answer(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["ctypes"] = None
import gsplice, gevent, os, shutil
from gsplice._os import linux as _linux
gsplice.patch_all()
path = sys.argv[1]
with open(path, "wb") as file:
    file.write(bytes(300_000))
with open(path, "rb") as file:
    fd = file.fileno()
    print(_linux.filesystem_type(fd), _linux.in_core(fd, 0, 1), _linux.can_be_mapped(fd))
gevent.spawn(shutil.copyfile, path, path + "-to").get()
assert os.stat(path + "-to").st_size == 300_000
print(gsplice.stats().bytes_copy_file_range)
"""
    assert run_program(program, tmp_path / "file") == "None False True\n300000\n"


# ---- the first transfers of a process

#: As many at once as there are threads, of two filesystems that nobody knows yet.
FIRST = """
{order}
import gevent, os, shutil, sys
gsplice.patch_all()
directories, size = sys.argv[1:], 300_000
gevent.sleep(0)
for directory in directories:
    for i in range(8):
        with open(f"{{directory}}/from{{i}}", "wb") as file:
            file.write(os.urandom(size))
def copy(i):
    directory = directories[i % 2]
    shutil.copyfile(f"{{directory}}/from{{i}}", f"{{directory}}/to{{i}}")
copying = [gevent.spawn(copy, i) for i in range(8)]
gevent.joinall(copying, timeout=20, raise_error=True)
assert all(each.successful() for each in copying), "hangs"
assert gsplice.stats().bytes_copy_file_range == 8 * size
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_first_transfers_end(tmp_path: Path, loop: str, order: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for _ in range(6):
            run_program(FIRST.format(order=ORDERS[order]), tmp_path, memory, GEVENT_LOOP=loop)


#: Sends a cold file when no more than a few descriptors can be had, all that a server has loaded.
FEW = """
{order}
import gevent, gevent.socket, os, resource, sys
gsplice.patch_all()
gevent.sleep(0)
path, left = sys.argv[1], int(sys.argv[2])
content = os.urandom(300_000)
file = open(path, "wb+")
file.write(content)
file.flush()
os.fsync(file.fileno())
os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
file.seek(0)
near, far = gevent.socket.socketpair()
received = gevent.spawn(lambda: b"".join(iter(lambda: far.recv(65536), b"")))
gsplice.config.settings.offload = "always"
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    for fd in taken[:left]:
        os.close(fd)
assert gevent.spawn(near.sendfile, file).get() == len(content)
near.shutdown(1)
assert received.get() == content
stats = gsplice.stats()
for fd in taken[left:]:
    os.close(fd)
for each in (file, near, far):
    each.close()
print(stats.offloads > 0)
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_first_cold_read_with_few_descriptors_left(tmp_path: Path, loop: str, order: str) -> None:
    for left in (0, 1, 2, 4, 8, 13, 18):
        program = FEW.format(order=ORDERS[order])
        told = run_program(program, tmp_path / "cold", left, GEVENT_LOOP=loop)
        if left == 0 or left >= 4:  # it depends on what there is to import
            assert told == f"{left > 0}\n"
