"""Whether an object is of exactly a known type, and does what that type does.

Nothing is imported to recognise a type: as long as nobody has imported the module that defines it,
no object of it exists.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from types import MethodDescriptorType
from typing import Any, Final, TypeVar

_Entry = TypeVar("_Entry")

#: An instance that has one of these in its own dictionary does not do what its type does.
FILE_METHODS: Final = frozenset(
    {
        "read",
        "read1",
        "readinto",
        "readinto1",
        "readall",
        "peek",
        "write",
        "seek",
        "tell",
        "flush",
        "fileno",
    }
)


def overrides_nothing(obj: Any) -> bool:
    """Say whether the instance *obj* reads and writes as its type does."""
    return FILE_METHODS.isdisjoint(obj.__dict__)


def by_name(cls: type, table: Mapping[tuple[str, str], _Entry]) -> _Entry | None:
    """Return what *table* has under the module and name of *cls*, if that name leads to *cls*."""
    try:
        entry = table.get((cls.__module__, cls.__name__))
    except TypeError:  # a name that can't be hashed
        return None
    if entry is not None and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        return entry
    return None


def methods_unchanged(obj: Any, *methods: str) -> bool:
    """Say whether none of *methods* has been replaced, on the instance *obj* or on its class."""
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
