"""An exception at every switch of every kind of transfer.

A tracer of greenlet switches throws it, without knowing what is waited for: at the first switch of
a transfer, then at the second, and so on, until a transfer ends before it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import greenlet
import pytest
from conftest import digest, open_descriptors, some_bytes
from ends import GUARD, Ends, KiB, threads_done
from switches import EXCEPTIONS, Stop, exception_at_switch, quickly
from transfers import BY_NAME, Kind, set_back
from victims import assert_clean

import gsplice
from gsplice._move.account import PIECE
from gsplice._move.to_disk import DISK_PIECE

pytestmark = pytest.mark.usefixtures("quiet")


def attempt(directory: Path, kind: Kind, number: int, exception: BaseException) -> bool:
    """Run a transfer with *exception* at its *number*-th switch; say whether it got there."""
    data = some_bytes(kind.size)
    # TCP with little room stalls for longer than it takes to move the bytes
    buffers = None if "tcp" in kind.source + kind.sink else 4 * KiB
    with Ends(directory, buffers) as ends:
        src = ends.source(kind.source, kind.preface + data)
        dst, finish = ends.sink(kind.sink, kind.request, kind.half_closed)
        with exception_at_switch(number, exception) as watched:
            moving = gevent.spawn(kind.run, src, dst)
            watched.append(moving)
            with gevent.Timeout(GUARD):
                moving.join()
            happened = len(watched) > number
        threads_done()
        assert gsplice.stats().pipes_in_use == 0
        ended = moving.successful() and not isinstance(moving.value, greenlet.GreenletExit)
        if ended:
            assert moving.value in (None, kind.size)
        else:
            assert happened
            assert moving.exception in (exception, None), moving.exception
        position = src.tell() if kind.positions and kind.source == "file" else None
        written = dst.tell() if kind.positions and kind.sink == "file" else None
        arrived = kind.body(finish())
    assert data.startswith(arrived), digest(arrived)
    whole = len(arrived) == kind.size
    # pywsgi ends the connection early, and lets nothing out
    assert whole or not ended or (kind.swallows and happened)
    if kind.sink == "file" and happened and kind.positions:
        # A thread may have gone on to write its last piece, behind where the file stands.
        assert written is not None
        assert written <= len(arrived) <= written + max(PIECE, DISK_PIECE)
        assert position in (None, written)
    else:
        assert written in (None, len(arrived))
        assert position in (None, len(arrived))
    return happened and not (ended and whole)


def run_through(
    directory: Path, name: str, exception: str, numbers: Iterator[int]
) -> dict[str, int]:
    kind = BY_NAME[name]
    attempt(directory, kind, 1 << 30, Stop())  # opens what is opened once
    before = open_descriptors() - 2 * gsplice.stats().pipes_idle
    figures = {"cases": 0, "told": 0, "whole": 0}
    for number in numbers:
        figures["cases"] += 1
        met = attempt(directory, kind, number, EXCEPTIONS[exception]())
        assert open_descriptors() - 2 * gsplice.stats().pipes_idle <= before
        figures["told" if met else "whole"] += 1
        if not met:
            return figures
        assert_clean(directory)
    raise AssertionError("there is no end to its switches")


@pytest.fixture(params=BY_NAME)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a kind of transfer, which goes its way."""
    BY_NAME[request.param].set_up()
    yield request.param
    set_back()


Record = Callable[[str, object], None]


@pytest.mark.few(8)
@pytest.mark.parametrize("which", [0, 1])
def test_an_exception_at_some_switches(
    tmp_path: Path, name: str, which: int, record_property: Record
) -> None:
    exception = list(EXCEPTIONS)[(list(BY_NAME).index(name) + 2 * which) % len(EXCEPTIONS)]
    figures = run_through(tmp_path, name, exception, quickly(1, 1000))
    assert figures["told"] or BY_NAME[name].settings.get("offload") == "never"
    for figure, number in figures.items():
        record_property(figure, number)


@pytest.mark.long
@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_an_exception_at_every_switch(
    tmp_path: Path, name: str, exception: str, record_property: Record
) -> None:
    figures = run_through(tmp_path, name, exception, iter(range(1, 10_000)))
    assert figures["told"] or BY_NAME[name].settings.get("offload") == "never"
    for figure, number in figures.items():
        record_property(figure, number)
