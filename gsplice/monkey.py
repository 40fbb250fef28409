"""Replacing the names that gsplice patches, and putting the originals back.

Uses :func:`gevent.monkey.patch_module`, so that ``gevent.monkey.get_original('shutil',
'copyfileobj')`` and ``is_object_patched`` know of it, and subscribers to gevent's patching events
can forbid it. So are the methods of a class: gevent keeps their originals under the class's full
name, ``get_original('gevent._socket3.socket', 'sendfile')``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Final, NamedTuple

import gevent.monkey
from gevent.socket import socket as GeventSocket

from _gsplice_after_import import after_import, forget

from ._os.linux import LINUX
from ._patches import gunicorn as _gunicorn
from ._patches import http_client as _http_client
from ._patches import pywsgi as _pywsgi
from ._patches import shutil_copy, socket_sendfile

# Importing logging costs nothing: gevent.monkey has done it.
_log: Final = logging.getLogger("gsplice")


class _Row(NamedTuple):
    """A module or class to patch, as soon as somebody else has imported the module."""

    #: What users call it, and the names that are replaced in it.
    label: str
    names: Sequence[str]
    #: The module, and the class in it or None.
    module: str
    cls: str | None
    #: Given the module or class, returns the replacements in the form that patch_module() takes.
    replacements: Callable[[Any], Any]

    def labels(self) -> list[str]:
        """Return the names as users know them."""
        return [f"{self.label}.{name}" for name in self.names]

    def target(self) -> Any | None:
        """Return the module or class to patch; None if it has not been imported."""
        module = sys.modules.get(self.module)
        return module if self.cls is None else getattr(module, self.cls, None)

    def awaited(self) -> str:
        """Return the reason for "not patched" until its module is imported."""
        return f"will be when {self.module} is imported"


_TABLE: Final = {
    "socket": _Row(
        "socket",
        socket_sendfile.__implements__,
        GeventSocket.__module__,
        GeventSocket.__name__,
        lambda _: socket_sendfile,
    ),
    "shutil": _Row("shutil", shutil_copy.__implements__, "shutil", None, lambda _: shutil_copy),
    "pywsgi": _Row(
        "pywsgi.WSGIHandler",
        _pywsgi.NAMES,
        "gevent.pywsgi",
        "WSGIHandler",
        _pywsgi.replacements,
    ),
    "gunicorn": _Row(
        "gunicorn.GeventWorker",
        _gunicorn.NAMES,
        "gunicorn.workers.ggevent",
        "GeventWorker",
        _gunicorn.replacements,
    ),
    "http_client": _Row(
        "http.client.HTTPConnection",
        _http_client.NAMES,
        "http.client",
        "HTTPConnection",
        _http_client.replacements,
    ),
    "urllib3": _Row(
        "urllib3.HTTPConnection",
        _http_client.URLLIB3_NAMES,
        "urllib3.connection",
        "HTTPConnection",
        _http_client.urllib3_replacements,
    ),
}

#: The reason for "not patched" of what nobody wants patched.
NOT_ASKED_FOR: Final = "not asked for"

#: The arguments of :func:`patch_all`.
SWITCHES: Final = ("socket", "shutil", "pywsgi", "gunicorn", "http_client")

#: The rows to be patched when their module is imported.
_awaited: Final[set[str]] = set()

#: The rows that are patched, each with the module that was given to gevent.
_patched: Final[dict[str, ModuleType]] = {}

#: Whether anybody has called patch_all() or unpatch_all().
_called = False


@dataclasses.dataclass(frozen=True)
class PatchResult:
    """The result of :func:`patch_all`; it is true if anything is patched now."""

    #: The names that are patched now, whether by this call or an earlier one.
    patched: tuple[str, ...]
    #: The names that are not, each with the reason.
    not_patched: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.patched)

    def __str__(self) -> str:
        done = f"patched: {', '.join(self.patched) or 'nothing'}"
        left = (f"{name} ({reason})" for name, reason in self.not_patched.items())
        return "; not patched: ".join([done, *([", ".join(left)] if self.not_patched else [])])


def patch_all(
    *,
    socket: bool = True,
    shutil: bool = True,
    pywsgi: bool = True,
    gunicorn: bool = True,
    http_client: bool = True,
) -> PatchResult:
    """Replace the names that gsplice is faster for; return which, and why not the others.

    *socket*: ``sendfile`` of gevent's socket class. *shutil*: ``shutil.copyfileobj``, and what the
    functions of shutil that copy whole files call. *pywsgi*: ``wsgi.file_wrapper`` and file
    responses of ``gevent.pywsgi``, and that all its responses leave at once, as soon as that is
    imported. *gunicorn*: responses of its ``gevent`` worker that are a part of a file, as soon as
    that is imported. *http_client*: request bodies that are files, of ``http.client`` and of
    urllib3, as soon as these are imported.

    Call it at startup, before or after ``gevent.monkey.patch_all()``; calling it again patches only
    what is not patched yet. It creates no hub and no thread. It changes nothing if the kernel or a
    sandbox refuses splice(2), or if this is not Linux. Raises nothing of its own. If it has changed
    anything, or splice(2) is refused, it logs the result (logger ``gsplice``, INFO).
    """
    global _called
    _called = True
    before = tuple(_patched)
    refusal = _refusal()
    not_patched: dict[str, str] = {}
    asked_for = {
        "socket": socket,
        "shutil": shutil,
        "pywsgi": pywsgi,
        "gunicorn": gunicorn,
        "http_client": http_client,
        "urllib3": http_client,
    }
    for key, wanted in asked_for.items():
        row = _TABLE[key]
        if key in _patched:
            reason = None
        elif not wanted:
            reason = row.awaited() if key in _awaited else NOT_ASKED_FOR
        elif refusal is not None:
            reason = refusal
        else:
            reason = _patch(key)
        if reason is not None:
            not_patched.update(dict.fromkeys(row.labels(), reason))
    result = _result(not_patched)
    if refusal is not None or before != tuple(_patched):
        _log.info("%s", result)
    return result


def decided() -> bool:
    """Return whether the program has called :func:`patch_all` or :func:`unpatch_all`."""
    return _called


def state() -> PatchResult:
    """Return what is patched now, and why not the others; change nothing."""
    refusal = _refusal()
    return _result(
        {
            label: row.awaited() if key in _awaited else refusal or NOT_ASKED_FOR
            for key, row in _TABLE.items()
            if key not in _patched
            for label in row.labels()
        }
    )


def _result(not_patched: dict[str, str]) -> PatchResult:
    patched = tuple(label for key in _patched for label in _TABLE[key].labels())
    return PatchResult(patched, MappingProxyType(not_patched))


def is_for_later(reason: str) -> bool:
    """Return whether *reason*, from a :class:`PatchResult`, means: not imported yet."""
    return any(reason == row.awaited() for row in _TABLE.values())


def unpatch_all() -> None:
    """Put every original back, as if :func:`patch_all` had never been called.

    Also a name that somebody else has wrapped since.
    """
    global _called
    _called = True
    for key in _awaited:
        forget(_TABLE[key].module)
    _awaited.clear()
    for key, target in _patched.items():
        saved = gevent.monkey.saved[target.__name__]
        for name in _TABLE[key].names:
            setattr(target, name, saved.pop(name))
        if not saved:
            del gevent.monkey.saved[target.__name__]
    _patched.clear()


class _ClassAsModule(ModuleType):
    """A class that looks like a module, as gevent's patch_module() takes only modules."""

    def __init__(self, cls: type) -> None:
        super().__init__(f"{cls.__module__}.{cls.__qualname__}")
        self.__dict__["_cls"] = cls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._cls, name, value)


