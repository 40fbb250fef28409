"""The kinds of end that a transfer can have.

An end answers four questions: which descriptor to use (asked after every wait, since meanwhile
another greenlet may have closed it, and its number may be another file's), how to wait for it, what
the object has buffered, and how to correct the object's state when the kernel has moved bytes.
:mod:`gsplice._ends.recognise` decides which kind of end an object is.
"""

from __future__ import annotations

from .file import File
from .pipe import CallersPipe
from .socket import Socket

End = File | Socket | CallersPipe
