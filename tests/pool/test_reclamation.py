"""Idle pipes are closed after a while, by whoever is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import counting, run_program
from pool import PROGRAM, in_thread, lend

from gsplice.pipes import acquire, release


@pytest.mark.parametrize("kept", [16, 300])
def test_a_burst_is_reclaimed_by_collections(kept: int) -> None:
    run_program(
        PROGRAM
        + """
hub = gevent.get_hub()
before = descriptors()
lent = [acquire() for _ in range(300)]
assert None not in lent and descriptors() == before + 600
while lent:
    release(lent.pop())
kept = balanced().pipes_idle
assert kept == min(300, settings.max_idle_hub + settings.max_idle)
assert descriptors() == before + 2 * kept
gc.collect()
assert balanced().pipes_idle == kept  # used since the last collection
for _ in range(2):
    gc.collect()
assert balanced().pipes_idle == LOW_WATER
assert descriptors() == before + 2 * LOW_WATER
""",
        GSPLICE_MAX_PIPES=300,
        GSPLICE_MAX_IDLE_HUB=kept,
    )


WITHOUT_GC = """
gc.disable()
def wait_until_reclaimed(seconds):
    with gevent.Timeout(seconds):
        while balanced().pipes_idle > LOW_WATER:
            gevent.sleep(0.02)
    assert balanced().pipes_idle == LOW_WATER
"""
BURST_WITHOUT_GC = (
    WITHOUT_GC
    + """
hub = gevent.get_hub()
def burst():
    lent = [acquire() for _ in range(300)]
    assert None not in lent
    while lent:
        release(lent.pop())
"""
)


def test_a_burst_is_reclaimed_by_the_hub() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
before = descriptors()
for _ in range(2):
    burst()
    wait_until_reclaimed(30)
    assert descriptors() == before + 2 * LOW_WATER
    gevent.sleep(0.2)
""",
        GSPLICE_MAX_PIPES=300,
    )


@pytest.mark.long
def test_a_burst_is_reclaimed_within_thirty_seconds() -> None:
    run_program(
        PROGRAM + BURST_WITHOUT_GC + "before = descriptors(); burst(); wait_until_reclaimed(30);"
        "assert descriptors() == before + 2 * LOW_WATER",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_reclaims_pipes_that_another_hub_made() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
def other():
    burst()
    gevent.get_hub().destroy()
thread = threading.Thread(target=other)
thread.start()
thread.join()
pipe = acquire()
assert gsplice.stats().acquired_global == 1
release(pipe)
wait_until_reclaimed(10)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_reclaims_pipes_that_its_predecessor_made() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
burst()
hub.destroy(destroy_loop=True)
del hub
gevent.sleep(0)
release(acquire())
wait_until_reclaimed(10)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_pipes_released_where_no_hub_could_reclaim_them_are_not_kept() -> None:
    run_program(
        PROGRAM
        + """
gc.disable()
def work():
    lent = [acquire() for _ in range(300)]
    while lent:
        release(lent.pop())
    assert gevent._hub_local.get_hub_if_exists() is None
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert balanced().pipes_idle == LOW_WATER
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_pipes_lent_before_the_main_thread_has_a_hub_are_reclaimed() -> None:
    run_program(
        PROGRAM
        + WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
assert gevent._hub_local.get_hub_if_exists() is None
lent = [acquire() for _ in range(300)]
while lent:
    release(lent.pop())
assert balanced().pipes_idle == settings.max_idle_hub + settings.max_idle
wait_until_reclaimed(30)
""",
        GSPLICE_MAX_PIPES=300,
    )


def test_a_hub_that_has_used_the_pool_reclaims_what_others_leave_later() -> None:
    run_program(
        PROGRAM
        + BURST_WITHOUT_GC
        + """
idle.RECLAIM_PERIOD = 0.05
release(acquire())
gevent.sleep(0.2)
def other():
    gevent.get_hub()
    burst()
    gevent.get_hub().destroy()
thread = threading.Thread(target=other)
thread.start()
thread.join()
assert balanced().pipes_idle > LOW_WATER
wait_until_reclaimed(30)
""",
        GSPLICE_MAX_PIPES=301,
    )


def test_without_descriptors_and_without_a_hub_there_is_no_pipe() -> None:
    run_program(
        PROGRAM
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), descriptors()))
assert acquire() is None
"""
    )


def test_many_hubs_look_no_more_often_than_one() -> None:
    """A pipe lives as long as the README says, however many hubs there are."""
    run_program(
        PROGRAM
        + """
