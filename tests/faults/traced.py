"""The traced side of test_errors.py: transfers whose system calls somebody makes fail.

    python traced.py CONTROL

gets the two ends of each transfer over the socket whose descriptor is *CONTROL*, and runs it in a
process of its own: a tracer counts system calls of a thread from its first one. What is to be said
of a transfer is sent back as JSON; how much was delivered, only the other side knows for certain.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import gevent
import gevent.socket
from conftest import open_descriptors, some_bytes
from ends import GUARD, KiB, threads_done
from gevent.fileobject import FileObjectPosix
from transfers import BY_NAME

import gsplice


def end(kind: str, fd: int, mode: str, timeout: float | None) -> tuple[Any, Any]:
    """Return the object for an end, and what else is to be closed after it."""
    if kind == "file":
        name = os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)
        return open(name, mode), None
    if kind == "pipe":
        return FileObjectPosix(fd, mode), None
    sock = gevent.socket.socket(fileno=fd)
    sock.settimeout(timeout)
    return (sock, None) if kind.startswith("bare") else (sock.makefile(mode), sock)


def transfer(request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Run one transfer, and say what can be said of it from here."""
    kind = BY_NAME[request["kind"]]
    hub = gevent.get_hub()
    hub.threadpool.apply(bool)
    gevent.sleep(0)
    kind.set_up()
    timeout = request.get("timeout")
    before = open_descriptors() - len(fds)
    src, behind_src = end(kind.source, fds[0], "rb", timeout)
    dst, behind_dst = end(kind.sink, fds[1], "wb", timeout)
    said: dict[str, Any] = {"result": None, "failed": None}
    if "fcntl" in request:  # by the shim
        ctypes.CDLL(None).fault_arm(*request["fcntl"])
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    os.getppid()  # a mark in the trace: from here on, the system calls are the transfer's
    try:
        said["result"] = kind.run(src, dst)
    except OSError as err:
        said["failed"] = err.errno or repr(err)
        if hasattr(err, "relayed"):
            said["result"] = err.relayed.a_to_b
    # One in a cycle with its frames holds on to the objects, so a file would stay open.
    gc.collect()
    said["cycles"] = [repr(each) for each in gc.garbage if isinstance(each, OSError)]
    gc.set_debug(0)
    gc.garbage.clear()
    if kind.positions:
        said["position"] = src.tell() if kind.source == "file" else None
        said["written"] = dst.tell() if kind.sink == "file" else None
    if "fcntl" in request:
        said["injected"] = ctypes.CDLL(None).fault_arm(-1, 0, 0, 0)
    stats = gsplice.stats().as_dict()
    said["counted"] = sum(n for name, n in stats.items() if name.startswith("bytes_"))
    said["fallbacks"] = stats["fallbacks"]
    for each in (src, behind_src, dst, behind_dst):
        if each is not None:
            try:
                each.close()
            except OSError as err:  # what a buffer still held
                said["failed"] = said["failed"] or err.errno
    said["next"] = next_transfer(timeout)
    threads_done()
    gevent.sleep(0)
    stats = gsplice.stats()
    said["leaked"] = open_descriptors() - before - 2 * stats.pipes_idle
    said["in_use"] = stats.pipes_in_use
    return said


def next_transfer(timeout: float | None) -> str:
    """Move other bytes with what the first has left behind; say whether they are those."""
    data = some_bytes(300 * KiB, seed=1)
    (ours, feeder), (sink, target) = socket.socketpair(), socket.socketpair()
    arrived = bytearray()
    fed: list[None] = []

    def feed() -> None:
        with feeder, contextlib.suppress(OSError):  # one side or the other may meet the next fault
            fed.append(feeder.sendall(data))

    def arrive() -> None:
        with target, contextlib.suppress(TimeoutError):
            while piece := target.recv(1 << 16):
                arrived.extend(piece)

    # In threads without a hub, whose waits no fault reaches.
    threads = [threading.Thread(target=each) for each in (feed, arrive)]
    for thread in threads:
        thread.start()
    failed = False
    with (
        gevent.socket.socket(fileno=ours.detach()) as src,
        gevent.socket.socket(fileno=sink.detach()) as dst,
    ):
        src.settimeout(timeout)
        dst.settimeout(timeout)
        try:
            gsplice.copy(src, dst)
        except OSError:  # met the next fault
            failed = True
    for thread in threads:
        thread.join()
    if failed or timeout or not fed:
        return "right" if data.startswith(arrived) else "wrong"
    return "right" if arrived == data else "wrong"


def main(control: socket.socket) -> None:
    """Serve requests until there are no more."""
    while not gsplice.patch_all():  # it tries splice(2), and may be the first that meets the fault
        pass
    while True:
        message, ancillary, _, _ = control.recvmsg(1 << 16, socket.CMSG_SPACE(64))
        if not message:
            return
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        pid = os.fork()
        if pid == 0:
            signal.alarm(GUARD)  # ends a transfer that hangs
            try:
                said = transfer(json.loads(message), list(fds))
            except BaseException:  # noqa: BLE001
                said = {"broken": traceback.format_exc()}
            os.write(control.fileno(), json.dumps(said).encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)
        status = os.waitpid(pid, 0)[1]
        if status:
            os.write(control.fileno(), json.dumps({"broken": f"status {status}: hung?"}).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
