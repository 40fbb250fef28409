"""What a user can set. Other numbers stand, with their reasons, in the module that they tune.

A setting is read once, when gsplice is imported, from the environment variable named after it, and
can be set in code before the first transfer::

    from gsplice.config import settings
    settings.max_pipes = 64

A variable that is empty counts as not set, and so does one that makes no sense: what is wrong with
it is said by a :class:`RuntimeWarning`, to the logger ``gsplice``, and by ``python -m gsplice
doctor``. Whoever has Python raise its warnings (``-W error``) gets this one raised, too.

``pipe_size`` (``GSPLICE_PIPE_SIZE``, 1048576)
    Capacity asked for a new pipe, in bytes; never more than 1 MiB, and less as more are open.
``max_pipes`` (``GSPLICE_MAX_PIPES``, 256)
    Most pipes open in the process; with 0, what needs a pipe goes another
    way: files by sendfile(2), streams through memory.
``max_idle_hub`` (``GSPLICE_MAX_IDLE_HUB``, 16)
    Most idle pipes that one hub keeps for itself.
``max_idle`` (``GSPLICE_MAX_IDLE``, 64)
    Most idle pipes in the list that all hubs share.
``offload`` (``GSPLICE_OFFLOAD``, auto)
    Whether work that may wait for a disk goes to a thread: ``auto``, when the page cache does not
    have what is wanted; ``never``, as unpatched; or ``always``, without asking the page cache.
``threads`` (``GSPLICE_THREADS``, 8)
    Most threads of one hub that wait for disks, made when first needed. One filesystem gets half
    of them, so that a slow one does not hold up the others.
``patch_all`` (``GSPLICE_PATCH_ALL``, false)
    Whether ``gevent.monkey.patch_all()`` also calls :func:`gsplice.patch_all`, unless it is told
    ``gsplice=False``; with ``gsplice=True`` it does so in any case.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from gevent._config import validate_bool

KiB: Final = 1024
MiB: Final = 1024 * KiB

OFFLOAD_POLICIES: Final = ("auto", "never", "always")


#: No setting needs more, and gevent counts threads in 31 bits.
_MOST: Final = 1 << 30


def _whole_number(name: str, value: object) -> int:
    try:
        number = int(value) if isinstance(value, (int, str)) else -1
    except ValueError:
        number = -1
    if number < 0 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number from 0 up, not {value!r}")
    if number > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, not {value!r}")
    return number


def _at_least_one(name: str, value: object) -> int:
    number = _whole_number(name, value)
    if not number:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return number


def _policy(name: str, value: object) -> str:
    if value not in OFFLOAD_POLICIES:
        raise ValueError(f"{name} must be one of {', '.join(OFFLOAD_POLICIES)}, not {value!r}")
    return str(value)


def _boolean(name: str, value: object) -> bool:
    """Follow gevent's own rule for booleans (yes, true, on, 1, no, false, off, 0)."""
    try:
        return bool(validate_bool(value) if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{name} must be true or false, not {value!r}") from None


class Settings:
    """What can be set; see the table at the top of this module.

    Assigning a value that makes no sense raises :class:`ValueError`, saying which and why.
    """

    pipe_size: int
    max_pipes: int
    max_idle_hub: int
    max_idle: int
    offload: str
    threads: int
    patch_all: bool

    _checks: Mapping[str, tuple[Callable[[str, object], Any], object]] = {
        "pipe_size": (_whole_number, 1 * MiB),
        "max_pipes": (_whole_number, 256),
        "max_idle_hub": (_whole_number, 16),
        "max_idle": (_whole_number, 64),
        "offload": (_policy, "auto"),
        "threads": (_at_least_one, 8),
        "patch_all": (_boolean, False),
    }

    def __init__(self, environ: Mapping[str, str]) -> None:
        values, wrong = self.read(environ)
        self.__dict__.update(values)
        for what in wrong.values():
            _say(what)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what *environ* sets, or the defaults; and what is wrong with which variables."""
        values: dict[str, Any] = {}
        wrong: dict[str, str] = {}
        for name, (check, default) in cls._checks.items():
            variable = f"GSPLICE_{name.upper()}"
            values[name] = default
            value = environ.get(variable, "").strip()
            if value:
                try:
                    values[name] = check(variable, value)
                except ValueError as err:
                    wrong[variable] = f"{err}; it counts as not set"
        return values, wrong

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._checks:
            raise AttributeError(f"gsplice has no setting {name!r}; see gsplice.config")
        self.__dict__[name] = self._checks[name][0](name, value)


def _say(what: str) -> None:
    logging.getLogger("gsplice").warning("%s", what)
    warnings.warn(what, RuntimeWarning, stacklevel=2)


settings: Final = Settings(os.environ)
