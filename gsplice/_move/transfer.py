"""One transfer between two ends, and the jobs that it gives to threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gevent

from .._ends.end import End
from .._ends.file import File
from .._ends.page_cache import learn_filesystems_and_run
from .._os.results import answer_of_job
from .._threads.descriptor import Duplicate, duplicate
from .._threads.job import Resource
from .._threads.threads import threads
from .account import Account


class Transfer(Account):
    """A transfer from *src* to *dst*, two ends that nobody else uses meanwhile, and its account."""

    __slots__ = ("_duplicates", "dst", "read_failed", "src")

    def __init__(self, src: Any, dst: Any, limit: int | None = None, delivered: int = 0) -> None:
        super().__init__(limit, delivered)
        self.src = src
        self.dst = dst
        #: Whether it ended with an error of reading the source, a file.
        self.read_failed = False
        #: Threads use these in place of the ends' descriptors. Made when first needed.
        self._duplicates: dict[End, Duplicate] = {}

    def count_delivered(self, number: int, counter: str) -> None:
        """Count *number* bytes of the source as delivered, and move its offset past them."""
        Account.count_delivered(self, number, counter)
        self.src.advance(number)

    def keep_splicing(self, filled: int) -> bool:
        """Return whether to go on splicing after a fill of *filled* bytes from a socket."""
        return True

    def on_thread(
        self,
        ends: tuple[End, ...],
        job: Callable[..., Any],
        *args: Any,
        resources: tuple[Resource, ...] = (),
        begin: Callable[[], object] | None = None,
    ) -> Any:
        """Do ``job(*descriptors of ends, *args)`` on a thread; return its result, or minus errno.

        The thread gets duplicates, in case an end is closed meanwhile. Without a thread, or a
        descriptor for a duplicate, this greenlet does the job. When it is the job's turn, this
        greenlet calls *begin*, which neither waits nor raises. Lets out ValueError for a closed
        file, and what is thrown in while it waits; then *resources* are left to a running job.
        """
        devices = tuple(end.status.st_dev if isinstance(end, File) else None for end in ends)
        job = functools.partial(learn_filesystems_and_run, devices, job)
        fds = [end.fileno() for end in ends]
        pool = threads()
        duplicates = self._duplicate(ends, fds) if pool is not None else None
        if pool is None or duplicates is None:
            if begin is not None:
                begin()
            result = answer_of_job(job, *fds, *args)
        else:
            of_files = [device for device in devices if device is not None]
            fds = [each.fd for each in duplicates]
            result = pool.run(of_files, job, fds, args, [*duplicates, *resources], begin)
        self._since_turn = 0
        self.check_process()
        return result

    def _duplicate(self, ends: tuple[End, ...], fds: list[int]) -> list[Duplicate] | None:
        """Return a duplicate for each of the *ends*, made once; None if no descriptor is left."""
        try:
            for end, fd in zip(ends, fds, strict=True):
                if end not in self._duplicates:
                    self._duplicates[end] = duplicate(fd)
        except OSError:
            return None
        return [self._duplicates[end] for end in ends]

    def leave(self) -> None:
        """Set both objects' positions after the bytes delivered, and close the transfer.

        Not in a forked child, where each file shares its position with the parent's. Lets out the
        errors of seeking, and of flushing the destination.
        """
        try:
            if self.began_here():
                self.src.leave_source()
                self.dst.leave_sink()
        finally:
            self.close()

    def close(self) -> None:
        """Close the duplicates, except those that a thread still uses. Raises nothing."""
        duplicates, self._duplicates = self._duplicates, {}
        for end, each in duplicates.items():
            if each.left_to_thread or not self.began_here():
                continue
            pool = threads() if isinstance(end, File) and end.close_may_wait() else None
            if pool is None:
                each.close()
            else:
                gevent.spawn(pool.run, (), each.close, (), (), (each,))
