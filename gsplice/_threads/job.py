"""A job for a thread, and the resources that it shares with the greenlet that waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .._os.results import answer_of_job


class Resource(Protocol):
    """Something of the greenlet's that the job uses as well: a pipe, a duplicate, a lock."""

    #: Whether the greenlet has given up, so that the thread will close it.
    left_to_thread: bool

    def leave_to_thread(self) -> None:
        """Have the thread close it when the job ends. Called on the hub."""

    def close(self) -> None:
        """Close it. Called on the thread, if the greenlet has left it to that."""


class Job:
    """A job on its way to a thread and back, which the greenlet may give up at any time.

    Greenlet and thread race to pop two one-element lists; pop is atomic. The winner of _first
    decides whether the job begins. The loser of _last closes the resources.
    """

    __slots__ = ("_args", "_fds", "_first", "_job", "_last", "_resources")

    def __init__(
        self, job: Callable[..., Any], fds: Sequence[int], args: Any, resources: Sequence[Resource]
    ) -> None:
        self._job = job
        self._fds = fds
        self._args = args
        self._resources = resources
        self._first, self._last = [None], [None]

    def __call__(self) -> Any:
        """Do the job; return its result, or minus its errno. Called on the thread."""
        if not _take(self._first):
            return None  # the greenlet has given up
        try:
            return answer_of_job(self._job, *self._fds, *self._args)
        finally:
            we_close = not _take(self._last)  # before _resources is cleared: see give_up()
            resources, self._resources, self._args = (
                self._resources,
                (),
                (),
            )  # the frame may live on
            if we_close:
                for resource in resources:
                    resource.close()

    def give_up(self) -> bool:
        """Leave the resources to the job if it is running; return whether it began. On the hub."""
        resources = self._resources  # the thread clears it when the job ends
        if _take(self._first):
            return False
        if _take(self._last):
            for resource in resources:
                resource.leave_to_thread()
        return True


def _take(tokens: list[None]) -> bool:
    try:
        tokens.pop()
    except IndexError:
        return False
    return True
