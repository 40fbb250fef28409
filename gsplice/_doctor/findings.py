"""What :mod:`gsplice._doctor.command` looks at, and what it says about it.

What can be tried is tried, by :mod:`gsplice._doctor.trials` and by a real transfer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any, Final

import gevent
import gevent.socket

from .._counters import stats
from .._ends.page_cache import answered_by
from .._os.linux import LINUX
from .._pool.pipe import CAPACITY_STEPS, capacity_of
from ..config import KiB, MiB, settings
from ..monkey import SWITCHES, is_for_later, patch_all, unpatch_all
from . import trials

#: What a transfer from a file holds: the socket, the file, and a duplicate of it for the thread.
_DESCRIPTORS_EACH: Final = 3
#: Descriptors of a process before anything is served: standard streams, the loop's, listeners.
_DESCRIPTORS_BEFORE: Final = 32
#: How many names are looked at for a file to try things with.
_MOST_NAMES: Final = 1000


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    #: What holds, in a sentence.
    found: str
    #: What to do about it, or what could be done; empty: nothing.
    to_do: str = ""
    #: Whether gsplice does less than it could, or may fail, unless it is done.
    attention: bool = False

    @property
    def status(self) -> str:
        """``ok``, ``note``, or ``attention``."""
        return "attention" if self.attention else "note" if self.to_do else "ok"


def examine(paths: list[str]) -> Iterator[Finding]:
    """Yield what is found, about the filesystems of *paths*, too.

    Patches what :func:`gsplice.patch_all` does, and puts it back; makes a hub.
    """
    if not LINUX:
        yield Finding("system", "not Linux", "gsplice does nothing here; it needs Linux.", True)
        return
    yield from _kernel()
    for path in paths:
        yield from _path(path)
    yield from _pipes()
    yield _descriptors()
    yield _loop()
    yield from _patching()
    yield from _environment(os.environ)


def _tried(
    subject: str, trial: Callable[[], object], fine: str, refused: str, *, attention: bool = False
) -> Finding:
    """Return what came of *trial*: *fine*, or the error and what to do, *refused*."""
    try:
        trial()
    except OSError as err:
        return Finding(subject, f"refused ({err.strerror or err})", refused, attention)
    return Finding(subject, fine)


# The kernel.


def _kernel() -> Iterator[Finding]:
    allow = "A sandbox or container forbids it: allow {} in its seccomp profile."
    yield _tried(
        "splice",
        trials.splice_sockets,
        "moves bytes from socket to pipe to socket",
        f"{allow.format('splice')} Until then gsplice patches nothing.",
        attention=True,
    )
    with trials.in_memory() as fd, trials.in_memory() as other:
        yield _tried(
            "sendfile",
            lambda: trials.send_file(fd),
            "sends a file to a socket; gsplice does so where the pool has no pipe",
            f"{allow.format('sendfile')} Until then files without a pipe are read and sent.",
            attention=True,
        )
        yield _tried(
            "copy_file_range",
            lambda: trials.copy_file(fd, other),
            "copies a file inside the kernel",
            f"{allow.format('copy_file_range')} Until then splice(2) copies.",
            attention=True,
        )
        yield _tried(
            "cachestat",
            lambda: trials.cachestat(fd),
            "answers; gsplice does without it (it counts pages that are still being read)",
            "Nothing is lost: gsplice does without it.",
        )
    yield _tried(
        "kernel TLS",
        trials.kernel_tls,
        "there; gsplice does without it: TLS sockets go to the original functions",
        "Nothing is lost: TLS sockets go to the original functions.",
    )


# A filesystem.


def _path(path: str) -> Iterator[Finding]:
    try:
        name, read_only = trials.filesystem_of(path)
        mode = os.stat(path).st_mode
        with ExitStack() as stack:
            fd, writable = _open(path, mode, stack)
            kind = f"{name}, read-only" if read_only else name
            if fd is None:
                yield Finding(
                    path,
                    f"{kind}; nothing can be written there, and no file found to read",
                    "Give the name of a file there that this user may read.",
                )
                return
            yield from _file(f"{path} ({kind})", fd)
            if writable is not None:
                other = stack.enter_context(trials.written_in(writable))
                yield _tried(
                    f"{path} ({kind}): copy_file_range",
                    lambda: trials.copy_file(fd, other),
                    "copies files inside the kernel",
                    "Nothing is lost: splice(2), or reading and writing, copies instead.",
                )
    except OSError as err:
        yield Finding(
            path,
            f"cannot be examined: {err.strerror or err}",
            f"Check the name, and that user {os.geteuid()} may read it.",
            True,
        )


def _open(path: str, mode: int, stack: ExitStack) -> tuple[int | None, str | None]:
    """Return the descriptor of a file to try things with, and the directory it was written to.

    A new one if *path* is a directory that can be written to, else one that is there and not empty;
    neither if there is none. Lets out OSError if *path* itself can't be read.
    """
    if not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode):
            raise OSError(0, "neither a directory nor a regular file")
        return _open_read(path, stack), None
    try:
        return stack.enter_context(trials.written_in(path)), path
    except OSError:  # read-only, not ours, full, or no such filesystem
        pass
    os.scandir(path).close()  # walk() says nothing of an error
    there = (os.path.join(where, name) for where, _, names in os.walk(path) for name in names)
    for candidate in itertools.islice(there, _MOST_NAMES):
        with contextlib.suppress(OSError):  # not to be read
            status = os.lstat(candidate)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                return _open_read(candidate, stack), None
    return None, None


def _open_read(path: str, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def _file(subject: str, fd: int) -> Iterator[Finding]:
    yield _tried(
        f"{subject}: splice",
        lambda: trials.move_file(fd),
        "files go to pipes by splice, and to sockets by sendfile where the pool has no pipe",
        "Files from here are read and sent. Serve them from another filesystem to have them moved "
        "by the kernel.",
        attention=True,
    )
    try:
        trials.read_nowait(fd)
    except OSError as err:
        nowait = f"RWF_NOWAIT is refused ({err.strerror})"
    else:
        nowait = "RWF_NOWAIT works"
    answer = answered_by(fd)
    threads = f"{settings.threads} threads for each hub, at most half of them for one filesystem"
    answers = {
        "RWF_NOWAIT": "the hub sends what is in the page cache, a thread waits for the rest",
        "memory": "files are in memory, and the hub sends them",
        "mincore": "mincore says what is in the page cache, and the hub sends that; a thread waits "
        "for the rest",
        "nobody": "the kernel does not tell what is in the page cache, so every piece goes by a "
        f"thread ({threads})",
        "never": "GSPLICE_OFFLOAD=never: the hub waits for the disk, with every connection it has",
        "always": "GSPLICE_OFFLOAD=always: every piece goes by a thread",
    }
    to_do = {
        "nobody": "If it is slow, let more threads wait (GSPLICE_THREADS). On overlayfs it is "
        "otherwise for files that the server's user owns.",
        "never": "Unset GSPLICE_OFFLOAD, unless you have measured that this is better.",
        "always": "Unset GSPLICE_OFFLOAD, unless you have measured that this is better.",
    }
    yield Finding(f"{subject}: page cache", f"{nowait}; {answers[answer]}", to_do.get(answer, ""))


# Pipes and descriptors.


def _pipes() -> Iterator[Finding]:
    try:
        most, exempt = trials.pipe_limit("max-size"), trials.is_exempt()
        soft, hard = trials.pipe_limit("user-pages-soft"), trials.pipe_limit("user-pages-hard")
        wanted = capacity_of(1)
        granted = trials.pipe_of(wanted)
    except OSError as err:
        to_do = "See that /proc is mounted, and that descriptors are left."
        yield Finding("pipes", f"not to be examined ({err.strerror})", to_do, True)
        return
    if granted >= wanted:
        yield Finding("pipe capacity", f"a new pipe got the {_bytes(wanted)} that it asked for")
    elif wanted > most:
        yield Finding(
            "pipe capacity",
            f"a new pipe has {_bytes(granted)}: pipe-max-size allows this user {_bytes(most)}",
            f"sysctl fs.pipe-max-size={wanted}, or set GSPLICE_PIPE_SIZE={most}.",
            True,
        )
    else:
        yield Finding(
            "pipe capacity",
            f"a new pipe got {_bytes(granted)} of {_bytes(wanted)}: the pipes of this user's "
            "programs have used up their room, and transfers go without a pipe",
            "Find the program that holds them, or raise fs.pipe-user-pages-soft.",
            True,
        )
    yield _pipe_room(soft, hard, exempt)


def _pipe_room(soft: int, hard: int, exempt: bool) -> Finding:
    """Say how many transfers can have a pipe, by the policy in :mod:`gsplice._pool.pipe`."""
    page = os.sysconf("SC_PAGE_SIZE")
    limits = [pages * page for pages in (soft, hard) if pages and not exempt]
    room = min(limits, default=None)
    number = used = whole = begin = 0
    steps: dict[int, int] = {}
    for end in (*(most for most, _ in CAPACITY_STEPS), settings.max_pipes):
        capacity = capacity_of(begin + 1)
        wanted = max(0, min(end, settings.max_pipes) - begin)
        fit = wanted
        if room is not None and capacity:
            fit = min(wanted, (room - used) // capacity) if number == begin else 0
        if fit:
            number += fit
            used += fit * capacity
            steps[capacity] = steps.get(capacity, 0) + fit
        whole += wanted * capacity
        begin += wanted
    each = ", ".join(f"{count} of {_bytes(capacity)}" for capacity, count in steps.items())
    limit = "no limit for this user"
    if room is not None:
        limit = f"of {_bytes(room)} for this user, whose other programs may hold some"
    if not number:
        each = "GSPLICE_MAX_PIPES=0" if not settings.max_pipes else "none fits"
    found = (
        f"{number} transfers at a time can have a pipe ({each}: together {_bytes(used)}, {limit}; "
        f"pipe-user-pages-soft {soft}, -hard {hard}); a file needs one only for as long as bytes "
        "are in it, not while it waits for a slow reader"
    )
    if number == settings.max_pipes:
        return Finding("pipe room", found)
    return Finding(
        "pipe room",
        f"{found}; GSPLICE_MAX_PIPES={settings.max_pipes} would need {_bytes(whole)}",
        f"sysctl fs.pipe-user-pages-soft={-(-whole // page)} (and -hard, if it is set), or "
        f"GSPLICE_MAX_PIPES={number}. Without a pipe, files go by sendfile; the rest is read and "
        "sent.",
        True,
    )


def _descriptors() -> Finding:
    import resource  # which Windows has not

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("descriptors", "no limit")
    for_pipes = 2 * settings.max_pipes
    left = soft - for_pipes - _DESCRIPTORS_BEFORE
    downloads = max(0, left) // _DESCRIPTORS_EACH
    most = "any number" if hard == resource.RLIM_INFINITY else hard
    found = (
        f"{soft} for a process, up to {most} if it asks; with all {settings.max_pipes} pipes open, "
        f"about {downloads} downloads at a time (socket, file, a duplicate for the thread)"
    )
    raise_it = "Raise it for a busy server: ulimit -n, or LimitNOFILE= of systemd."
    if left < for_pipes:
        attention = downloads < settings.max_pipes // _DESCRIPTORS_EACH
        return Finding("descriptors", found, raise_it, attention)
    return Finding("descriptors", found)


# gevent, and what is patched.


def _loop() -> Finding:
    loop = gevent.get_hub().loop
    name = f"{type(loop).__module__}, {loop.backend}"
    if loop.backend in ("select", "poll"):
        return Finding(
            "event loop",
            f"{name}: slow with many connections, and select ends at descriptor 1023",
            "Unset GEVENT_BACKEND; Linux has epoll.",
            True,
        )
    return Finding("event loop", name)


def _patching() -> Iterator[Finding]:
    # Or patch_all() would leave pywsgi for when it is imported.
    import gevent.pywsgi  # noqa: F401

    before = patch_all(**dict.fromkeys(SWITCHES, False)).patched
    result = patch_all()
    try:
        forbidden = {
            name: reason for name, reason in result.not_patched.items() if not is_for_later(reason)
        }
        if forbidden:
            yield Finding(
                "patch_all()",
                f"does not patch {', '.join(forbidden)}: {'; '.join({*forbidden.values()})}",
                "Have whatever forbids it (a sandbox, or the program's own code) let it through.",
                True,
            )
        if result:
            yield Finding("what is patched", str(result))
            yield _transfer()
    finally:
        if not before:
            unpatch_all()


def _transfer() -> Finding:
    """Send a file to a socket the way a server does, and ask the counters which way it went.

    Twice: with the first a thread learns of which type the filesystem is.
    """
    with closing(gevent.socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with closing(gevent.socket.create_connection(listener.getsockname())) as far:
            near, _ = listener.accept()
            with closing(near), os.fdopen(os.memfd_create("gsplice"), "w+b") as file:
                file.write(bytes(MiB))
                receiving = gevent.spawn(_receive, far)
                for _ in range(2):
                    before = stats()
                    file.seek(0)
                    near.sendfile(file)
                near.shutdown(gevent.socket.SHUT_WR)
                received = receiving.get() - MiB
    after = stats()
    sent, spliced = (
        getattr(after, name) - getattr(before, name) for name in ("bytes_sendfile", "bytes_spliced")
    )
    if received == sent + spliced == MiB:
        return Finding(
            "transfer",
            "1 MiB of a file went to a TCP socket inside the kernel "
            f"({_bytes(sent)} by sendfile, {_bytes(spliced)} by splice)",
        )
    reasons = {
        reason: count
        for reason, count in after.fallbacks.items()
        if count != before.fallbacks.get(reason, 0)
    }
    return Finding(
        "transfer",
        f"of 1 MiB of a file, {_bytes(sent + spliced)} went inside the kernel to a TCP socket, and "
        f"{_bytes(received)} arrived; "
        f"reasons: {', '.join(reasons) or 'none counted'}",
        "Look the reason up in docs/taken.md.",
        True,
    )


def _receive(sock: Any) -> int:
    return sum(iter(lambda: len(sock.recv(1 << 16)), 0))


def _environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = [f"GSPLICE_{name.upper()}" for name in vars(settings)]
    given = sorted(name for name in environ if name.startswith("GSPLICE_"))
    _, wrong = settings.read(environ)
    for name, what in wrong.items():
        yield Finding(f"settings: {name}", what, "Correct it, or unset it.", True)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            to_do = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
            yield Finding(f"settings: {name}", "gsplice has no such variable", to_do, True)
    right = (name for name in given if name in known and name not in wrong)
    values = ", ".join(f"{name}={environ[name]}" for name in right)
    yield Finding("settings", values or "all defaults")
    found = importlib.metadata.entry_points(group="gevent.plugins.monkey.did_patch_builtins")
    if any(entry.name == "gsplice" for entry in found):
        wanted = "calls gsplice.patch_all()" if settings.patch_all else "does not unless asked"
        yield Finding("plugin", f"installed; gevent.monkey.patch_all() {wanted}")
    else:
        yield Finding(
            "plugin",
            "gevent does not find it: GSPLICE_PATCH_ALL and patch_all(gsplice=True) do nothing",
            "Install gsplice with pip; on the path alone, it has no entry point.",
            settings.patch_all,
        )


def _bytes(number: int) -> str:
    for size, unit in ((MiB, "MiB"), (KiB, "KiB")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} bytes"
