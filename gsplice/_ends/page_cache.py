"""Is this range of the file in the page cache? If not, reading it would have the hub wait.

The first of these that can tell for a file is asked:

- preadv2(2) with ``RWF_NOWAIT`` reads a byte or fails with EAGAIN (ext4, xfs, btrfs). We try one
  byte in every ``STRIDE``: trying every page would cost as much as the transfer.
- The type of the filesystem: in memory there is nothing to wait for. A thread asks for it, since
  statfs(2) on a FUSE filesystem waits for the server. Until it is known, nothing counts as cached.
- mincore(2) tells for each page of a range (overlayfs), if the user owns the file or may write it.
  Not on FUSE, NFS and CIFS, where mmap(2) and munmap(2) may wait for the server. Not cachestat(2)
  instead: it fails on overlayfs, and elsewhere counts pages that are still loading, so that a
  second client of the same file would have the hub wait for the first one's disk.

If none can tell, nothing of the file counts as cached. After a miss the next COLD_STRETCH bytes go
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

#: We ask about one page in so many bytes: asking costs 0.9 us, and splicing this much takes 55 us.
STRIDE: Final = 512 * KiB

#: Farther than the kernel or our threads ever read ahead.
READ_AHEAD: Final = 4 * MiB

#: After the first miss, so many bytes go to a thread without asking; twice as many after each later
#: one, so that we hardly ask about a file that is read from the disk from end to end.
COLD_STRETCH: Final = 4 * MiB

#: Seconds for which we believe that bytes are cached, and that a device has a type of filesystem:
#: another filesystem may get the device's number after an unmount.
BELIEVED: Final = 1.0
TYPE_BELIEVED: Final = 1.0

#: A small file that was missed is looked for again for so many seconds, and so many times at least,
#: before a thread waits for it; on a disk that took longer, not for the next SLOW seconds. A fast
#: disk takes 0.1 ms. A thread and back takes as long, and as much CPU time
#: (benchmarks/cold_files.py).
SOON: Final = 0.0005
LEAST_LOOKS: Final = 8
SLOW: Final = 0.1

#: A thread writes pieces larger than this to a disk. When too many pages are dirty, the kernel has
#: a writer wait for up to 200 ms; it checks once in 128 KiB or so (balance_dirty_pages()).
BIG_WRITE: Final = 64 * KiB

#: ``f_type`` of filesystems in memory: tmpfs, ramfs, hugetlbfs, proc, sysfs, cgroup, cgroup2.
_IN_MEMORY: Final = frozenset(
    {0x01021994, 0x858458F6, 0x958458F6, 0x9FA0, 0x62656572, 0x27E0EB, 0x63677270}
)

#: ``f_type`` of filesystems on a local disk, where small writes go to the page cache: ext4, xfs,
#: btrfs, f2fs, zfs, bcachefs, overlayfs. Any other may ask a server about each write.
_ON_DISK: Final = frozenset(
    {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x794C7630}
)

_OVERLAYFS: Final = 0x794C7630
_FUSE: Final = 0x65735546

#: For each device the type of its filesystem (None: statfs(2) failed), and when that was asked.
_types: Final[dict[int, tuple[int | None, float]]] = {}
_NOT_KNOWN: Final = -1

#: For each device until when its disk counts as slow.
_slow_until: Final[dict[int, float]] = {}

_ONE_BYTE: Final = (bytearray(1),)

#: How much farther into its stride the next byte is that we ask for: STRIDE times 0.618, the
#: fraction by which such steps come back near where they have been as late as possible.
_TURN: Final = 324_019

#: (descriptor, offset, end) -> up to where, at most *end*, the file is cached from *offset* on.
_Question = Callable[[int, int, int], int]


def learn_filesystems_and_run(
    devices: tuple[int | None, ...], job: Callable[..., Any], *args: Any
) -> Any:
    """Return ``job(*args)``, after asking for the filesystems of *devices* that are not known yet.

    The first of *args* are descriptors of files on these. On a thread, since statfs(2) may wait.
    """
    for device, fd in zip(devices, args, strict=False):
        if device is not None and _filesystem(device) == _NOT_KNOWN:
            _types[device] = filesystem_type(fd), time.monotonic()
    return job(*args)


def _filesystem(device: int) -> int | None:
    found, asked = _types.get(device, (_NOT_KNOWN, 0.0))
    return found if time.monotonic() - asked < TYPE_BELIEVED else _NOT_KNOWN


def write_may_wait(device: int, size: int) -> bool:
    """Return whether writing *size* bytes to a file on *device* may wait for a disk or a server."""
    if settings.offload != "auto":
        return settings.offload == "always"
    filesystem = _filesystem(device)
    if filesystem in _IN_MEMORY:
        return False
    return size > BIG_WRITE or filesystem not in _ON_DISK


class Residency:
    """What is known about the page cache of one file, during one transfer."""

    __slots__ = ("_ask", "_asked_at", "_begin", "_cold_stretch", "_cold_until", "_end", "_status")

    def __init__(self, status: os.stat_result) -> None:
        self._status = status
        self._ask: _Question | None = None
        #: Bytes from _begin to _end were cached at the time _asked_at.
        self._begin = self._end = -1
        self._asked_at = 0.0
        #: Below _cold_until we don't ask. _cold_stretch is the length of the next such range.
        self._cold_until = 0
        self._cold_stretch = COLD_STRETCH

    def cached(self, fd: int, offset: int, most: int) -> int:
        """Return how many bytes from *offset* on are cached, *most* at the most.

        Raises nothing: if *fd* is bad, the transfer's own call will fail.
        """
        if offset < self._cold_until:
            return 0
        now = time.monotonic()
        if not self._begin <= offset <= self._end or now - self._asked_at > BELIEVED:
            self._ask = None
            self._begin = self._end = offset
        if self._end - offset < min(most, STRIDE):
            ask = self._question(fd, offset)
            if ask is None or offset < self._cold_until:
                return 0
            self._end = ask(fd, self._end, offset + most)
            self._asked_at = now
            if self._end == offset:
                self._note_miss(offset)
        return min(self._end - offset, most)

    def read(
        self, fd: int, offset: int, size: int, buffer: memoryview | None = None
    ) -> bytes | memoryview | None:
        """Read at most *size* bytes at *offset*; return None if that may have to wait for a disk.

        No bytes: the file ends there. The result may be part of *buffer*, which must be that large.
        Lets out the errors of pread(2).
        """
        asked_before = self._ask is not None
        if self._question(fd, offset) is _preadv2:
            if not asked_before and offset < self._cold_until:
                return None  # it has just been missed
            return read_resident(fd, offset, size, buffer)
        return os.pread(fd, size, offset) if self.cached(fd, offset, size) == size else None

    def is_loading(self) -> bool:
        """Return whether what :meth:`read` has just missed may be there soon.

        To ask whether a page is cached has started read-ahead.
        """
        if self._ask is not _preadv2:
            return False
        return _slow_until.get(self._status.st_dev, 0.0) <= time.monotonic()

    def note_slow(self) -> None:
        """Note that what was loading has not come in time."""
        _slow_until[self._status.st_dev] = time.monotonic() + SLOW

    def write_may_wait(self, size: int) -> bool:
        """Return whether writing *size* bytes may wait for a disk or a server."""
        return write_may_wait(self._status.st_dev, size)

    def close_may_wait(self) -> bool:
        """Return whether closing a descriptor may wait for a server, which is told of it."""
        return _filesystem(self._status.st_dev) not in _IN_MEMORY | _ON_DISK

    def _note_miss(self, offset: int) -> None:
        self._cold_until = offset + self._cold_stretch
        self._cold_stretch *= 2

    def _question(self, fd: int, offset: int) -> _Question | None:
        """Return the function that tells for this file; None if that is not known yet."""
        if self._ask is None:
            self._ask = self._choose(fd, offset)
        return self._ask

    def _choose(self, fd: int, offset: int) -> _Question | None:
        if settings.offload != "auto":
            return _all if settings.offload == "never" else _none
        try:
            if read_resident(fd, offset, 1) is None:  # and starts read-ahead
                self._note_miss(offset)
        except OSError:
            pass
        else:
            return _preadv2
        filesystem = _filesystem(self._status.st_dev)
        if filesystem == _NOT_KNOWN:
            return None
        if filesystem in _IN_MEMORY:
            return _all
        if filesystem == _OVERLAYFS and not in_core(fd, self._status.st_size + STRIDE, 1):
            return _mincore
        return _none


def answered_by(fd: int) -> str:
    """Return, for people to read, what tells whether bytes of the file behind *fd* are cached.

    One of ``RWF_NOWAIT``, ``memory``, ``mincore``, ``nobody``; or ``never`` or ``always``, settings
    with which we don't ask. May wait for the filesystem. Lets out the errors of fstat(2).
    """
    if settings.offload != "auto":
        return settings.offload
    status = os.fstat(fd)
    learn_filesystems_and_run((status.st_dev,), _none, fd, 0, 0)
    question = Residency(status)._question(fd, 0)
    names: dict[_Question, str] = {_preadv2: "RWF_NOWAIT", _all: "memory", _mincore: "mincore"}
    return "nobody" if question is None else names.get(question, "nobody")


def refuse_uncached(fd: int, device: int) -> None:
    """Raise OSError (EOPNOTSUPP) for a file of which splice(2) could give outdated pages.

    A FUSE filesystem may demand that every read reaches it (``direct_io``), but splice(2) takes
    cached pages all the same. mmap(2) refuses such a file. May wait, so call it on a thread.
    """
    filesystem = _filesystem(device)
    if filesystem == _NOT_KNOWN:
        filesystem = filesystem_type(fd)
    if filesystem == _FUSE and not can_be_mapped(fd):
        raise OSError(errno.EOPNOTSUPP, "the file must not be cached")


def read_resident(
    fd: int, offset: int, size: int, buffer: memoryview | None = None
) -> memoryview | None:
    """Read at most *size* bytes at *offset* from the page cache; None if the first is not there.

    No bytes: the file ends there. The result is part of *buffer*, if that is given. Lets out the
    errors of preadv2(2): EOPNOTSUPP if the filesystem can't tell.
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


def _preadv2(fd: int, offset: int, end: int) -> int:
    """Return up to where one byte in each stride after *offset* is cached.

    Returns *offset* if the page READ_AHEAD bytes past *end* isn't cached: what is cached may then
    only be read-ahead for another reader, and still be loading. Which byte of the first stride is
    chosen at random, and another one of each later stride, so that no client can arrange for the
    uncached pages to be missed.
    """
    into_stride = int(random.random() * STRIDE)
    try:
        os.preadv(fd, _ONE_BYTE, end + READ_AHEAD, RWF_NOWAIT)
        while offset < end:
            if not os.preadv(fd, _ONE_BYTE, min(offset + into_stride, end - 1), RWF_NOWAIT):
                break
            offset += STRIDE
            into_stride = (into_stride + _TURN) % STRIDE
    except OSError:  # EAGAIN: not cached
        pass
    return min(offset, end)


def _mincore(fd: int, offset: int, end: int) -> int:
    return end if in_core(fd, offset, end - offset) else offset