def _patch(key: str) -> str | None:
    """Patch that row, now or when its module is imported; return why it is not patched now."""
    row = _TABLE[key]
    target = row.target()
    if target is None:
        after_import(row.module, functools.partial(_patch_later, key))
        _awaited.add(key)
        return row.awaited()
    source = row.replacements(target)
    module: ModuleType = target if row.cls is None else _ClassAsModule(target)
    if not gevent.monkey.patch_module(module, source):
        return "a subscriber to gevent's patching events forbade it"
    # Call what was there before us: it may have been somebody else's wrapper.
    source.originals.update(gevent.monkey.saved[module.__name__])
    _patched[key] = module
    return None


def _patch_later(key: str) -> None:
    """Patch that row, whose module has just been imported, and log it."""
    _awaited.discard(key)
    if _patch(key) is None:
        _log.info("patched: %s", ", ".join(_TABLE[key].labels()))


def _refusal() -> str | None:
    """Return why splice(2) can't be used here, or None if it can."""
    if not LINUX:
        return "needs splice(2), which only Linux has"
    try:
        _try_splice()
    except OSError as err:
        return f"splice(2) is refused here: {err.strerror}"
    return None


# Exceptions are not cached: the failure may be temporary (no descriptors left).
@functools.cache
def _try_splice() -> None:
    fds: list[int] = []
    try:
        fds += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fds += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.write(fds[1], b"?")
        os.splice(fds[0], fds[3], 1)
    finally:
        for fd in fds:
            os.close(fd)
