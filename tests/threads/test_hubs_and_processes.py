"""Forks, hubs that end, and interpreters that end, while a thread works."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.threadpool
import pytest
from conftest import (
    counting,
    digest,
    ended_with,
    file_of,
    run_program,
    some_bytes,
)
from ends import GUARD, Ends, MiB, until
from slow_disks import TO_ANY, Clock, descriptors, hub_threads, in_thread, native_threads, outcome
from slowfs import SlowFS

import gsplice

pytestmark = pytest.mark.usefixtures("threads_idle")


#: Starts to send a held file, and then does what comes after this.
SENDING = """
import hashlib, json, os, sys, gevent, gevent.os, gevent.socket, gsplice
gsplice.patch_all()
path, log = sys.argv[1:]
ours, theirs = gevent.socket.socketpair()
src = open(path, 'rb')

def descriptors():
    fds = os.listdir('/proc/self/fd')
    return sum(os.path.realpath(f'/proc/self/fd/{fd}') == path for fd in fds)

sending = gevent.spawn(ours.sendfile, src)
with gevent.Timeout(30):
    begun = ''
    while f'begun read {os.path.basename(path)} ' not in begun:
        gevent.sleep(0.001)
        with open(log) as file:
            begun = file.read()
assert descriptors() == 2
"""

FORKS = (
    SENDING
    + """
before = gsplice.stats()
pid = gevent.os.fork_gevent()  # without a watcher, so that the child is ours to wait for
if pid == 0:
    left = descriptors()
    sending.join(30)
    error = getattr(sending.exception, 'errno', repr(sending.exception))
    after = gsplice.stats()
    moved = after.bytes_spliced + after.bytes_copied + after.bytes_sendfile
    assert gevent.get_hub().join(timeout=30)  # the loop does not wait for the parent's thread
    print(json.dumps([left, error, moved, after.pipes_in_use]), flush=True)
    # A thread of its own serves the child.
    print(gsplice._threads.threads.threads().run((), lambda: 'served', (), (), ()), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print('forked', flush=True)
received = b''
with gevent.Timeout(30):
    while len(received) < os.path.getsize(path):
        received += theirs.recv(1 << 20)
    sent = sending.get()
print(json.dumps([sent, src.tell(), hashlib.sha256(received).hexdigest()]), flush=True)
"""
)


def test_a_fork_while_a_thread_works(slow: SlowFS, name: str) -> None:
    data = file_of(slow.directory / name, 1 * MiB).read_bytes()
    slow.hold(name)
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    with ended_with([*command, str(slow.mount / name), str(slow.control / "log")]) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == [1, errno.ECANCELED, 0, 0]
        assert process.stdout.readline() == b"served\n"
        assert process.stdout.readline() == b"forked\n"
        slow.release(name)
        sha = hashlib.sha256(data).hexdigest()
        assert json.loads(process.stdout.readline()) == [len(data), len(data), sha]
    assert process.returncode == 0


#: So that nothing is to be warned of but what gsplice leaves.
CLOSING = """
import atexit
for end in ours, theirs, src:
    atexit.register(end.close)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "sending.kill()"])
def test_the_interpreter_ends_while_a_thread_waits(slow: SlowFS, name: str, end: str) -> None:
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)
    assert run_program(SENDING + CLOSING + end, slow.mount / name, slow.control / "log") == ""
    slow.release(name)  # and not before


@pytest.mark.parametrize("way", TO_ANY)
def test_a_hub_in_another_thread(
    slow: SlowFS, tmp_path: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are its own, and end when they are idle."""
    monkeypatch.setattr(gevent.config, "threadpool_idle_task_timeout", 0.05)
    file_of(slow.directory / name, 1 * MiB)
    slow.hold(name)

    def work() -> Any:
        hub, clock = gevent.get_hub(), Clock()
        try:
            moving = gevent.spawn(outcome, tmp_path, way, TO_ANY[way][0], slow.mount / name)
            until(lambda: slow.begun(name))
            clock.goes_on()
            assert not moving.dead
            slow.release(name)
            got = moving.get(timeout=GUARD)
            assert hub.__dict__["_gsplice_threads"] is not main
            return got
        finally:
            clock.greenlet.kill()  # under libuv gevent could not destroy its hub
            hub.destroy(destroy_loop=True)

    gevent.get_hub()
    assert hub_threads().run((), lambda: 1, (), (), ()) == 1
    main = gevent.get_hub().__dict__["_gsplice_threads"]
    before = native_threads()
    with counting() as grown:
        assert in_thread(work)[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
    assert grown.offloads > 0
    until(lambda: native_threads() <= before)


def test_a_hub_is_destroyed_while_a_thread_works(
    slow: SlowFS, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gevent.config, "threadpool_idle_task_timeout", 0.05)
    file_of(slow.directory / name, 1 * MiB)
    before, started = descriptors(), native_threads()
    slow.hold(name)

    def work() -> None:
        hub = gevent.get_hub()
        with Ends(tmp_path) as ends, (slow.mount / name).open("rb") as src:
            moving = ends.spawn(gsplice.copy, src, ends.sink("bare_unix")[0])
            until(lambda: slow.begun(name))
            moving.kill()
        # Under libuv, gevent waits for the thread; under libev, the thread finds no hub.
        threading.Timer(0.1, slow.let_go).start()
        hub.destroy(destroy_loop=True)

    in_thread(work)
    until(lambda: native_threads() <= started)
    until(lambda: descriptors() <= before)
    until(lambda: gsplice.stats().pipes_in_use == 0)
