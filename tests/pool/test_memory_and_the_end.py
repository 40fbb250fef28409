"""Nothing is kept, and the interpreter ends silently."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
from conftest import run_program
from pool import PROGRAM

from gsplice.pipes import acquire, release


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("hub_room", "calls"), [(16, 100_000), (0, 100_000)], ids=["own list", "shared list"]
)
def test_no_memory_is_kept_by_acquiring_and_releasing(
    hub_room: int, calls: int, limits: Callable[..., None]
) -> None:
    limits(max_idle_hub=hub_room)
    assert blocks_kept(calls) < calls // 1000  # what other threads do counts as well


def test_no_memory_is_kept_by_opening_and_closing(limits: Callable[..., None]) -> None:
    limits(max_idle_hub=0, max_idle=0, pipe_size=4096)
    assert blocks_kept(20_000) < 50


def blocks_kept(calls: int) -> int:
    """Return how many more blocks of memory there are after so many calls."""

    def some(number: int) -> None:
        for _ in range(number):
            release(acquire())  # type: ignore[arg-type]

    some(100)
    gc.collect()
    before = sys.getallocatedblocks()
    some(calls)
    gc.collect()
    return sys.getallocatedblocks() - before


@pytest.mark.few(5)
@pytest.mark.parametrize("hub", ["", "gevent.get_hub()"])
@pytest.mark.parametrize(
    "left",
    [
        "release(acquire())",
        "lent = acquire()",
        "lent = acquire(); cycle = [lent]; cycle.append(cycle); del lent, cycle",
        "lent = [acquire() for _ in range(40)]; half = lent[::2]; del lent\n"
        "while half: release(half.pop())",
        "class A: lent = acquire()\nrelease(acquire())",
        "import atexit; atexit.register(lambda: release(acquire()))",
        "import atexit; atexit.register(gc.collect); release(acquire())",
        "a = acquire(); sys.modules['gsplice.kept'] = a; release(acquire())",
        "gc.callbacks.append(lambda *info: None); release(acquire()); gc.disable()",
        "hub = gevent.get_hub(); release(acquire()); hub.destroy(destroy_loop=True)",
        "release(acquire()); del sys.modules['gsplice.pipes'], gsplice.pipes, pipes",
        "gevent.spawn(lambda: (acquire(), gevent.sleep(0))).join()",
        "kept = gevent.spawn(lambda: (acquire(), gevent.sleep(100))); gevent.sleep(0)",
    ],
)
def test_the_interpreter_ends_silently(left: str, hub: str) -> None:
    run_program(PROGRAM + hub + "\n" + left)


@pytest.mark.few
@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("hub", [True, False])
def test_the_interpreter_ends_silently_with_threads_alive(daemon: bool, hub: bool) -> None:
    run_program(
        PROGRAM
        + f"""
import time
ready, release_all = threading.Event(), threading.Event()
def work():
    if {hub}:
        gevent.get_hub()
    lent = [acquire() for _ in range(8)]
    for pipe in lent[:4]:
        release(pipe)
    ready.set()
    if not {daemon}:
        threading.main_thread().join()
    else:
        while True:
            release(acquire())
for _ in range(3):
    ready.clear()
    threading.Thread(target=work, daemon={daemon}).start()
    ready.wait()
release(acquire())
lent = acquire()
"""
    )
