"""What is, and what is not, the answer of a system call to a step of a transfer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import gevent
import pytest
from conftest import counting, digest, file_of, open_descriptors, receiver, some_bytes
from ends import GUARD, Ends, KiB, MiB, connection, is_waited_for, until
from gevent.monkey import get_original
from paths import PYTHONPATH
from slowfs import SlowFS
from strace import SIZE, traced

import gsplice
from gsplice._os.results import answer
from gsplice._pool import pipe as pool_pipe


class Alarm(TimeoutError):
    """What programs have an alarm raise: an OSError, with an errno of its own or without."""


def test_an_error_of_the_call_is_its_answer() -> None:
    def fails() -> NoReturn:
        raise OSError(errno.ENODEV, "no such device")

    assert answer(os.fstat, -1) == -errno.EBADF
    assert answer(fails) == -errno.ENODEV


def test_an_error_of_a_signal_handler_is_none() -> None:
    def handler(*_: object) -> NoReturn:
        raise Alarm(errno.ETIMEDOUT, "alarm")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Alarm):
            answer(signal.raise_signal, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


#: Sends a file while strace signals at one splice(2), and another after that.
INTERRUPTED = """
import json, signal, sys
import gevent, gsplice
from conftest import receiver, some_bytes
from ends import connection

class Alarm(TimeoutError):
    pass

def handler(*_):
    raise Alarm("alarm")

signal.signal(signal.SIGUSR1, handler)
gevent.get_hub()
told = {"raised": [], "right": []}
for round in range(2):
    ours, theirs = connection("unix", 4 << 20)
    arrived = receiver(theirs)
    with open(sys.argv[1], "rb") as file:
        try:
            gsplice.sendfile(ours, file)
        except OSError as err:
            told["raised"].append(type(err).__name__)
    ours.close()
    body = arrived.get()
    told["right"].append(some_bytes(3 << 20).startswith(body) and len(body))
told["in_use"] = gsplice.stats().pipes_in_use
told["fallbacks"] = dict(gsplice.stats().fallbacks)
print(json.dumps(told))
"""


@pytest.mark.parametrize("when", [1, 2, 3], ids=["fill", "drain", "fill again"])
def test_a_signal_handler_that_raises_leaves_no_pipe_dirty(tmp_path: Path, when: int) -> None:
    path = file_of(tmp_path / "file", 3 * MiB)
    log = tmp_path / "log"
    inject = ["-e", "trace=splice", "-e", f"inject=splice:signal=SIGUSR1:when={when}"]
    done = subprocess.run(
        ["strace", "-qq", "-o", log, *inject, sys.executable, "-c", INTERRUPTED, path],
        capture_output=True,
        text=True,
        timeout=GUARD * 2,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "GSPLICE_OFFLOAD": "never"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["raised"] == ["Alarm"]
    assert told["right"][0] is not False
    assert told["right"][1] == 3 * MiB
    assert (told["in_use"], told["fallbacks"]) == (0, {})


def test_advice_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """The pipe had its bytes by then, and would go back to the pool with them."""
    inject = ["-e", "trace=fadvise64", "-e", "inject=fadvise64:error=EPERM"]
    environ = {"GSPLICE_OFFLOAD": "always"}
    said, log = traced(tmp_path, "file", "tcp", *inject, environ=environ)
    assert any("(INJECTED)" in line for line in log)
    assert said.result == said.arrived == said.bytes_spliced == SIZE
    assert said.fallbacks == {}
    assert said.pipes_in_use == 0


@pytest.mark.parametrize("size", [1000, 300 * KiB])
@pytest.mark.parametrize("source", ["unix", "pipe"])
def test_a_file_that_takes_nothing_now_is_not_waited_for(
    tmp_path: Path, source: str, size: int
) -> None:
    """There is nothing to wait for; the original lets BlockingIOError out."""
    (tmp_path / "slow").mkdir()
    with SlowFS(tmp_path / "slow") as slow:
        slow.fail("EAGAIN", "full", "write")
        for copy in (get_original("shutil", "copyfileobj"), shutil.copyfileobj):
            with Ends(tmp_path) as ends, gevent.Timeout(GUARD):
                src = ends.source(source, some_bytes(size))
                dst = (slow.mount / "full").open("wb")
                with pytest.raises(BlockingIOError), dst:
                    copy(src, dst)
                    dst.flush()


def test_a_dev_null_that_is_none_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a broken chroot it is a regular file."""
    (tmp_path / "null").touch()
    monkeypatch.setattr(os, "devnull", str(tmp_path / "null"))
    monkeypatch.setattr(pool_pipe, "_nulls", [])
    path = file_of(tmp_path / "hot", 4 * MiB)
    before = open_descriptors() - 2 * gsplice.stats().pipes_idle
    ours, theirs = connection("unix")
    with path.open("rb") as file, counting() as grown:
        sending = gevent.spawn(gsplice.sendfile, ours, file)
        until(lambda: is_waited_for(ours))
        arrived = receiver(theirs)
        assert sending.get(timeout=GUARD) == 4 * MiB
        ours.close()
    assert digest(arrived.get()) == digest(some_bytes(4 * MiB))
    theirs.close()
    assert grown.bytes_spliced == 4 * MiB
    assert (tmp_path / "null").read_bytes() == b""
    assert open_descriptors() - 2 * gsplice.stats().pipes_idle <= before
