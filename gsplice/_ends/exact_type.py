"""Whether an object is of exactly a known type, and does what that type does.

Nothing is imported to recognise a type: until somebody imports the module that defines it, there is
no object of that type.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from types import MethodDescriptorType
from typing import Any, Final, TypeVar

_Entry = TypeVar("_Entry")

_OF_CONTEXTLIB: Final = vars(contextlib)

#: An instance with one of these in its own dictionary may not do what its type does.
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
    """Return whether *obj* has no method of its own that reads or writes."""
    return FILE_METHODS.isdisjoint(obj.__dict__)


def by_name(cls: type, table: Mapping[tuple[str, str], _Entry]) -> _Entry | None:
    """Look up *cls* in *table* by its module and name, if that name in that module is *cls*."""
    try:
        entry = table.get((cls.__module__, cls.__name__))
    except TypeError:  # a name that can't be hashed
        return None
    if entry is not None and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        return entry
    return None


def methods_unchanged(obj: Any, *methods: str) -> bool:
    """Return whether none of *methods* was replaced, on the instance *obj* or on its class."""
    cls = type(obj)
    own: dict[str, Any] = getattr(obj, "__dict__", {})
    module = sys.modules.get(cls.__module__)
    if module is None or not own.keys().isdisjoint(methods):
        return False
    namespace = vars(module)
    for name in methods:
        method = getattr(cls, name, None)
        if method is None or isinstance(method, MethodDescriptorType):
            continue  # this version does not have it; or it is written in C
        found = getattr(method, "__globals__", None)
        # A method wrapped by @contextmanager is a function of contextlib.
        if found is not namespace and found is not _OF_CONTEXTLIB:
            return False
    return True
