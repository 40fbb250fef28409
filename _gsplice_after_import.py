"""Calling a function as soon as somebody else has imported a module.

It is not inside the package, and imports nothing, because :mod:`_gsplice_start` uses it before the
program has begun.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Final

#: The function to call, by the name of the module.
_waiting: Final[dict[str, Callable[[], None]]] = {}


def after_import(module: str, then: Callable[[], None]) -> None:
    """Call *then*, once, when *module* has been imported. On entry nobody has imported it."""
    _waiting[module] = then
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def forget(module: str) -> None:
    """Take back :func:`after_import`, if *module* has not been imported yet."""
    _waiting.pop(module, None)
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder:
    """Asks the other finders for a module that is waited for, and wraps their loader in ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is waited for, with our loader; else None.

        Also None if a finder or the loader is of the old kind, without ``find_spec`` or
        ``exec_module``: then the import goes on without us, and nothing is called.
        """
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            if not hasattr(finder, "find_spec"):
                return None
            spec: Any = finder.find_spec(fullname, path, target)
            if spec is not None:
                if not hasattr(spec.loader, "exec_module"):
                    return None
                spec.loader = _Loader(spec.loader)
                return spec  # type: ignore[no-any-return]
        return None


class _Loader:
    """Wraps another loader, which is not changed: others may have wrapped it, too."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Do what the loader does."""
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Do what the loader does, then call the function. Lets out what the module raises."""
        spec: Any = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        then = _waiting.get(module.__name__)
        if then is not None:
            forget(module.__name__)
            then()


_finder: Final[Any] = _Finder()
