"""``settings.offload`` and ``settings.threads``, and the variables for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import (
    counting,
    digest,
    ended_with,
    file_of,
    some_bytes,
)
from ends import MiB, until
from slow_disks import TO_ANY, cold, moved, outcome
from slowfs import SlowFS

from gsplice.config import settings

pytestmark = pytest.mark.usefixtures("threads_idle")


@pytest.mark.parametrize("way", TO_ANY)
def test_never(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offload", "never")
    path = cold(tmp_path / "cold", 1 * MiB)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(1 * MiB)), 1 * MiB)
    assert moved(grown) == 1 * MiB
    assert grown.bytes_copied == 0
    assert grown.offloads == 0


@pytest.mark.parametrize("size", [5000, 1 * MiB])
@pytest.mark.parametrize("way", TO_ANY)
def test_always(tmp_path: Path, way: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "offload", "always")
    path = file_of(tmp_path / "warm", size)
    with counting() as grown:
        got = outcome(tmp_path, way, TO_ANY[way][0], path)
    assert got[1:] == (digest(some_bytes(size)), size)
    assert moved(grown) == size
    assert grown.offloads > 0
    assert grown.bytes_sendfile == 0


#: Starts a dozen transfers of held files.
DOZEN = """
import os, sys, gevent, gevent.socket, gsplice
gsplice.patch_all()
pairs = [gevent.socket.socketpair() for _ in sys.argv[1:]]
sending = [
    gevent.spawn(ours.sendfile, open(path, 'rb'))
    for path, (ours, theirs) in zip(sys.argv[1:], pairs)
]
for _ in range(20):
    gevent.sleep(0.001)
print(gsplice.stats().offloads, flush=True)
gevent.joinall(sending, raise_error=True)
print(gsplice.stats().offloads, len(os.listdir('/proc/self/task')), flush=True)
"""


@pytest.mark.few
@pytest.mark.parametrize(
    ("policy", "offloads"), [("auto", True), ("always", True), ("never", False)]
)
@pytest.mark.parametrize("threads", [1, 4])
def test_the_variables(slow: SlowFS, name: str, threads: int, policy: str, offloads: bool) -> None:
    names = [f"{name}{number}" for number in range(12)]
    for one in names:
        file_of(slow.directory / one, 5000)
        if offloads:
            slow.hold(one)
    lane = (threads + 1) // 2
    with ended_with(
        [sys.executable, "-c", DOZEN, *(str(slow.mount / one) for one in names)],
        env=os.environ | {"GSPLICE_THREADS": str(threads), "GSPLICE_OFFLOAD": policy},
    ) as process:
        assert process.stdout is not None
        assert (int(process.stdout.readline()) > 0) == offloads
        if offloads:
            until(lambda: sum(map(slow.begun, names)) == lane)
            for one in names:
                slow.release(one)
        total, tasks = map(int, process.stdout.readline().split())
        assert (total > 0) == offloads
        assert tasks <= 1 + threads
    assert process.returncode == 0
