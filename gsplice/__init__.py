"""Existing gevent servers move bytes without copying them through Python.

One call at startup, :func:`patch_all`, replaces ``socket.sendfile`` and ``shutil.copyfileobj`` with
versions that move the bytes inside the kernel and wait on the gevent hub.
"""

from __future__ import annotations

from . import config, pipes
from ._copy import copy
from ._shutil import copyfileobj
from ._socket import sendfile
from ._stats import Stats, stats
from .monkey import PatchResult, patch_all, unpatch_all
from .relay import RelayResult, relay

__all__ = [
    "PatchResult",
    "RelayResult",
    "Stats",
    "config",
    "copy",
    "copyfileobj",
    "patch_all",
    "pipes",
    "relay",
    "sendfile",
    "stats",
    "unpatch_all",
]
