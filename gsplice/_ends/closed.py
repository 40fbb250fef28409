"""The error for a file that was closed during a transfer."""

from __future__ import annotations

from typing import Any


def check_open(end: Any) -> None:
    """Raise ValueError if the file of *end* has been closed: the error its object would raise."""
    if end.raw.closed:
        if end.is_sink:
            end.obj.write(b"")
        else:
            end.obj.read(1)
        raise ValueError("I/O operation on closed file.")
