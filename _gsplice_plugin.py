"""What gevent calls at the end of ``gevent.monkey.patch_all()``: the entry point of gsplice.

It is not inside the package, because gevent imports it in every program, also where gsplice is
installed and not wanted; importing ``gsplice.anything`` imports all of gsplice.
"""

from __future__ import annotations

import logging  # as gevent.monkey does
import os
import sys
import warnings

from gevent._config import validate_bool
from gevent.events import GeventDidPatchBuiltinModulesEvent

#: Whether gevent.monkey.patch_all() has been called with gsplice=False, the last time.
overruled = False


def did_patch_builtins(event: GeventDidPatchBuiltinModulesEvent) -> None:
    """Call ``gsplice.patch_all()`` if that is wanted.

    ``gevent.monkey.patch_all(gsplice=...)`` decides, or else the setting ``patch_all``. Called
    again when gevent patches more. If ``GSPLICE_PATCH_ALL`` is neither true nor false, it counts as
    not set, and a :class:`RuntimeWarning` and the logger ``gsplice`` say so. RuntimeWarning, too,
    if nothing can be patched, since nobody sees the result. Where Python raises its warnings, they
    go to whoever called ``gevent.monkey.patch_all()``.
    """
    global overruled
    wanted = event.patch_all_kwargs.get("gsplice")
    overruled = wanted is not None and not wanted
    if not (_setting() if wanted is None else wanted):
        return
    import _gsplice_start
    import gsplice

    _gsplice_start.begin()  # where Python has not read gsplice.pth
    result = gsplice.patch_all()
    if not result:
        warnings.warn(f"gsplice patched nothing: {result}", RuntimeWarning, stacklevel=2)


def _setting() -> bool:
    """Return ``gsplice.config.settings.patch_all``, without importing gsplice for it."""
    config = sys.modules.get("gsplice.config")
    if config is not None:
        return bool(config.settings.patch_all)
    value = os.environ.get("GSPLICE_PATCH_ALL", "").strip()
    try:
        return bool(validate_bool(value))
    except ValueError:
        what = f"GSPLICE_PATCH_ALL must be true or false, not {value!r}; it counts as not set"
        logging.getLogger("gsplice").warning("%s", what)
        warnings.warn(what, RuntimeWarning, stacklevel=3)
        return False
