"""Processes that fork while transfers are under way, watched by somebody outside all of them."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, ended_with, file_of, receive_all, some_bytes
from ends import GUARD, MiB
from gevent.monkey import get_original
from paths import PROJECT
from processes import request, serving

HERE = Path(__file__).parent
SIZE = 1 * MiB
sleep = get_original("time", "sleep")


@functools.lru_cache(64)
def data_of(name: str) -> bytes:
    """Return the bytes of the transfer with this name."""
    return some_bytes(SIZE, zlib.crc32(name.encode()))


class Outside(threading.Thread):
    """Gives each transfer bytes of its own, and checks each byte that comes from one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        # Little room, so that transfers wait with bytes in a pipe.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self.port = self.listener.getsockname()[1]
        self.arrived: Counter[str] = Counter()
        self.connections: list[threading.Thread] = []
        self.start()

    def run(self) -> None:
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            self.connections.append(threading.Thread(target=self.serve, args=(sock,), daemon=True))
            self.connections[-1].start()

    def serve(self, sock: socket.socket) -> None:
        with sock:
            direction, name = sock.recv(32, socket.MSG_WAITALL).decode().split()
            if direction == "to":
                found = digest(receive_all(sock))
                self.arrived[
                    "right"
                    if found == digest(data_of(name))
                    else f"{name}: {found}, not {digest(data_of(name))}"
                ] += 1
                return
            view = memoryview(data_of(name))
            while view:  # not all at once, so that it is under way for some time
                piece = random.randrange(1000, 300_000)
                try:
                    sock.sendall(view[:piece])
                except OSError:  # whoever has started the transfer will tell why
                    return
                view = view[piece:]
                sleep(random.random() / 1000)

    def finish(self) -> Counter[str]:
        for thread in self.connections:
            thread.join(GUARD)
            assert not thread.is_alive()
        self.listener.close()
        return self.arrived


def forked(
    directory: Path, rounds: int, how: str, place: str, yields: str, **environ: str
) -> dict[str, int]:
    """Have a process fork *rounds* times; return how many transfers were checked, and canceled."""
    outside = Outside()
    file = directory / "file"
    file.write_bytes(data_of("file"))
    arguments = [str(outside.port), how, place, yields, str(rounds), str(file)]
    with ended_with(
        [sys.executable, str(HERE / "forking.py"), *arguments],
        stderr=subprocess.PIPE,
        env=os.environ | environ | {"PYTHONPATH": str(PROJECT)},
    ) as process:
        said, errors = process.communicate(timeout=100 + rounds)
    assert (process.returncode, errors) == (0, b""), errors.decode()[-5000:]
    canceled = sum(json.loads(line)["canceled"] for line in said.splitlines())
    arrived = outside.finish()
    assert arrived.keys() == {"right"}, arrived
    return {"cases": arrived["right"], "whole": arrived["right"], "told": canceled}


#: How it forks, whether in the main thread, and which handlers of a fork let others run.
WAYS = {
    "plainly": ("gevent", "main", ""),
    "from a thread with its own hub": ("gevent", "thread", ""),
    "a handler before ours yields": ("gevent", "main", "before ours"),
    "a handler after ours yields": ("gevent", "main", "after ours"),
    "a handler in the parent yields": ("gevent", "main", "in the parent"),
    "multiprocessing, fork": ("multiprocessing fork", "main", ""),
    "multiprocessing, spawn": ("multiprocessing spawn", "main", ""),
}
Record = Callable[[str, object], None]


def check(
    directory: Path, rounds: int, way: str, offload: str, monkeypatch: Any, record: Record
) -> None:
    how, place, yields = WAYS[way]
    if how.startswith("multiprocessing") or yields.endswith("ours"):
        # Under libuv the join() of multiprocessing, which uses gevent's waitpid, may lose a child
        # for ever; and a loop that runs in a child before gevent.reinit() spoils the parent's.
        monkeypatch.setenv("GEVENT_LOOP", "libev-cext")
    figures = forked(directory, rounds, how, place, yields, GSPLICE_OFFLOAD=offload)
    for name, number in figures.items():
        record(name, number)
    assert (figures["told"] > 0) == ("spawn" not in way)


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_transfers_under_way_at_a_fork(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    check(tmp_path, 2, way, "auto", monkeypatch, record_property)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("offload", ["auto", "always"])
@pytest.mark.parametrize("way", WAYS)
def test_transfers_under_way_at_hundreds_of_forks(
    tmp_path: Path,
    way: str,
    offload: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    check(tmp_path, 300, way, offload, monkeypatch, record_property)


@pytest.mark.few(1)
@pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
def test_workers_of_a_master_that_has_transferred(
    tmp_path: Path, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers go through pipes; those of the master are no worker's."""
    monkeypatch.setenv("APPS_TRANSFER", "50000")
    monkeypatch.setenv("GSPLICE_OFFLOAD", "always")
    content = file_of(tmp_path / "file.bin", 3 * MiB).read_bytes()
    with serving(f"gunicorn-{worker} --preload --workers 2", tmp_path, True) as server:
        answers: list[bytes] = []
        asking = [
            threading.Thread(target=lambda: answers.append(server.ask(request("/plain/"))))
            for _ in range(8)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        answer = server.ask(request("/plain/", close=False) + request("/stats"))
    assert [digest(each.partition(b"\r\n\r\n")[2]) for each in answers] == [digest(content)] * 8
    stats = json.loads(answer[answer.rindex(b'{"pipes') :])
    assert stats["bytes_spliced"] >= 50_000 + len(content)
    assert stats["pipes_created"] >= 2  # the master's, and one at least of the worker's own
