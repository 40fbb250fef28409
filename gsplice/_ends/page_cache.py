"""Is this range of the file in the page cache? If not, reading it would have the hub wait.

The first of these that has an answer for a file is asked:

- preadv2(2) with ``RWF_NOWAIT`` reads a byte or fails with EAGAIN (ext4, xfs, btrfs). It is tried
  once in every ``STRIDE`` bytes: all pages would cost as much as the transfer.
- The type of the filesystem: in memory there is nothing to wait for. It is asked for on a thread,
  since statfs(2) waits for the server of a FUSE filesystem; until it is known, the file is not
  resident.
- mincore(2) knows each page of a range (overlayfs), for those who own the file or may write it. It
  is not asked on FUSE, NFS and CIFS, where mmap(2) and munmap(2) may wait for the server.
  cachestat(2) has no answer on overlayfs, and elsewhere counts pages that are still being read: of
  two clients that want the same file, the second would wait for the first one's disk.

Where there is no answer, a file counts as not resident. After a miss the next COLD_STRETCH bytes go
to a thread without asking: kernel read-ahead soon makes them partly cached, so the answer would
mislead.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from typing import Any, Final

from .._os.linux import RWF_NOWAIT, can_be_mapped, filesystem_type, in_core
from ..config import KiB, MiB, settings

#: What is in the page cache is asked of one page in so many bytes: a question costs 0.9 us, and
#: splicing this much takes 55 us.
STRIDE: Final = 512 * KiB

#: Farther than the kernel or our threads ever read ahead.
READ_AHEAD: Final = 4 * MiB

#: How much goes by a thread without asking where the disk was met first; doubled each time, so that
#: a file that is read from the disk from end to end is hardly ever asked about.
COLD_STRETCH: Final = 4 * MiB

#: Seconds for which an answer of the page cache is believed, and one about a filesystem's type: the
#: number of its device is another's only after it has been unmounted.
BELIEVED: Final = 1.0
TYPE_BELIEVED: Final = 1.0

#: A piece of more than this is written to a disk on a thread. The kernel makes a writer wait, up to
#: 200 ms, when too much is dirty, and looks once in 128 KiB or so (balance_dirty_pages()).
BIG_WRITE: Final = 64 * KiB

#: ``f_type`` of what lives in memory: tmpfs, ramfs, hugetlbfs, proc, sysfs, cgroup, cgroup2.
_IN_MEMORY: Final = frozenset(
    {0x01021994, 0x858458F6, 0x958458F6, 0x9FA0, 0x62656572, 0x27E0EB, 0x63677270}
)

#: ``f_type`` of what lives on a disk here and takes small writes into the page cache: ext4, xfs,
#: btrfs, f2fs, zfs, bcachefs, overlayfs. What is anywhere else may ask a server about each.
_ON_DISK: Final = frozenset(
    {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x794C7630}
)

_OVERLAYFS: Final = 0x794C7630
_FUSE: Final = 0x65735546

#: The type of the filesystem of each device, None if it can't be had, and when that was asked.
_types: Final[dict[int, tuple[int | None, float]]] = {}
_NOT_KNOWN: Final = -1

_ONE_BYTE: Final = (bytearray(1),)

#: Returns up to where a file is resident from an offset on: (descriptor, offset, end) -> end.
_Question = Callable[[int, int, int], int]


def learn_filesystems_and_run(
    devices: tuple[int | None, ...], job: Callable[..., Any], *args: Any
) -> Any:
    """Do ``job(*args)``, on a thread, and learn what filesystems *devices* have.

    The first of *args* are descriptors of files on these.
    """
    for device, fd in zip(devices, args, strict=False):
        if device is not None and _filesystem(device) == _NOT_KNOWN:
            _types[device] = filesystem_type(fd), time.monotonic()
    return job(*args)


def _filesystem(device: int) -> int | None:
    found, asked = _types.get(device, (_NOT_KNOWN, 0.0))
    return found if time.monotonic() - asked < TYPE_BELIEVED else _NOT_KNOWN


class Residency:
    """What is known of one file in the course of one transfer."""

    __slots__ = ("_ask", "_asked", "_begin", "_cold_stretch", "_cold_until", "_end", "_status")

    def __init__(self, status: os.stat_result) -> None:
        self._status = status
        self._ask: _Question | None = None
        #: Bytes from _begin to _end are resident, said the page cache at the time _asked.
        self._begin = self._end = 0
        self._asked = 0.0
        #: Below _cold_until we don't ask. _cold_stretch is the length of the next such range.
        self._cold_until = 0
        self._cold_stretch = COLD_STRETCH

    def cached(self, fd: int, offset: int, most: int) -> int:
        """Return how many bytes from *offset* on, *most* at the most, need no disk.

        Raises nothing: what is wrong with *fd*, the transfer will find out.
        """
        ask = self._question(fd, offset)
        if ask is None or offset < self._cold_until:
            return 0
        now = time.monotonic()
        if not self._begin <= offset <= self._end or now - self._asked > BELIEVED:
            self._begin = self._end = offset
        if self._end - offset < min(most, STRIDE):
            self._end = ask(fd, self._end, offset + most)
            self._asked = now
            if self._end == offset:
                self._met_disk(offset)
        return min(self._end - offset, most)

    def read(
        self, fd: int, offset: int, size: int, buffer: memoryview | None = None
    ) -> bytes | memoryview | None:
        """Read at most *size* bytes at *offset*, or return None if that may need a disk.

        No bytes: the file ends there. They may be part of *buffer*, which has room for as many.
        Lets out the errors of pread(2).
        """
        if self._question(fd, offset) is _probe:
            return read_resident(fd, offset, size, buffer)
        return os.pread(fd, size, offset) if self.cached(fd, offset, size) == size else None

    def write_may_wait(self, size: int) -> bool:
        """Say whether writing *size* bytes to the file may have to wait for a disk or a server."""
        if settings.offload != "auto":
            return settings.offload == "always"
        filesystem = _filesystem(self._status.st_dev)
        if filesystem in _IN_MEMORY:
            return False
        return size > BIG_WRITE or filesystem not in _ON_DISK

    def close_may_wait(self) -> bool:
        """Say whether a server may be told of a close."""
        return _filesystem(self._status.st_dev) not in _IN_MEMORY | _ON_DISK

    def _met_disk(self, offset: int) -> None:
        self._cold_until = offset + self._cold_stretch
        self._cold_stretch *= 2

    def _question(self, fd: int, offset: int) -> _Question | None:
        """Return what answers for this file; None if that is not known yet."""
        if self._ask is None:
            self._ask = self._choose(fd, offset)
        return self._ask

    def _choose(self, fd: int, offset: int) -> _Question | None:
        if settings.offload != "auto":
            return _all if settings.offload == "never" else _none
        try:
            if read_resident(fd, offset, 1) is None:  # which has it read: it may be there soon
                self._met_disk(offset)
        except OSError:
            pass
        else:
            return _probe
        filesystem = _filesystem(self._status.st_dev)
        if filesystem == _NOT_KNOWN:
            return None
        if filesystem in _IN_MEMORY:
            return _all
        if filesystem == _OVERLAYFS and not in_core(fd, self._status.st_size + STRIDE, 1):
            return _look
        return _none


def answered_by(fd: int) -> str:
    """Say who answers for the file that *fd* is open on, for people to read.

    One of: ``RWF_NOWAIT``, ``memory``, ``mincore``, ``nobody``, or the policy that makes asking
    needless, ``never`` or ``always``. May wait for the filesystem. Lets out the errors of fstat(2).
    """
    if settings.offload != "auto":
        return settings.offload
    status = os.fstat(fd)
    learn_filesystems_and_run((status.st_dev,), _none, fd, 0, 0)
    question = Residency(status)._question(fd, 0)
    names: dict[_Question, str] = {_probe: "RWF_NOWAIT", _all: "memory", _look: "mincore"}
    return "nobody" if question is None else names.get(question, "nobody")


def refuse_uncached(fd: int) -> None:
    """Raise OSError (EOPNOTSUPP) where splice(2) would give what the page cache has kept.

    A FUSE filesystem may want every read to reach it (``direct_io``); splice(2) does not care. Such
    a file can't be mapped either. Called on a thread.
    """
    if filesystem_type(fd) != _FUSE:
        return
    if not can_be_mapped(fd):
        raise OSError(errno.EOPNOTSUPP, "the file must not be cached")


def read_resident(
    fd: int, offset: int, size: int, buffer: memoryview | None = None
) -> memoryview | None:
    """Read at most *size* bytes at *offset* from the page cache; None if they are not there.

    No bytes: the file ends there. They are part of *buffer*, if it is given. Lets out OSError where
    the filesystem can't tell (EOPNOTSUPP).
    """
    buffer = memoryview(bytearray(size)) if buffer is None else buffer[:size]
    try:
        number = os.preadv(fd, (buffer,), offset, RWF_NOWAIT)
    except BlockingIOError:
        return None
    return buffer[:number]


def _all(fd: int, offset: int, end: int) -> int:
    return end


def _none(fd: int, offset: int, end: int) -> int:
    return offset


def _probe(fd: int, offset: int, end: int) -> int:
    """Return up to where *offset*, and a page of each stride from there, is resident.

    Returns *offset* if the page READ_AHEAD bytes past *end* isn't cached: what is cached may then
    only be read-ahead for another reader, and still be loading. Which page of a stride is looked at
    is left to chance, so that no client can choose what goes unnoticed.
    """
    try:
        if os.preadv(fd, _ONE_BYTE, offset, RWF_NOWAIT) == 0:
            return offset
        os.preadv(fd, _ONE_BYTE, end + READ_AHEAD, RWF_NOWAIT)
        while offset < end:
            following = min(offset + STRIDE, end)
            looked_at = offset + int(random.random() * (following - offset))
            if os.preadv(fd, _ONE_BYTE, looked_at, RWF_NOWAIT) == 0:
                break
            offset = following
    except OSError:  # EAGAIN: not resident
        pass
    return offset


def _look(fd: int, offset: int, end: int) -> int:
    return end if in_core(fd, offset, end - offset) else offset
