"""Every system call on the way of the bytes made to fail, in every kind of transfer.

strace makes the calls fail, from outside and whoever makes them; a preloaded shim where only one
command of fcntl(2) is to fail. The bytes come from, and arrive in, this process, which has no part
in the faults. Allowed is: everything arrives; or OSError, and a true prefix has arrived of which
the positions and the counters tell the exact length.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, some_bytes
from ends import GUARD
from gevent.monkey import get_original
from paths import PYTHONPATH
from transfers import BY_NAME, TRANSFERS, Kind

HERE = Path(__file__).parent

#: What each system call may say, by its man page; with that, EINTR, which none of them lists but
#: all answer to a signal, and ENOSYS and EPERM, which sandboxes give.
ERRORS = {
    "splice": "EAGAIN EBADF EINVAL ENOMEM ESPIPE EPIPE EIO ENOSPC ECONNRESET",
    "sendfile": "EAGAIN EBADF EFAULT EINVAL EIO ENOMEM EOVERFLOW ESPIPE EPIPE ECONNRESET",
    "pipe2": "EFAULT EINVAL EMFILE ENFILE ENOPKG ENOMEM",
    "preadv2": "EAGAIN EBADF EFAULT EINVAL EIO EISDIR ENXIO EOPNOTSUPP EOVERFLOW ESPIPE",
    "copy_file_range": "EBADF EFBIG EINVAL EIO EISDIR ENOMEM ENOSPC EOPNOTSUPP EOVERFLOW "
    "ETXTBSY EXDEV EDQUOT",
    "pread64": "EAGAIN EBADF EFAULT EINVAL EIO EISDIR ENXIO EOVERFLOW ESPIPE",
    "pwrite64": "EAGAIN EBADF EDQUOT EFAULT EFBIG EINVAL EIO ENOSPC ENXIO EOVERFLOW ESPIPE",
    "write": "EAGAIN EBADF EDQUOT EFAULT EFBIG EINVAL EIO ENOSPC EPIPE",
    "sendto": "EAGAIN EBADF ECONNRESET EFAULT EINVAL ENOBUFS ENOMEM ENOTCONN EPIPE",
    # Without those for which libev ends the process, whatever runs in it (EBADF, EINVAL, ELOOP).
    "epoll_ctl": "EEXIST ENOENT ENOMEM ENOSPC",
    "fcntl(F_SETPIPE_SZ)": "EBADF EBUSY EINVAL ENOMEM",
    "fcntl(F_DUPFD_CLOEXEC)": "EBADF EINVAL EMFILE ENOMEM",
}
ALWAYS = "EINTR ENOSYS EPERM"

#: Which calls fail: (the first, and then every so many; 0: no other).
WHEN = {"first": (1, 0), "second": (2, 0), "fifth": (5, 0), "every third": (1, 3)}

#: For the rest libev, told by the kernel of such an error, never wakes who waits: under unpatched
#: gevent, too. So sockets have a timeout then (seconds), and pipes, which can't, are left out.
TIMEOUT = {"epoll_ctl": 1}

#: Calls that Python makes for itself as well: they fail on this file only.
FILE = {"pread64": "source", "pwrite64": "sink", "write": "sink"}

COMMANDS = {"F_SETPIPE_SZ": 1031, "F_DUPFD_CLOEXEC": fcntl.F_DUPFD_CLOEXEC}

sleep = get_original("time", "sleep")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One system call that fails."""

    call: str
    error: str
    when: str

    @property
    def command(self) -> str | None:
        """The command of fcntl(2), if it is that."""
        found = re.fullmatch(r"fcntl\((.*)\)", self.call)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.call}: {self.error}, {self.when}"


def every_fault() -> list[Fault]:
    return [
        Fault(call, error, when)
        for call, errors in ERRORS.items()
        for error in [*errors.split(), *ALWAYS.split()]
        for when in WHEN
    ]


# ---- the ends, of which this process has the other sides


