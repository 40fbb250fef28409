"""What there is without gsplice, to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gevent.monkey import get_original

import gsplice

unpatched_copyfileobj = get_original("shutil", "copyfileobj")


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Have nothing patched in the block."""
    gsplice.unpatch_all()
    try:
        yield
    finally:
        gsplice.patch_all()
