"""The error for a file that was closed during a transfer."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_closed(end: Any) -> NoReturn:
    """Raise the ValueError that the object of *end*, whose file has been closed, would raise."""
    if end.is_sink:
        end.obj.write(b"")
    else:
        end.obj.read(1)
    raise ValueError("I/O operation on closed file.")
