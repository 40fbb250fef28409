"""A process that forks again and again while transfers are under way: see test_forks.py.

    python forking.py PORT HOW PLACE YIELDS ROUNDS FILE

Each transfer has its own connections to whoever listens on *PORT*, who knows what has to arrive.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import gevent
import gevent.monkey
import gevent.os

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
HOW, PLACE, YIELDS = sys.argv[2:5] if __name__ == "__main__" else ("", "", "")
if HOW.startswith("multiprocessing"):
    gevent.monkey.patch_all(thread=False)


def let_others_run() -> None:
    if gevent._hub_local.get_hub_if_exists() is not gevent.getcurrent():
        gevent.sleep(0)
        gevent.sleep(0.001)


if YIELDS == "before ours":  # handlers run in the order in which they were registered
    os.register_at_fork(after_in_child=let_others_run)

import gevent.socket  # noqa: E402

import gsplice  # noqa: E402

if YIELDS == "after ours":
    os.register_at_fork(after_in_child=let_others_run)
if YIELDS == "in the parent":
    os.register_at_fork(before=let_others_run, after_in_parent=let_others_run)

gsplice.patch_all()

SIZE = 1 << 20
AT_ONCE = 6
#: Transfers that ended in this process because its parent had started them.
canceled = 0
numbers = iter(range(10**9))


def connect(port: int, what: str) -> Any:
    """Connect, and say what for, without a switch: a fork in between would leave it to both."""
    with gevent.monkey.get_original("socket", "socket")() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        sock.connect(("127.0.0.1", port))
        sock.sendall(what.encode().ljust(32))
        return gevent.socket.socket(fileno=sock.detach())


def transfer(port: int, file: str, pid: int) -> None:
    """Move bytes that only this transfer has, or those of the file, to where they are checked."""
    global canceled
    name = f"{pid}-{next(numbers)}"
    try:
        if random.random() < 0.5:
            with connect(port, f"to {name}") as sink, connect(port, f"from {name}") as source:
                moved = gsplice.copy(source, sink)
        else:
            with connect(port, "to file") as sink, open(file, "rb") as source:
                moved = sink.sendfile(source)
                assert source.tell() == SIZE
        assert moved == SIZE, moved
    except OSError as err:
        if os.getpid() == pid or err.errno != errno.ECANCELED:
            raise
        canceled += 1
    else:
        assert os.getpid() == pid, "a transfer of the parent has ended well in the child"


def transfers(port: int, file: str, going: list[Any]) -> None:
    """Keep transfers under way while there is something in *going*."""
    pid = os.getpid()
    while going:
        transfer(port, file, pid)
        if os.getpid() != pid:
            return


def child(port: int, file: str, inherited: list[gevent.Greenlet], depth: int) -> None:
    """Have the inherited transfers end, others of its own besides them, and a child of its own."""
    mine = [gevent.spawn(transfer, port, file, os.getpid()) for _ in range(3)]
    with gevent.Timeout(60):
        if depth:
            gevent.sleep(random.randint(1, 10) / 1000)
            wait_for(fork(port, file, [*inherited, *mine], depth - 1))
        for greenlet in [*mine, *inherited]:
            greenlet.get()
    stats = gsplice.stats()
    assert stats.pipes_in_use == 0, stats
    report({"canceled": canceled})


def spawned(port: int, file: str) -> None:
    """Run transfers in a process that has inherited nothing."""
    child(port, file, [], 0)


def report(what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def fork(port: int, file: str, greenlets: list[gevent.Greenlet], depth: int) -> Any:
    """Start a child process in the way that is asked for."""
    if HOW.startswith("multiprocessing"):
        import multiprocessing

        context: Any = multiprocessing.get_context(HOW.split()[1])
        target: Callable[..., None] = child if HOW.endswith("fork") else spawned
        args = (port, file, greenlets, depth) if HOW.endswith("fork") else (port, file)
        process = context.Process(target=target, args=args)
        process.start()
        return process
    pid = gevent.os.fork_gevent()  # without a watcher: under libuv that may lose a child
    if pid:
        return pid
    try:
        child(port, file, greenlets, depth)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait_for(process: Any) -> None:
    """Wait for a child process while transfers go on, and pass if it ended well."""
    if not isinstance(process, int):
        while process.is_alive():
            gevent.sleep(0.002)
        assert process.exitcode == 0
        return
    waitpid = gevent.monkey.get_original("os", "waitpid")
    while True:
        pid, status = waitpid(process, os.WNOHANG)
        if pid:
            assert status == 0
            return
        gevent.sleep(0.002)


def main(port: int, rounds: int, file: str) -> None:
    going = [None]
    greenlets = [gevent.spawn(transfers, port, file, going) for _ in range(AT_ONCE)]
    for _ in range(rounds):
        moved = gsplice.stats().bytes_spliced
        while gsplice.stats().bytes_spliced == moved:
            gevent.sleep(random.randint(1, 10) / 1000)
        wait_for(fork(port, file, greenlets, depth=1))
    going.clear()
    with gevent.Timeout(60):
        for greenlet in greenlets:
            greenlet.get()
    stats = gsplice.stats()
    assert stats.pipes_in_use == 0, stats
    report({"canceled": canceled})


def in_thread(function: Callable[..., None], *args: Any) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function(*args)
        except BaseException as err:  # noqa: BLE001
            failed.append(err)
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    arguments = int(sys.argv[1]), int(sys.argv[5]), sys.argv[6]
    with contextlib.suppress(KeyboardInterrupt):
        if PLACE == "thread":
            in_thread(main, *arguments)
        else:
            main(*arguments)
