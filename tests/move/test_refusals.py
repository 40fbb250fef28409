"""sendfile(2) and splice(2) fail where reading and writing work, and where these fail as well.

strace makes the calls fail, in a process of its own. An error of a file is that of the read, if it
has one; a connection says what is wrong with it once, so that error is final.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import digest, ended_with, file_of, some_bytes
from ends import GUARD, MiB
from paths import PYTHONPATH
from processes import Server, command, request
from strace import SIZE as TRANSFERRED
from strace import traced as transferred

STRACE = ["strace", "-f", "-qq", "--seccomp-bpf"]
SIZE = 5 * MiB + 3

PROGRAM = """
import hashlib, json, shutil, sys
import gevent, gsplice
from conftest import receiver
from ends import connection
from gsplice._patches import socket_sendfile as _socket

way, path = sys.argv[1:]
gsplice.patch_all()
gevent.get_hub()
ours, theirs = connection()
arrived = receiver(theirs)
result = failed = None
with open(path, "rb") as file, gevent.Timeout(20):
    try:
        if way == "_sendfile_use_sendfile":
            try:
                result = _socket._sendfile_use_sendfile(ours, file)
            except _socket._GiveupOnSendfile:
                result = "gave up"
        elif way == "sendfile":
            result = gsplice.sendfile(ours, file)
        elif way == "copy":
            result = gsplice.copy(file, ours)
        else:
            with ours.makefile("wb") as out:
                gsplice.copyfileobj(file, out)
    except OSError as err:
        failed = err.errno
    position = file.tell()
    ours.close()
    body = arrived.get()
stats = gsplice.stats()
print(json.dumps({
    "result": result,
    "failed": failed,
    "position": position,
    "arrived": f"{len(body)} bytes {hashlib.sha256(body).hexdigest()[:12]}",
    **stats.as_dict(),
}))
"""

WAYS = ["sendfile", "_sendfile_use_sendfile", "copyfileobj", "copy"]
#: The call that moves the file, and the settings that bring it about: whether the page cache has
#: it, and whether the pool has a pipe for it.
TEMPERATURES = {
    "hot": ("splice", {"GSPLICE_OFFLOAD": "never"}),
    "cold": ("splice", {"GSPLICE_OFFLOAD": "always"}),
    "no pipe": ("sendfile", {"GSPLICE_OFFLOAD": "never", "GSPLICE_MAX_PIPES": "0"}),
}
#: What a filesystem or a driver has said for want of something better, here or elsewhere.
OF_FILES = ["ENODATA", "EOVERFLOW", "EIO", "EREMOTEIO", "ENOMEM", "EACCES"]
#: What a connection says.
OF_CONNECTIONS = ["EPIPE", "ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH"]
READS = "pread64,preadv2,read"


def environment(temperature: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": PYTHONPATH, **TEMPERATURES[temperature][1]}


def traced(way: str, path: Path, temperature: str, *options: str) -> SimpleNamespace:
    """Send the file at *path* with strace's *options*; return what is to be said of it."""
    log = path.with_name("strace.log")
    done = subprocess.run(
        [*STRACE, "-o", log, *options, sys.executable, "-c", PROGRAM, way, path],
        capture_output=True,
        text=True,
        timeout=GUARD * 2,
        env=environment(temperature),
    )
    assert done.returncode == 0, done.stderr
    assert "(INJECTED)" in log.read_text()
    said = SimpleNamespace(**json.loads(done.stdout))
    if temperature == "no pipe":
        assert said.fallbacks.pop("no_pipe") == 1
    return said


