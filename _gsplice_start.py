"""What Python runs at its start, before the program, where GSPLICE_PATCH_ALL or GSPLICE_REPORT is
set: ``gsplice.pth`` imports it.

It is not inside the package, because importing ``gsplice.anything`` imports gevent, and nothing may
be imported before the program's own ``gevent.monkey.patch_all()``. So it waits: for a gevent server
to start, or a gunicorn worker to have loaded its application. By then the program has patched what
it wants patched. What is done then is in :mod:`gsplice._report`.
"""

from __future__ import annotations

import os
import sys

from _gsplice_after_import import after_import

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def begin() -> None:
    """Wait for servers, if a variable says so: once, however often it is called."""
    for module, then in (
        ("gevent.baseserver", _watch_servers),
        ("gunicorn.workers.base", _watch_workers),
    ):
        if module in _watched or not (_wants("GSPLICE_PATCH_ALL") or _wants("GSPLICE_REPORT")):
            continue
        _watched.add(module)
        if module in sys.modules:
            then()
        else:
            after_import(module, then)


_watched: set[str] = set()


def _wants(variable: str) -> bool:
    """Say whether *variable* has a value, sensible or not, that does not mean "no"."""
    value = os.environ.get(variable, "").strip().lower()
    return value not in ("", "0", "no", "false", "off")


def _watch_servers() -> None:
    server_class = sys.modules["gevent.baseserver"].BaseServer

    def with_start(start: Callable[..., Any]) -> Callable[..., Any]:
        def start_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _nothing_to_do():
                return start(self, *args, **kwargs)
            from gsplice import _report

            if not _overruled():
                _report.switch_on()
            result = start(self, *args, **kwargs)
            _report.server_started(self)
            return result

        return start_and_tell

    _wrap(server_class, "start", with_start)


def _watch_workers() -> None:
    worker_class = sys.modules["gunicorn.workers.base"].Worker

    def with_load(load_wsgi: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = load_wsgi(self, *args, **kwargs)
            if not _serves_by_gevent(self):
                self.log.warning(
                    "gsplice does nothing here: gunicorn's %s does not use gevent. Start gunicorn"
                    " with -k gevent, or unset GSPLICE_PATCH_ALL and GSPLICE_REPORT.",
                    type(self).__name__,
                )
            elif not _nothing_to_do():
                from gsplice import _report

                if not _overruled():
                    _report.switch_on()
                _report.worker_ready(self)
            return result

        return load_and_tell

    _wrap(worker_class, "load_wsgi", with_load)


def _wrap(cls: Any, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    original = getattr(cls, name)
    replacement = wrapper(original)
    replacement.__doc__ = original.__doc__
    replacement.__name__ = original.__name__
    replacement.__qualname__ = original.__qualname__
    setattr(cls, name, replacement)


def _serves_by_gevent(worker: Any) -> bool:
    """Say whether *worker* is gunicorn's gevent worker, or its process is patched by gevent."""
    ggevent = sys.modules.get("gunicorn.workers.ggevent")
    if ggevent is not None and isinstance(worker, ggevent.GeventWorker):
        return True
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def _overruled() -> bool:
    """Say whether the program has called gevent's ``patch_all(gsplice=False)``."""
    plugin = sys.modules.get("_gsplice_plugin")
    return plugin is not None and bool(plugin.overruled)


def _nothing_to_do() -> bool:
    """Say whether gsplice need not even be imported."""
    return _overruled() and "gsplice" not in sys.modules and not _wants("GSPLICE_REPORT")


begin()
