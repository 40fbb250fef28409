"""Which names are replaced, and putting them back.

Built on :func:`gevent.monkey.patch_module`, so that ``gevent.monkey.get_original('shutil',
'copyfileobj')`` and ``is_object_patched`` tell the truth, and gevent's subscribers are asked. The
methods of a class are patched the same way: gevent keeps their originals under the class's full
name, ``get_original('gevent._socket3.socket', 'sendfile')``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil as stdlib_shutil
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, Final, NamedTuple

import gevent.monkey
from gevent.socket import socket as GeventSocket

from . import _gunicorn, _pywsgi, _shutil, _socket
from ._imports import after_import, forget
from ._linux import LINUX

#: gevent.monkey has imported logging already.
_log: Final = logging.getLogger("gsplice")


class _Later(NamedTuple):
    """A class to be patched as soon as somebody else has imported its module."""

    module: str
    cls: str
    replacements: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"will be when {self.module} is imported"


_LATER: Final = {
    "pywsgi": _Later("gevent.pywsgi", "WSGIHandler", _pywsgi.replacements),
    "gunicorn": _Later("gunicorn.workers.ggevent", "GeventWorker", _gunicorn.replacements),
}


@dataclasses.dataclass(frozen=True)
class PatchResult:
    """What :func:`patch_all` did: true if anything is patched now."""

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
    *, socket: bool = True, shutil: bool = True, pywsgi: bool = True, gunicorn: bool = True
) -> PatchResult:
    """Replace the names that gsplice has a faster way for; say which, and why not the others.

    *socket*: ``sendfile`` of gevent's socket class. *shutil*: ``shutil.copyfileobj``, and
    what the functions of shutil that copy whole files use. *pywsgi*:
    ``wsgi.file_wrapper`` and file responses of ``gevent.pywsgi``, as soon as that is imported.
    *gunicorn*: responses of its ``gevent`` worker that are a part of a file, in the same way.

    Call it at startup, before or after ``gevent.monkey.patch_all()``; calling it again patches only
    what is not patched yet. It creates no hub and no thread. Where the kernel or a sandbox refuses
    splice(2), and elsewhere than on Linux, it changes nothing. Raises nothing of its own. What it
    has done, if anything, the logger ``gsplice`` is told (INFO).
    """
    before = tuple(_patched)
    refusal = _refusal()
    not_patched: dict[str, str] = {}
    asked_for = {"socket": socket, "shutil": shutil, "pywsgi": pywsgi, "gunicorn": gunicorn}
    for name, wanted in asked_for.items():
        if name in _patched:
            reason = None
        elif not wanted:
            reason = str(_LATER[name]) if name in _awaited else "not asked for"
        elif refusal is not None:
            reason = refusal
        else:
            reason = _patch(name)
        if reason is not None:
            not_patched.update(dict.fromkeys(_NAMES[name], reason))
    patched = tuple(label for name in _patched for label in _NAMES[name])
    result = PatchResult(patched, MappingProxyType(not_patched))
    if refusal is not None or before != tuple(_patched):
        _log.info("%s", result)
    return result


def is_for_later(reason: str) -> bool:
    """Say whether *reason*, of :class:`PatchResult`, is that nobody has imported the module yet."""
    return reason in map(str, _LATER.values())


def unpatch_all() -> None:
    """Put every original back, as if :func:`patch_all` had never been called.

    A name that something else has wrapped since gets its original back all the same.
    """
    for name in _awaited:
        forget(_LATER[name].module)
    _awaited.clear()
    for target, names in _patched.values():
        saved = gevent.monkey.saved[target.__name__]
        for name in names:
            setattr(target, name, saved.pop(name))
        if not saved:
            del gevent.monkey.saved[target.__name__]
    _patched.clear()


_NAMES: Final = {
    "socket": ("socket.sendfile", "socket._sendfile_use_sendfile"),
    "shutil": tuple(f"shutil.{name}" for name in _shutil.__implements__),
    "pywsgi": ("pywsgi.WSGIHandler.get_environ", "pywsgi.WSGIHandler.process_result"),
    "gunicorn": ("gunicorn.GeventWorker.handle_request",),
}

#: What is going to be patched when its module is imported.
_awaited: Final[set[str]] = set()

#: What is patched: where, and which names.
_patched: Final[dict[str, tuple[ModuleType, list[str]]]] = {}


class _ClassAsModule(ModuleType):
    """A class, in the clothes that gevent's patching of modules expects."""

    def __init__(self, cls: type) -> None:
        super().__init__(f"{cls.__module__}.{cls.__qualname__}")
        self.__dict__["_cls"] = cls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._cls, name, value)


def _patch(name: str) -> str | None:
    """Patch *name* now, or have it patched when its module comes; return why it is not patched."""
    target: ModuleType
    source: Any
    if name == "socket":
        target, source = _ClassAsModule(GeventSocket), _socket
    elif name == "shutil":
        target, source = stdlib_shutil, _shutil
    else:
        later = _LATER[name]
        cls = getattr(sys.modules.get(later.module), later.cls, None)
        if cls is None:
            after_import(later.module, functools.partial(_patch_later, name))
            _awaited.add(name)
            return str(later)
        target, source = _ClassAsModule(cls), later.replacements(cls)
    if not gevent.monkey.patch_module(target, source):
        return "a subscriber to gevent's patching events forbade it"
    # What was there may have been somebody's wrapper.
    source.originals.update(gevent.monkey.saved[target.__name__])
    _patched[name] = target, source.__implements__
    return None


def _patch_later(name: str) -> None:
    """Patch *name*, whose module has just been imported."""
    _awaited.discard(name)
    if _patch(name) is None:
        _log.info("patched: %s", ", ".join(_NAMES[name]))


def _refusal() -> str | None:
    """Return why nothing can be spliced here, None if something can."""
    if not LINUX:
        return "needs splice(2), which only Linux has"
    try:
        _try_splice()
    except OSError as err:
        return f"splice(2) is refused here: {err.strerror}"
    return None


@functools.cache  # which keeps no error: there may only be no descriptor left at the moment
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