def failing(calls: str, error: str, when: str, path: Path | None = None) -> list[str]:
    """Return what has *calls* fail; those that *path* is used in, if it is given."""
    on = [] if path is None else ["-P", str(path)]
    return [*on, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"]


def check_whole(said: SimpleNamespace, data: bytes) -> None:
    assert said.failed is None
    assert said.arrived == digest(data)
    assert said.result in (None, len(data))
    assert said.position == len(data)
    assert said.fallbacks == {"refused": 1}
    assert said.pipes_in_use == 0


@pytest.mark.few(4)
@pytest.mark.parametrize("error", OF_FILES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_kernel_does_not_send_is_read(
    tmp_path: Path, way: str, temperature: str, error: str
) -> None:
    path = file_of(tmp_path / "file", SIZE)
    call = TEMPERATURES[temperature][0]
    said = traced(way, path, temperature, *failing(call, error, "1+", path))
    if way == "_sendfile_use_sendfile":
        assert (said.result, said.failed, said.position) == ("gave up", None, 0)
        assert said.arrived == digest(b"")
    else:
        check_whole(said, some_bytes(SIZE))
        assert said.bytes_copied == SIZE


@pytest.mark.few(2)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_kernel_sends_no_further_is_read(
    tmp_path: Path, way: str, temperature: str
) -> None:
    path = file_of(tmp_path / "file", SIZE)
    call = TEMPERATURES[temperature][0]
    said = traced(way, path, temperature, *failing(call, "ENODATA", "2+", path))
    if way == "_sendfile_use_sendfile":
        said.fallbacks["refused"] = 1  # it has no other way to go on, and counts none
    check_whole(said, some_bytes(SIZE))
    assert said.bytes_sendfile + said.bytes_spliced > 0
    assert said.bytes_copied > 0


@pytest.mark.few
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", ["sendfile", "copyfileobj", "copy"])
def test_what_cannot_be_read_either_is_the_error_of_the_read(
    tmp_path: Path, way: str, temperature: str
) -> None:
    path = file_of(tmp_path / "file", SIZE)
    call = TEMPERATURES[temperature][0]
    faults = failing(f"{call},{READS}", "EIO", "1+", path)
    faults[-1] = f"inject={READS}:error=EIO"
    said = traced(way, path, temperature, *faults, "-e", f"inject={call}:error=ENODATA")
    assert said.failed == errno.EIO
    assert said.position == 0
    assert said.arrived == digest(b"")


@pytest.mark.few(3)
@pytest.mark.parametrize("error", OF_CONNECTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_connection_says_is_raised(
    tmp_path: Path, way: str, temperature: str, error: str
) -> None:
    """Asked again it would say something else, so nobody asks."""
    path = file_of(tmp_path / "file", SIZE)
    # strace counts the calls of each thread. This one tries splice(2), and then drains a pipe,
    # which it has filled if the file is hot.
    call, when = {
        "hot": ("splice", "3+"),
        "cold": ("splice", "2+"),
        "no pipe": ("sendfile", "1+"),
    }[temperature]
    faults = failing(call, error, when)
    said = traced(way, path, temperature, *faults)
    assert said.failed == getattr(errno, error)
    assert said.fallbacks == {}
    assert said.pipes_in_use == 0


# ---- servers


@contextlib.contextmanager
def serving(kind: str, root: Path, temperature: str, faults: list[str]) -> Any:
    environ = environment(temperature) | {"APPS_ROOT": str(root), "APPS_GSPLICE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        options = {"env": environ, "pass_fds": [fd], "start_new_session": True}
        run = [*STRACE, "-o", str(root / "strace.log"), *faults, *command(kind, fd)]
        with ended_with(run, **options) as process:
            try:
                yield Server(listener.getsockname())
            finally:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.few(2)
@pytest.mark.parametrize("when", ["1+", "2+"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["pywsgi", "gunicorn-gevent", "gunicorn-gevent_pywsgi"])
@pytest.mark.parametrize("headers", [[], ["Range: bytes=100-4999999"]], ids=["whole", "range"])
def test_a_server_reads_what_the_kernel_does_not_send(
    tmp_path: Path, kind: str, temperature: str, when: str, headers: list[str]
) -> None:
    path = file_of(tmp_path / "file.bin", SIZE)
    faults = failing(TEMPERATURES[temperature][0], "ENODATA", when, path)
    with serving(kind, tmp_path, temperature, faults) as server:
        answer = server.ask(request("/flask/file.bin", *headers))
        seen = server.seen()
    body = answer.partition(b"\r\n\r\n")[2]
    data = some_bytes(SIZE)
    assert digest(body) == digest(data[100:5_000_000] if headers else data)
    assert seen["fallbacks"]["refused"] == 1


# ---- into a file


@pytest.mark.few
@pytest.mark.parametrize("error", ["ENODATA", "EREMOTEIO", "EIO"])
@pytest.mark.parametrize("when", ["1+", "2+"])
@pytest.mark.parametrize("source", ["unix", "bare_tcp", "pipe"])
def test_what_the_kernel_does_not_splice_into_a_file_is_written(
    tmp_path: Path, source: str, when: str, error: str
) -> None:
    faults = failing("splice", error, when, tmp_path / "end1")
    said, log = transferred(tmp_path, source, "file", *faults)
    assert any("(INJECTED)" in line for line in log)
    assert said.failed is None
    assert said.result == said.arrived == said.written == TRANSFERRED
    assert said.prefix
    assert said.fallbacks == {"refused": 1}


@pytest.mark.few(1)
@pytest.mark.parametrize("source", ["unix", "bare_tcp", "pipe"])
def test_what_cannot_be_written_either_is_the_error_of_the_write(
    tmp_path: Path, source: str
) -> None:
    faults = failing("splice,write,pwrite64", "ENOSPC", "1+", tmp_path / "end1")
    faults[-1] = "inject=write,pwrite64:error=ENOSPC"
    said, log = transferred(tmp_path, source, "file", *faults, "-e", "inject=splice:error=ENODATA")
    assert any("(INJECTED)" in line for line in log)
    assert said.failed == errno.ENOSPC
    assert said.arrived == said.written == 0
    assert said.pipes_in_use == 0
    assert said.leaked <= 0
