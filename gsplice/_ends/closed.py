"""The error of a file that somebody has closed under way."""

from __future__ import annotations

from typing import Any


def check_open(end: Any) -> None:
    """Raise ValueError if the file behind *end* has been closed, in the words of its object."""
    if end.raw.closed:
        if end.is_sink:
            end.obj.write(b"")
        else:
            end.obj.read(1)
        raise ValueError("I/O operation on closed file.")
