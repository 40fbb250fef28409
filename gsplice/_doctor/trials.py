"""What the kernel does for this process, found out by trying it: no version says what a sandbox,
a filesystem or a user's limits will refuse.

Each function leaves nothing behind, waits for nothing but the filesystem that it is asked about,
and lets out the OSError of the call that was refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Final

from .._ends.page_cache import refuse_uncached
from .._os.linux import F_GETPIPE_SZ, F_SETPIPE_SZ, RWF_NOWAIT, fcntl

SAMPLE: Final = b"gsplice" * 1000

_SYS_CACHESTAT: Final = 451  # on every architecture; Linux 6.5
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 1 << 21, 1 << 24  # capabilities(7), linux/capability.h
_TCP_ULP: Final = 31  # tcp(7), linux/tcp.h


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def _sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@contextlib.contextmanager
def in_memory() -> Iterator[int]:
    """Yield the descriptor of a file in memory that holds SAMPLE: memfd_create(2)."""
    fd = os.memfd_create("gsplice")
    try:
        os.write(fd, SAMPLE)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def written_in(directory: str) -> Iterator[int]:
    """Yield the descriptor of a file in *directory* that holds SAMPLE, and never has a name.

    Where the filesystem can't make one (EOPNOTSUPP, EISDIR: NFS, most of FUSE), nothing is written.
    """
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, SAMPLE)
        yield fd
    finally:
        os.close(fd)


def splice_sockets() -> None:
    """Splice from a socket into a pipe, and from there into another socket."""
    with _sockets() as (a, b), _sockets() as (c, d), _pipe() as (read_fd, write_fd):
        a.sendall(b"?")
        os.splice(b.fileno(), write_fd, 1)
        os.splice(read_fd, c.fileno(), 1)
        _same(d.recv(1), b"?")


def splice_file(fd: int) -> None:
    """Splice the first page of a file into a pipe."""
    with _pipe() as (read_fd, write_fd):
        moved = os.splice(fd, write_fd, 4096, offset_src=0)
        _same(os.read(read_fd, moved or 1) if moved else b"", os.pread(fd, moved, 0))


def send_file(fd: int) -> None:
    """Send the first page of a file to a socket with sendfile(2)."""
    with _sockets() as (near, far):
        sent = os.sendfile(near.fileno(), fd, 0, 4096)
        _same(far.recv(sent) if sent else b"", os.pread(fd, sent, 0))


def move_file(fd: int) -> None:
    """Move the first page of a file both ways, if it is one that gsplice would move at all."""
    refuse_uncached(fd, os.fstat(fd).st_dev)
    splice_file(fd)
    send_file(fd)


def copy_file(src: int, dst: int) -> None:
    """Copy a page between two files with copy_file_range(2)."""
    copied = os.copy_file_range(src, dst, 4096, 0, 0)
    _same(os.pread(dst, copied, 0), os.pread(src, copied, 0))


def read_nowait(fd: int) -> bool:
    """Read a byte with RWF_NOWAIT; return whether it was in the page cache."""
    try:
        os.preadv(fd, (bytearray(1),), 0, RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def cachestat(fd: int) -> None:
    """Ask how many pages of a file are in the page cache (Linux 6.5)."""
    import ctypes

    whole, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_CACHESTAT, fd, whole, answer, 0):
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def kernel_tls() -> None:
    """Have a TCP connection on the loopback taken over by the kernel's TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        with socket.create_connection(listener.getsockname(), 5) as near, listener.accept()[0]:
            near.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")


def pipe_of(size: int) -> int:
    """Make a pipe and ask for *size* bytes of capacity; return what it has then, refused or not."""
    with _pipe() as (_, write_fd):
        with contextlib.suppress(PermissionError):
            fcntl(write_fd, F_SETPIPE_SZ, size)
        return int(fcntl(write_fd, F_GETPIPE_SZ))


def pipe_limit(name: str) -> int:
    """Return the limit ``/proc/sys/fs/pipe-<name>`` (proc(5), pipe(7))."""
    with open(f"/proc/sys/fs/pipe-{name}") as file:
        return int(file.read())


def is_exempt() -> bool:
    """Say whether the limits of a user's pipes do not hold for this process.

    CAP_SYS_RESOURCE or CAP_SYS_ADMIN, and not only in a user namespace: ``fs/pipe.c``,
    pipe_is_unprivileged_user(). Read, not tried, which would use up the room of every other program
    of the user.
    """
    with open("/proc/self/uid_map") as uids, open("/proc/self/status") as status:
        if uids.read().split() != ["0", "0", "4294967295"]:
            return False
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & (_CAP_SYS_ADMIN | _CAP_SYS_RESOURCE))


def filesystem_of(path: str) -> tuple[str, bool]:
    """Return the name of the filesystem's type where *path* is, and whether it is read-only."""
    real, best, found = os.path.realpath(path), "", ("unknown", False)
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            mount, _, filesystem = line.partition(" - ")
            fields = mount.split()
            where = _unescaped(fields[4])
            inside = (real + "/").startswith(where.rstrip("/") + "/")
            if inside and len(where) >= len(best):  # a later one hides an earlier one
                best = where
                found = filesystem.split()[0], "ro" in fields[5].split(",")
    return found


def _unescaped(name: str) -> str:
    for octal in ("040", "011", "012", "134"):  # the backslash last
        name = name.replace(f"\\{octal}", chr(int(octal, 8)))
    return name


def _same(got: bytes, expected: bytes) -> None:
    if got != expected:
        raise OSError("it moved other bytes than those that are there")
