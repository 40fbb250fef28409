"""A job for a thread, and what it borrows from the greenlet that waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .._os.results import answer


class Loan(Protocol):
    """Something of the greenlet's that a thread uses as well: a pipe, a duplicate."""

    #: Whether the thread has it for good, as its greenlet has ended first.
    lent: bool

    def lend(self) -> None:
        """Leave it to the thread for good. Called on the hub."""

    def close(self) -> None:
        """Give it up. Called on the thread, if it was left to that."""


class Job:
    """A job on its way to a thread and back, which the greenlet may give up at any time.

    Greenlet and thread race to pop two one-element lists; pop is atomic. The winner of _first
    decides whether the job begins. The loser of _last closes the loans.
    """

    __slots__ = ("_args", "_fds", "_first", "_job", "_last", "_loans")

    def __init__(
        self, job: Callable[..., Any], fds: Sequence[int], args: Any, loans: Sequence[Loan]
    ) -> None:
        self._job = job
        self._fds = fds
        self._args = args
        self._loans = loans
        self._first, self._last = [None], [None]

    def __call__(self) -> Any:
        """Do the job. Called on the thread."""
        if not _take(self._first):
            return None
        try:
            return answer(self._job, *self._fds, *self._args)
        finally:
            is_ours = not _take(self._last)  # before the loans are forgotten: see give_up()
            loans, self._loans, self._args = self._loans, (), ()  # the thread's frame may live on
            if is_ours:
                for loan in loans:
                    loan.close()

    def give_up(self) -> bool:
        """Leave the loans to the thread, if it is using them; say whether it began. On the hub."""
        loans = self._loans
        if _take(self._first):
            return False
        if _take(self._last):
            for loan in loans:
                loan.lend()
        return True


def _take(tokens: list[None]) -> bool:
    try:
        tokens.pop()
    except IndexError:
        return False
    return True
