"""The kinds of end that a transfer can have.

An end answers four questions: which descriptor (asked for again after every wait, since another
greenlet may have closed it and its number may be someone else's now), how to wait for it, what the
object has buffered, and how to leave the object when the kernel has moved bytes behind its back.
What an object really is, :mod:`gsplice._ends.recognise` finds out.
"""

from __future__ import annotations

from .file import File
from .pipe import CallersPipe
from .socket import Socket

End = File | Socket | CallersPipe