import time
gc.disable()
idle.RECLAIM_PERIOD = 0.2
looks = []
look = idle.reclaim
idle.reclaim = lambda: (looks.append(time.monotonic()), look())
done = threading.Event()
def other():
    release(acquire())
    lent = [acquire() for _ in range(2)]
    while not done.is_set():
        gevent.sleep(0.01)
    while lent:
        release(lent.pop())
    gevent.get_hub().destroy()
hub = gevent.get_hub()  # before the threads have theirs: see in_threads() of test_threads.py
threads = [threading.Thread(target=other) for _ in range(8)]
for thread in threads:
    thread.start()
    time.sleep(0.025)
release(acquire())
while len(looks) < 6:
    gevent.sleep(0.01)
done.set()
for thread in threads:
    thread.join()
assert all(later - earlier > 0.17 for earlier, later in zip(looks, looks[1:])), looks
"""
    )


def test_a_pipe_in_steady_use_is_kept() -> None:
    run_program(
        PROGRAM
        + """
hub = gevent.get_hub()
lent = [acquire() for _ in range(LOW_WATER + 4)]
while lent:
    release(lent.pop())
for _ in range(5):
    lent = [acquire() for _ in range(LOW_WATER + 2)]
    while lent:
        release(lent.pop())
    gc.collect()
figures = balanced()
assert figures.acquired_new == LOW_WATER + 4
assert figures.pipes_idle == LOW_WATER + 2, figures
"""
    )


def test_idle_pipes_keep_no_hub_running() -> None:
    run_program(
        PROGRAM
        + """
idle.RECLAIM_PERIOD = 3600
gevent.get_hub()
release(acquire())
assert gevent.get_hub().join(timeout=30) is True
"""
    )


@pytest.mark.few
@pytest.mark.parametrize("destroyed", [True, False])
@pytest.mark.parametrize("collecting", [True, False])
def test_hubs_that_came_and_went_leave_their_pipes_to_all(
    destroyed: bool, collecting: bool
) -> None:
    run_program(
        PROGRAM
        + f"""
if not {collecting}:
    gc.disable()
gevent.get_hub()
inodes = set()
def work():
    lent = [acquire() for _ in range(3)]
    gevent.sleep(0)
    inodes.update(os.fstat(pipe.read_fd).st_ino for pipe in lent)
    while lent:
        release(lent.pop())
    if {destroyed}:
        gevent.get_hub().destroy(destroy_loop=True)
for _ in range(10):
    # Each takes from the shared list what the one before has left.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
figures = balanced()
assert (figures.pipes_in_use, figures.pipes_idle, figures.pipes_created) == (0, 3, 3), figures
together = threading.Barrier(10)
def crowd():
    lent = [acquire() for _ in range(3)]
    inodes.update(os.fstat(pipe.read_fd).st_ino for pipe in lent)
    together.wait()
    while lent:
        release(lent.pop())
    together.wait()
    if {destroyed}:
        gevent.get_hub().destroy(destroy_loop=True)
threads = [threading.Thread(target=crowd) for _ in range(10)]
for thread in threads: thread.start()
for thread in threads: thread.join()
figures = balanced()
assert (figures.pipes_in_use, figures.pipes_idle, len(inodes)) == (0, 30, 30), figures
lent = [acquire() for _ in range(30)]
assert {{os.fstat(pipe.read_fd).st_ino for pipe in lent}} == inodes
assert gsplice.stats().acquired_global == figures.acquired_global + 30
assert gsplice.stats().acquired_new == 30
pipe = None
lent.clear()
assert balanced().pipes_closed == 30
links = set()
for fd in os.listdir('/proc/self/fd'):
    with contextlib.suppress(FileNotFoundError):
        links.add(os.readlink('/proc/self/fd/' + fd))
assert not links & {{f'pipe:[{{number}}]' for number in inodes}}
"""
    )


def test_a_thread_without_a_hub_has_a_list_as_well(limits: Callable[..., None]) -> None:
    def work() -> bool:
        pipe = lend()
        release(pipe)
        return acquire() is pipe and release(pipe) is None

    with counting() as grown:
        assert in_thread(work)
    assert (grown.acquired_new, grown.acquired_local, grown.pipes_idle) == (1, 1, 1)


def test_a_thread_that_ends_hands_over_no_more_than_there_is_room_for(
    limits: Callable[..., None],
) -> None:
    limits(max_idle=2)

    def work() -> None:
        lent = [lend() for _ in range(5)]
        while lent:
            release(lent.pop())

    with counting() as grown:
        in_thread(work)
    assert (grown.pipes_created, grown.pipes_idle, grown.pipes_closed) == (5, 2, 3)
