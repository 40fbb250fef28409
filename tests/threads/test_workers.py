"""The native threads of a hub: when they begin and end, and what becomes of their jobs."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from conftest import run_program
from ends import GUARD, until
from gevent.monkey import get_original
from slow_disks import hub_threads, in_thread, native_threads

from gsplice._threads.threads import Threads
from gsplice._threads.workers import Workers

pytestmark = pytest.mark.usefixtures("threads_idle")


def jobs_at_once(threads: Threads, number: int) -> list[int]:
    """Have *number* threads do a job each at the same time; return what they returned."""
    gate = get_original("threading", "Event")()
    jobs = [gevent.spawn(threads.run, (), gate.wait, (), (GUARD,), ()) for _ in range(number)]
    until(lambda: threads._busy == number)
    gate.set()
    return [job.get(timeout=GUARD) for job in jobs]


def test_a_thread_is_used_again() -> None:
    ours = hub_threads()
    jobs_at_once(ours, 2)
    before = native_threads()
    for number in range(20):
        assert ours.run((), lambda number=number: number, (), (), ()) == number
    jobs_at_once(ours, 2)
    assert native_threads() == before


def test_no_job_is_lost_when_its_thread_is_about_to_end() -> None:
    """An idle thread looks for a last time when it is no more counted on."""
    workers = Workers(gevent.get_hub(), 0.0)
    threads = Threads(gevent.get_hub())
    threads._workers = workers
    with gevent.Timeout(GUARD):
        for number in range(1000):
            assert threads.run((), lambda number=number: number, (), (), ()) == number
            if number % 3 == 0:
                gevent.sleep(0)
    until(lambda: not workers._alive)
    assert not len(workers)


def test_an_error_is_raised_in_the_greenlet() -> None:
    def fail() -> None:
        raise LookupError("no OSError")

    with pytest.raises(LookupError, match="no OSError"):
        hub_threads().run((), fail, (), (), ())
    assert hub_threads()._busy == 0


def test_idle_threads_end() -> None:
    """Also those of a hub that has gone."""
    before = native_threads()

    def work() -> None:
        gevent.get_hub()
        hub_threads()._workers._idle = 0.05
        assert jobs_at_once(hub_threads(), 3) == [True] * 3
        gevent.get_hub().destroy(destroy_loop=True)

    in_thread(work)
    until(lambda: native_threads() <= before)


def test_a_job_is_given_up_whatever_line_a_signal_handler_raises_on() -> None:
    """It does not begin after that; or, if it is under way, it is left what it uses."""
    program = """
import sys, gevent, gsplice
from gevent.monkey import get_original
from gsplice._threads.threads import Threads
from gsplice._threads.workers import Workers
class Stop(BaseException):
    pass
class Kept:
    left_to_thread = False
    def leave_to_thread(self):
        self.left_to_thread = True
    def close(self):
        pass
interrupted = {code: set() for code in (Threads.run.__code__, Workers.start.__code__)}
def stop_at_a_new_line(frame, event, arg):
    lines = interrupted.get(frame.f_code)
    if lines is None or at_once.ready():
        return None
    if event == 'line' and frame.f_lineno not in lines:
        lines.add(frame.f_lineno)
        raise Stop
    return stop_at_a_new_line
hub = gevent.get_hub()
stopped = True
while stopped:
    threads, kept, begun = Threads(hub), Kept(), []
    threads._workers._idle = 0.0
    gate = get_original('threading', 'Event')()
    at_once = gevent.spawn(gate.set)  # when the greenlet waits, that is
    def job():
        begun.append(True)
        gate.wait(30)
    stopped = False
    sys.settrace(stop_at_a_new_line)
    try:
        threads.run((), job, (), (), (kept,))
    except Stop:
        stopped = True
    finally:
        sys.settrace(None)
    at_once.join()
    with gevent.Timeout(30):
        while threads._workers._alive:
            gevent.sleep(0.001)
    assert kept.left_to_thread == bool(begun and stopped), interrupted
assert min(map(len, interrupted.values())) > 4, interrupted
"""
    assert run_program(program) == ""


def test_the_loop_runs_while_a_job_does() -> None:
    """Although nothing else is to come; and no longer."""
    program = """
import gevent, time, gsplice
from gsplice._threads.threads import threads
gevent.get_hub()
waiting = gevent.spawn(lambda: threads().run((), lambda: time.sleep(0.05) or 'done', (), (), ()))
assert gevent.get_hub().join(timeout=30), 'the loop goes on'
print(waiting.get(block=False))
"""
    assert run_program(program) == "done\n"


def test_hooks_of_threading_are_used() -> None:
    program = """
import sys, threading
called = set()
def profile(frame, event, arg):
    called.add(frame.f_code.co_name)
threading.setprofile(profile)
import gevent, gsplice
from gsplice._threads.threads import threads
def job():
    return 1
gevent.get_hub()
assert gevent.spawn(lambda: threads().run((), job, (), (), ())).get() == 1
print("job" in called)
"""
    assert run_program(program) == "True\n"


def test_a_killed_greenlets_job_gives_its_slot_back() -> None:
    ours: Any = hub_threads()
    gate = get_original("threading", "Event")()
    going = gevent.spawn(ours.run, (7,), gate.wait, (), (GUARD,), ())
    until(lambda: ours._running[7] == 1)
    going.kill()
    assert ours._running[7] == 1
    gate.set()
    until(lambda: not ours._busy)
    assert 7 not in ours._running
