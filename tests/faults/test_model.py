"""The whole pool against a plain model, whatever is done to it in whatever order."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pool import assert_balanced, empty_the_pool, in_thread, inode, lend, open_pipes

import gsplice
from gsplice import pipes
from gsplice._pool import idle, lending
from gsplice._pool.idle import LOW_WATER
from gsplice.config import settings
from gsplice.pipes import UNKNOWN, Pipe, acquire, release

HUB_ROOM, SHARED_ROOM, MOST = 4, 3, 10


def pipes_open() -> set[str]:
    return {name for name in open_pipes() if name.startswith("pipe:")}


class PoolAgainstModel(RuleBasedStateMachine):
    """The pool as one thread sees it; pipes are known by their inodes, which are never reused."""

    def __init__(self) -> None:
        super().__init__()
        gc.disable()  # each collection counts
        release(lend())
        empty_the_pool()
        self.undo = pytest.MonkeyPatch()
        self.undo.setattr(settings, "max_pipes", MOST)
        self.undo.setattr(settings, "max_idle", SHARED_ROOM)
        self.undo.setattr(settings, "max_idle_hub", HUB_ROOM)
        self.undo.setattr(lending._keeper().home, "room", HUB_ROOM)
        self.before = gsplice.stats()
        self.lent: dict[int, Pipe] = {}
        self.local: list[int] = []
        self.shared: list[int] = []
        self.unused: set[int] = set()
        self.came_from = {"acquired_local": 0, "acquired_global": 0, "acquired_new": 0}
        self.gone: set[int] = set()

    def teardown(self) -> None:
        self.lent.clear()
        self.undo.undo()
        empty_the_pool()
        gc.enable()

    def take(self, which: int) -> tuple[int, Pipe]:
        number = list(self.lent)[which % len(self.lent)]
        return number, self.lent.pop(number)

    @rule()
    def acquire(self) -> None:
        pipe = acquire()
        if not self.local and not self.shared and len(self.lent) == MOST:
            assert pipe is None
            return
        assert pipe is not None
        number = inode(pipe)
        if self.local:
            source, expected = "acquired_local", self.local.pop()
        elif self.shared:
            source, expected = "acquired_global", self.shared.pop()
        else:
            source, expected = "acquired_new", number
            assert number not in self.lent.keys() | self.gone
        assert (number, pipe.pending) == (expected, 0)
        self.came_from[source] += 1
        self.unused.discard(number)
        self.lent[number] = pipe

    @precondition(lambda self: self.lent)
    @rule(which=st.integers(0, MOST))
    def release(self, which: int) -> None:
        number, pipe = self.take(which)
        release(pipe)
        self.comes_back(number)
        if number not in self.gone:
            with pytest.raises(ValueError, match="twice"):
                release(pipe)

    @precondition(lambda self: self.lent)
    @rule(which=st.integers(0, MOST))
    def another_thread_releases(self, which: int) -> None:
        number, pipe = self.take(which)
        in_thread(lambda: release(pipe))
        self.comes_back(number)

    def comes_back(self, number: int) -> None:
        if len(self.local) < HUB_ROOM:
            self.local.append(number)
        elif len(self.shared) < SHARED_ROOM:
            self.shared.append(number)
        else:
            self.gone.add(number)

    @precondition(lambda self: self.lent)
    @rule(which=st.integers(0, MOST), pending=st.sampled_from([UNKNOWN, 1, 4096]))
    def release_dirty(self, which: int, pending: int) -> None:
        number, pipe = self.take(which)
        os.write(pipe.write_fd, b"not for the next one")
        pipe.pending = pending
        release(pipe)
        self.gone.add(number)

    @precondition(lambda self: self.lent)
    @rule(which=st.integers(0, MOST), how=st.sampled_from(["close", "drop", "cycle"]))
    def give_up(self, which: int, how: str) -> None:
        number, pipe = self.take(which)
        self.gone.add(number)
        if how == "close":
            pipe.close()
            pipe.close()
        elif how == "cycle":
            cycle: list[Any] = [pipe]
            cycle.append(cycle)
            del pipe, cycle
            self.reclaim(gc.collect)

    @rule(use=st.integers(1, MOST))
    def a_hub_comes_and_goes(self, use: int) -> None:
        """It hands what it has to all, newest first."""

        def work() -> list[int]:
            gevent.get_hub()
            taken = [pipe for _ in range(use) if (pipe := acquire()) is not None]
            inodes = [inode(pipe) for pipe in taken]
            while taken:
                release(taken.pop(0))
            gevent.get_hub().destroy(destroy_loop=True)
            return inodes

        inodes = in_thread(work)
        room = MOST - len(self.lent) - len(self.local)
        assert len(inodes) == min(use, room)
        from_shared = [self.shared.pop() for _ in range(min(use, len(self.shared)))]
        assert inodes[: len(from_shared)] == from_shared
        self.came_from["acquired_global"] += len(from_shared)
        self.came_from["acquired_new"] += len(inodes) - len(from_shared)
        assert not set(inodes[len(from_shared) :]) & (self.lent.keys() | self.gone)
        self.unused -= set(inodes)
        kept, rest = inodes[:HUB_ROOM], inodes[HUB_ROOM:]
        for number in [*rest, *reversed(kept)]:
            if len(self.shared) < SHARED_ROOM:
                self.shared.append(number)
            else:
                self.gone.add(number)

    @rule()
    def fork(self) -> None:
        """The child has none of them, and what it does is nothing to the parent."""
        mine = {*self.lent, *self.local, *self.shared}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there may be threads
            pid = os.fork()
        if pid == 0:
            fine = False
            try:
                new = {inode(lend()) for _ in range(3)}
                fine = not mine & (new | {int(name[6:-1]) for name in pipes_open()})
                fine = fine and all(pipe.read_fd < 0 for pipe in self.lent.values())
            finally:
                os._exit(0 if fine else 1)
        assert os.waitpid(pid, 0)[1] == 0

    @rule()
    def time_passes(self) -> None:
        """The timer of the hub looks at the idle pipes."""
        self.undo.setattr(idle, "_last_look", float("-inf"))
        self.reclaim(idle._on_timer)

    @rule(how=st.sampled_from([pipes.reclaim, pipes.reclaim, gc.collect]))
    def reclaim(self, how: Callable[[], object]) -> None:
        how()
        spare = len(self.local) + len(self.shared) - LOW_WATER
        for numbers in self.local, self.shared:
            for number in tuple(numbers):
                if number not in self.unused:
                    self.unused.add(number)
                elif spare > 0:
                    spare -= 1
                    numbers.remove(number)
                    self.gone.add(number)

    @invariant()
    def no_pipe_is_lent_twice_or_closed(self) -> None:
        assert {number: inode(pipe) for number, pipe in self.lent.items()} == {
            number: number for number in self.lent
        }
        ends = [fd for pipe in self.lent.values() for fd in (pipe.read_fd, pipe.write_fd)]
        assert len(set(ends)) == len(ends)

    @invariant()
    def the_counters_agree(self) -> None:
        assert_balanced()
        now, before = gsplice.stats(), self.before
        assert now.pipes_in_use - before.pipes_in_use == len(self.lent)
        assert now.pipes_idle == len(self.local) + len(self.shared)
        assert now.pipes_closed - before.pipes_closed == len(self.gone)
        for name, number in self.came_from.items():
            assert getattr(now, name) - getattr(before, name) == number

    @invariant()
    def what_is_gone_is_closed(self) -> None:
        assert not open_pipes() & {f"pipe:[{number}]" for number in self.gone}


@pytest.mark.parametrize(
    "examples",
    [
        3,
        pytest.param(10, marks=pytest.mark.thorough),
        pytest.param(300, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_the_pool_against_a_model(
    examples: int, record_property: Callable[[str, object], None]
) -> None:
    how = hypothesis_settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(PoolAgainstModel, settings=how)  # type: ignore[no-untyped-call]
    record_property("cases", examples * 40)