class Feeder(threading.Thread):
    """Writes all it has to a descriptor, and closes it."""

    def __init__(self, fd: int, data: bytes) -> None:
        super().__init__(daemon=True)
        self.fd, self.data = fd, data
        self.start()

    def run(self) -> None:
        view = memoryview(self.data)
        with open(self.fd, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while view:  # the other side may have had enough
                view = view[file.write(view[:100_000]) :]


class Drain(threading.Thread):
    """Reads from a descriptor until its end."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self.fd = fd
        self.arrived = bytearray()
        self.start()

    def run(self) -> None:
        with open(self.fd, "rb", buffering=0) as file, contextlib.suppress(ConnectionError):
            while data := file.read(200_000):
                self.arrived += data

    def result(self) -> bytes:
        self.join(GUARD)
        assert not self.is_alive(), "the end never came"
        return bytes(self.arrived)


def connected(kind: str) -> tuple[int, int]:
    """Return the descriptors of two connected sockets."""
    if kind.endswith("unix"):
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
    return ours.detach(), theirs.detach()


def source(kind: Kind, data: bytes, directory: Path) -> int:
    """Return a descriptor of an end that *data* comes from."""
    if kind.source == "file":
        (directory / "source").write_bytes(data)
        return os.open(directory / "source", os.O_RDONLY)
    if kind.source == "pipe":
        theirs, ours = os.pipe()
    else:
        ours, theirs = connected(kind.source)
    Feeder(ours, kind.preface + data)
    return theirs


def sink(kind: Kind, directory: Path) -> tuple[int, Callable[[], bytes]]:
    """Return a descriptor of an end to write to, and what tells what has arrived there."""
    if kind.sink == "file":
        path = directory / "sink"
        path.write_bytes(b"")
        return os.open(path, os.O_WRONLY), path.read_bytes
    if kind.sink == "pipe":
        ours, theirs = os.pipe()
    else:
        ours, theirs = connected(kind.sink)
        if kind.request:
            os.write(ours, kind.request)
        if kind.half_closed:
            with socket.socket(fileno=os.dup(ours)) as sock:
                sock.shutdown(socket.SHUT_WR)
    return theirs, Drain(ours).result


# ---- the traced process


class Traced(contextlib.ExitStack):
    """A process that runs transfers for us while its system calls fail."""

    def __init__(self, directory: Path, fault: Fault | None, base: int = 0) -> None:
        super().__init__()
        self.directory, self.fault = directory, fault
        self.log = directory / "strace.log"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = self.enter_context(ours)
        environ = {**os.environ, "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, str(HERE / "traced.py"), str(theirs.fileno())]
        if fault is not None and fault.call.startswith("epoll_ctl"):
            environ["GEVENT_LOOP"] = "libev-cext"  # libuv ends the process at an error of its own
        if fault is not None and fault.command:
            environ["LD_PRELOAD"] = shim()
        elif fault is not None:
            options = ["-e", f"trace={fault.call}"]
            if fault.error:
                first, step = WHEN[fault.when]
                when = f"{base + first}+{step}" if step else str(base + first)
                options += ["-e", f"inject={fault.call}:error={fault.error}:when={when}"]
            if fault.call in FILE:
                options += ["-P", str(directory / FILE[fault.call])]
            command = [*STRACE, "-o", str(self.log), *options, *command]
        self.errors = self.enter_context(tempfile.TemporaryFile())
        self.process = self.enter_context(
            subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=self.errors, env=environ)
        )
        theirs.close()
        self.callback(self.process.kill)

    def run(self, kind: Kind) -> dict[str, Any]:
        """Have a transfer run; return what is said of it, and what has arrived."""
        data = some_data(kind.size)
        request: dict[str, Any] = {"kind": kind.name}
        if self.fault is not None:
            request["timeout"] = TIMEOUT.get(self.fault.call)
        if self.fault is not None and self.fault.command:
            number = getattr(errno, self.fault.error)
            request["fcntl"] = [COMMANDS[self.fault.command], number, *WHEN[self.fault.when]]
        fds = [source(kind, data, self.directory)]
        end, finish = sink(kind, self.directory)
        fds.append(end)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.control.sendmsg([json.dumps(request).encode()], rights)
        for fd in fds:
            os.close(fd)
        self.control.settimeout(2 * GUARD)
        answer = self.control.recv(1 << 16)
        assert answer, self.said()
        said: dict[str, Any] = json.loads(answer)
        return {"data": data, "arrived": finish(), **said}

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode()

    def finish(self) -> str:
        """End the process; return the trace."""
        self.control.shutdown(socket.SHUT_WR)
        assert self.process.wait(GUARD) == 0, self.said()
        return self.log.read_text() if self.log.exists() else ""


STRACE = ["strace", "-f", "-qq", "--seccomp-bpf"]


@functools.cache
def shim() -> str:
    directory = tempfile.mkdtemp()
    path = f"{directory}/fcntl_shim.so"
    command = ["cc", "-shared", "-fPIC", "-O", "-o", path, str(HERE / "fcntl_shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return path


@functools.cache
def some_data(size: int) -> bytes:
    return some_bytes(size)


@functools.cache
def calls_of_the_loop(call: str) -> int:
    """Count the calls that the thread of a transfer makes before the transfer begins."""
    if call not in ("epoll_ctl", "pipe2"):
        return 0
    fault = Fault(f"{call},getppid", "", "")
    with tempfile.TemporaryDirectory() as name, Traced(Path(name), fault) as traced:
        traced.run(BY_NAME["sendfile, small"])
        lines = [line.split(maxsplit=1) for line in traced.finish().splitlines()]
    mark = next(number for number, line in enumerate(lines) if line[1].startswith("getppid("))
    pid = lines[mark][0]
    return sum(line[0] == pid and line[1].startswith(call) for line in lines[:mark])


def wrong(kind: Kind, said: dict[str, Any], fault: Fault) -> str | None:
    """Return what is wrong with the outcome of a transfer, if anything is."""
    if "broken" in said:
        return str(said["broken"])
    data, arrived = said["data"], kind.body(said["arrived"])
    if not data.startswith(arrived):
        return f"not a prefix of what was sent: {digest(arrived)}"
    if said["cycles"]:
        return f"{said['cycles']} hold on to what the transfer used"
    if said["in_use"] or said["leaked"] > 0:
        return f"pipes in use: {said['in_use']}, descriptors leaked: {said['leaked']}"
    if said["next"] != "right":
        return "the next transfer got other bytes"
    told = said["failed"] is not None or kind.swallows
    if not told and len(arrived) < len(data):
        return f"{len(arrived)} of {len(data)} bytes have arrived, and nobody was told"
    if said["result"] not in (None, len(arrived)):
        return f"{len(arrived)} bytes have arrived, but {said['result']} were reported"
    for name in ("position", "written"):
        if said.get(name) not in (None, len(arrived)):
            return f"{len(arrived)} bytes have arrived, but {name} is {said[name]}"
    if kind.positions and said["counted"] > len(arrived):
        return f"{len(arrived)} bytes have arrived, but {said['counted']} were counted"
    if said["counted"] != len(arrived) and not said["fallbacks"] and kind.positions:
        return f"{len(arrived)} bytes have arrived, but {said['counted']} were counted"
    if fault.error == "EINTR" and fault.call != "epoll_ctl" and len(arrived) < len(data):
        return "a signal has ended the transfer"
    return None


def attack(fault: Fault, kinds: list[Kind], directory: Path) -> dict[str, int]:
    """Run *kinds* with *fault*; return how many ended how. Fails if one ended in no way allowed."""
    figures = {"cases": 0, "whole": 0, "told": 0, "injected": 0}
    failures = []
    with Traced(directory, fault, calls_of_the_loop(fault.call)) as traced:
        for kind in kinds:
            if fault.call in TIMEOUT and "pipe" in (kind.source, kind.sink):
                continue
            said = traced.run(kind)
            figures["cases"] += 1
            problem = wrong(kind, said, fault)
            if problem is not None:
                failures.append(f"{kind}: {problem}; {shortened(said)}")
            else:
                whole = len(kind.body(said["arrived"])) == kind.size
                figures["whole" if whole else "told"] += 1
                figures["injected"] += said.get("injected", 0)
        figures["injected"] += traced.finish().count("(INJECTED)")
    assert not failures, f"{fault}\n" + "\n".join(failures)
    return figures


def shortened(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if not isinstance(value, bytes)}


# ---- the tests

#: The call is not there, the end is broken, or nothing is left; on the hub and on a thread.
QUICK = [
    Fault("splice", "EIO", "second"),
    Fault("splice", "EINVAL", "fifth"),
    Fault("pipe2", "EMFILE", "first"),
    Fault("pwrite64", "ENOSPC", "first"),
    Fault("fcntl(F_DUPFD_CLOEXEC)", "EMFILE", "first"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("fault", QUICK, ids=str)
def test_a_failing_system_call(
    fault: Fault, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    figures = attack(fault, TRANSFERS, tmp_path)
    assert figures["injected"] > 0
    for name, number in figures.items():
        record_property(name, number)


@pytest.mark.long
@pytest.mark.parametrize("fault", every_fault(), ids=str)
def test_every_failing_system_call(
    fault: Fault, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for name, number in attack(fault, TRANSFERS, tmp_path).items():
        record_property(name, number)
