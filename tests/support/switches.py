"""An exception at a switch of a greenlet, without knowing what is waited for there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import greenlet


class Stop(BaseException):
    """An exception that nobody expects."""


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "killed": greenlet.GreenletExit,
    "timed out": gevent.Timeout,
    "timed out with an OSError": lambda: TimeoutError("not the socket's"),
    "stopped": Stop,
}


@contextlib.contextmanager
def exception_at_switch(number: int, exception: BaseException) -> Iterator[list[Any]]:
    """Throw *exception* into a greenlet when it has switched away for the *number*-th time.

    The greenlet is the one that is put into the list, which then gets a mark for each switch.
    """
    watched: list[Any] = []

    def trace(event: str, args: tuple[Any, Any]) -> None:
        if watched and args[0] is watched[0] and not watched[0].dead:
            watched.append(event)
            if len(watched) == number + 1:
                watched[0].kill(exception, block=False)

    before = greenlet.settrace(trace)
    try:
        yield watched
    finally:
        greenlet.settrace(before)


def quickly(first: int, most: int) -> Iterator[int]:
    """Yield every number at first, then fewer and fewer."""
    number = first
    while number < most:
        yield number
        number += 1 + number // 6
