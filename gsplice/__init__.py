"""Existing gevent servers move bytes without copying them through Python.

One call at startup, :func:`patch_all`, replaces ``socket.sendfile`` and ``shutil.copyfileobj`` with
versions that move the bytes inside the kernel and wait on the gevent hub.
"""

from __future__ import annotations

from . import config, pipes
from ._counters import Stats, stats
from ._move.copy import copy
from ._patches.shutil_copy import copyfileobj
from ._patches.socket_sendfile import sendfile
from ._relay.relay import RelayResult, relay
from .monkey import PatchResult, patch_all, unpatch_all

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
