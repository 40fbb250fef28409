"""Two ends for a test, and what shows that the bytes went inside the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from conftest import (
    receive_all,
)
from ends import FILES, GUARD, PIPES, SOCKETS, Ends, KiB, MiB

#: Many pipe-fuls, and no multiple of anything.
MANY = 3 * MiB + 7
#: The most that an object may have read ahead, and that may therefore go through memory.
READ_AHEAD = 256 * KiB


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with Ends(tmp_path) as made:
        yield made


@pytest.fixture
def small_ends(tmp_path: Path) -> Iterator[Ends]:
    """Ends whose sockets have little room, so that transfers wait."""
    with Ends(tmp_path, buffers=16 * KiB) as made:
        yield made


def assert_fast(grown: Any, source: str, sink: str, size: int) -> None:
    """Pass if *size* bytes went the way that suits the two ends."""
    assert grown.transfers == 1
    assert grown.fallbacks == {}
    if source in FILES:
        way = grown.bytes_spliced if sink in SOCKETS else grown.bytes_copy_file_range
        assert way == size
    else:
        assert grown.bytes_spliced + grown.bytes_copied == size
        assert grown.bytes_copied <= READ_AHEAD
    if source in PIPES or sink in PIPES or (source in FILES and sink in FILES):
        assert grown.pipes_created + grown.acquired_local + grown.acquired_global == 0


def rest_of(src: Any) -> bytes:
    return receive_all(src) if hasattr(src, "recv") else src.read()


def outcome(function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """Return the result of a call, or the class and number of its exception."""
    try:
        with gevent.Timeout(GUARD):
            return "returned", function(*args)
    except Exception as err:  # noqa: BLE001
        return type(err), getattr(err, "errno", None)
