"""One transfer between two ends, and what threads do for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gevent

from .._ends.end import End
from .._ends.file import File
from .._ends.page_cache import learn_filesystems
from .._os.results import answer
from .._threads.descriptor import Duplicate, duplicate
from .._threads.job import Loan
from .._threads.threads import threads
from .account import Account


class Transfer(Account):
    """The account of the bytes that go from *src* to *dst*, which nobody else uses meanwhile."""

    __slots__ = ("_duplicates", "dst", "read_failed", "src")

    def __init__(self, src: Any, dst: Any, limit: int | None = None, delivered: int = 0) -> None:
        super().__init__(limit, delivered)
        self.src = src
        self.dst = dst
        #: Whether the error that ended it came from reading a file.
        self.read_failed = False
        #: What threads use in place of the ends' descriptors. Most transfers need no thread.
        self._duplicates: dict[End, Duplicate] = {}

    def moved(self, number: int, counter: str) -> None:
        """Note that *number* bytes of the source have been delivered."""
        super().moved(number, counter)
        self.src.advance(number)

    def goes_on(self, filled: int) -> bool:
        """Say whether to go on splicing after a fill of so many bytes from a socket."""
        return True

    def on_thread(
        self,
        ends: tuple[End, ...],
        job: Callable[..., Any],
        *args: Any,
        loans: tuple[Loan, ...] = (),
    ) -> Any:
        """Do ``job(*descriptors of ends, *args)`` on a thread; return its result, or minus errno.

        Lets out ValueError for a file that has been closed, and what is thrown into the greenlet
        while it waits: the job may go on then, and *loans* are the thread's.
        """
        devices = tuple(end.status.st_dev if isinstance(end, File) else None for end in ends)
        job = functools.partial(learn_filesystems, devices, job)
        fds = [end.fileno() for end in ends]
        pool = threads()
        duplicates = self._duplicate(ends, fds) if pool is not None else None
        if pool is None or duplicates is None:
            result = answer(job, *fds, *args)
        else:
            known = [device for device in devices if device is not None]
            fds = [each.fd for each in duplicates]
            result = pool.run(known, job, fds, args, [*duplicates, *loans])
        self._since_turn = 0
        self.check_process()
        return result

    def _duplicate(self, ends: tuple[End, ...], fds: list[int]) -> list[Duplicate] | None:
        """Return duplicates of *fds*, made once for each of the *ends*; None if none can be had."""
        try:
            for end, fd in zip(ends, fds, strict=True):
                if end not in self._duplicates:
                    self._duplicates[end] = duplicate(fd)
        except OSError:
            return None
        return [self._duplicates[end] for end in ends]

    def leave(self) -> None:
        """Make both objects stand where the delivered bytes left them, and close the transfer.

        Not in a forked child, which shares the position of every file with its parent.
        """
        try:
            if self.is_ours():
                self.src.leave_source()
                self.dst.leave_sink()
        finally:
            self.close()

    def close(self) -> None:
        """Close what threads have used, but not what one is still using. Raises nothing."""
        duplicates, self._duplicates = self._duplicates, {}
        for end, each in duplicates.items():
            if each.lent or not self.is_ours():
                continue
            pool = threads() if isinstance(end, File) and end.close_waits() else None
            if pool is None:
                each.close()
            else:
                gevent.spawn(pool.run, (), each.close, (), (), (each,))
