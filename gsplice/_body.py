"""The body of an HTTP message as an end: bytes on a socket, of which so many belong to it.

What gives the body (a client's response, a server's ``wsgi.input``) knows how many bytes are left.
Only as many are taken, and its count is kept true with each piece. What else happens at the end of
a body differs from one to the other, so whoever has moved the bytes goes on with the object's own
``read()``, which has nothing left to give, or tells what is wrong.
"""

from __future__ import annotations

import contextlib
import sys
from types import MethodDescriptorType
from typing import Any

from .endpoints import Socket


class Body(Socket):
    """What is left of a body. Subclasses say how much that is, and count what is taken."""

    __slots__ = ()

    must_read_on = True

    def read_ahead(self, most: int | None) -> bytes:
        """Take what the object has read ahead, *most* bytes of it. Neither reads nor waits."""
        left = self.left()
        data = super().read_ahead(left if most is None else min(left, most))
        self.took(len(data))
        return data

    def receive(self, most: int) -> bytes:
        """Receive what is there, without waiting. Raises BlockingIOError if nothing is.

        Of the socket's other errors, raises what :meth:`failed` makes of them.
        """
        try:
            data = super().receive(most)
        except BlockingIOError:
            raise
        except OSError as err:
            self.failed(err)
        self.took(len(data))
        return data


def reads_as_written(obj: Any, *methods: str) -> bool:
    """Say whether *obj* has *methods* as its module defines them in its class.

    Neither the instance nor anybody who has replaced one in the class reads in another way.
    """
    cls = type(obj)
    own: dict[str, Any] = getattr(obj, "__dict__", {})
    module = sys.modules.get(cls.__module__)
    if module is None or not own.keys().isdisjoint(methods):
        return False
    # What @contextmanager has wrapped is a function of contextlib's.
    namespaces = vars(module), vars(contextlib)
    for name in methods:
        method = getattr(cls, name, None)
        if method is None or isinstance(method, MethodDescriptorType):
            continue  # a version does not have it; or it is written in C
        if not any(getattr(method, "__globals__", None) is each for each in namespaces):
            return False
    return True
