"""Objects and what they are recognised as."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from bench import Bench
from conftest import some_bytes
from kinds import FILE, PIPE, SOCKET

from gsplice._ends import file, pipe
from gsplice._ends import socket as socket_end
from gsplice._ends.recognise import NotOurs

ENDS = {FILE: file.File, SOCKET: socket_end.Socket, PIPE: pipe.CallersPipe}

BIG = some_bytes(5 << 20)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with gevent.Timeout(60), Bench(tmp_path) as fresh:
        yield fresh


def role(recognised: Callable[[Any], Any], obj: Any) -> str:
    """Return what *obj* is taken for, or the reason why it is not taken."""
    try:
        end = recognised(obj)
    except NotOurs as reason:
        return reason.args[0]
    return next(name for name, cls in ENDS.items() if type(end) is cls)
