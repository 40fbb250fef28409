"""What is told on a server's own log where the environment has switched gsplice on: at its start
what is patched, and every GSPLICE_REPORT seconds the counters.

:mod:`_gsplice_start` calls it, so that a program that calls :func:`gsplice.patch_all` itself, in an
environment without GSPLICE_PATCH_ALL and GSPLICE_REPORT, finds nothing of this in its log.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

import gevent

from ._counters import Stats, stats
from .config import settings
from .metrics import REASONS
from .monkey import NOT_ASKED_FOR, decided, is_for_later, patch_all, state

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def switch_on() -> None:
    """Call :func:`gsplice.patch_all`, if the setting ``patch_all`` says so and the program has not
    called that or :func:`gsplice.unpatch_all` itself. Raises nothing.
    """
    if settings.patch_all and not decided():
        patch_all()


def server_started(server: Any) -> None:
    """Tell on the log of *server*, one of gevent's, what is patched, if this process has not yet.

    pywsgi's ``error_log``; standard error for other servers. Raises nothing.
    """
    _begin(_Log(getattr(server, "error_log", None)))


def worker_ready(worker: Any) -> None:
    """Tell on the log of *worker*, one of gunicorn's, what is patched. Raises nothing."""
    _begin(_Log(worker.log))


class _Log:
    """A log of a server: gunicorn's, a logger, a file, or standard error for None."""

    def __init__(self, log: Any) -> None:
        self._log = log

    def say(self, line: str, *, warning: bool = False) -> None:
        """Write *line*, unless the log is closed, or nobody reads it any more."""
        log = sys.stderr if self._log is None else self._log
        # What pywsgi makes of a logger has these, too; its write() would say that it is an error.
        method = getattr(log, "warning" if warning else "info", None)
        with contextlib.suppress(OSError, ValueError):
            if method is not None:
                method("%s", line)
            elif log is not None:
                log.write(f"{line}\n")
                log.flush()


class _Reports:
    """What this process tells of itself, and has told."""

    def __init__(self) -> None:
        self.pid = 0
        self.hub: Callable[[], Any] = lambda: None
        self.timer: Any = None


_reports: Final = _Reports()


def _begin(log: _Log) -> None:
    if not (settings.patch_all or settings.report):
        return
    if _reports.pid != os.getpid():
        _reports.pid = os.getpid()
        line, warning = what_is_patched()
        log.say(line, warning=warning)
    if settings.report:
        _report_from(gevent.get_hub(), log)


def _report_from(hub: Any, log: _Log) -> None:
    """Have *hub* write the counters to *log* from time to time, as long as something else runs.

    One hub of a process does it. After a fork its timer goes on in the child.
    """
    if _reports.hub() is not None:
        return

    def report() -> None:
        log.say(counters_line(stats()))

    _reports.hub = weakref.ref(hub)
    _reports.timer = hub.loop.timer(settings.report, settings.report, ref=False)
    # Not in the hub itself, as a log may have to wait: for a lock, or a connection.
    _reports.timer.start(gevent.spawn, report)


def what_is_patched() -> tuple[str, bool]:
    """Return that in a line, and whether it is a warning: nothing is, and nobody wants that."""
    result = state()
    reasons = {
        name: reason for name, reason in result.not_patched.items() if not is_for_later(reason)
    }
    if result:
        left = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        line = f"gsplice: patched: {', '.join(_in_short(result.patched))}"
        return f"{line}; not patched: {left}" if left else line, False
    why = ", ".join({*reasons.values()} - {NOT_ASKED_FOR})
    if why:
        return f"gsplice: nothing is patched: {why}. See: python -m gsplice doctor", True
    if settings.patch_all:
        return "gsplice: nothing is patched, as the program has decided", False
    what_to_do = "Set GSPLICE_PATCH_ALL=1, or call gsplice.patch_all()."
    return f"gsplice: nothing is patched. {what_to_do}", True


def _in_short(names: tuple[str, ...]) -> list[str]:
    """Return the public functions of modules among *names*, and the classes of the methods."""
    parts = [(name, *name.rpartition(".")) for name in names]
    short = [
        owner if "." in owner else name
        for name, owner, _, last in parts
        if "." in owner or not last.startswith("_")
    ]
    return [*dict.fromkeys(short)]


def counters_line(figures: Stats) -> str:
    """Return *figures* in a line: what went the fast way, and why the rest did not."""
    ways = {
        "by splice": figures.bytes_spliced,
        "by sendfile": figures.bytes_sendfile,
        "by copy_file_range": figures.bytes_copy_file_range,
        "by reading and writing": figures.bytes_copied,
    }
    moved = ", ".join(f"{_amount(number)} {way}" for way, number in ways.items() if number)
    parts = [f"transfers: {figures.transfers}" + (f" ({moved})" if moved else "")]
    if figures.offloads:
        parts.append(f"disk waits on threads: {figures.offloads}")
    most_first = sorted(figures.fallbacks.items(), key=lambda each: (-each[1], each[0]))
    left = (f"{count} {reason} ({REASONS.get(reason, '?')})" for reason, count in most_first)
    parts.append(f"not taken, or not to the end: {', '.join(left) or 'none'}")
    return f"gsplice: process {os.getpid()}: {'; '.join(parts)}"


def _amount(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number /= 1024
        unit += 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{number} {_UNITS[0]}"
