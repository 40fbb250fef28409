"""The settings for users. Other numbers are, with their reasons, in the modules that use them.

gsplice reads each setting once, when it is imported, from the environment variable named after it.
Code can set it before the first transfer::

    from gsplice.config import settings
    settings.max_pipes = 64

A variable that is empty or invalid counts as not set. A :class:`RuntimeWarning`, the logger
``gsplice`` and ``python -m gsplice doctor`` say what is wrong with an invalid one. With
``-W error`` Python raises the warning.

``pipe_size`` (``GSPLICE_PIPE_SIZE``, 1048576)
    Capacity to ask for a new pipe, in bytes; at most 1 MiB, and less when many are open.
``max_pipes`` (``GSPLICE_MAX_PIPES``, 256)
    Most pipes open in the process. With 0, files go by sendfile(2), streams through memory.
``max_idle_hub`` (``GSPLICE_MAX_IDLE_HUB``, 16)
    Most idle pipes that one hub keeps for itself.
``max_idle`` (``GSPLICE_MAX_IDLE``, 64)
    Most idle pipes in the list that all hubs share.
``offload`` (``GSPLICE_OFFLOAD``, auto)
    Whether work that may wait for a disk goes to a thread: ``auto``, if the bytes are not in the
    page cache; ``never``, as unpatched; or ``always``, without asking the page cache.
``threads`` (``GSPLICE_THREADS``, 8)
    Most threads of one hub that wait for disks, made when first needed. One filesystem gets at
    most half of them, so that a slow one does not hold up the others.
``patch_all`` (``GSPLICE_PATCH_ALL``, false)
    Whether ``gevent.monkey.patch_all()`` also calls :func:`gsplice.patch_all`. Its argument
    ``gsplice``, True or False, overrides this. If the variable is set, the first gevent server that
    starts does so, too, unless the program has decided itself.
``report`` (``GSPLICE_REPORT``, 0)
    How often each process that has started a gevent server writes a line with its counters to the
    log of that server, in seconds; 0: never. Only the variable is looked at.
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


def _seconds(name: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= _MOST or isinstance(value, bool):
        raise ValueError(f"{name} must be a number of seconds from 0 to {_MOST}, not {value!r}")
    return number


def _policy(name: str, value: object) -> str:
    if value not in OFFLOAD_POLICIES:
        raise ValueError(f"{name} must be one of {', '.join(OFFLOAD_POLICIES)}, not {value!r}")
    return str(value)


def _boolean(name: str, value: object) -> bool:
    """Convert as gevent does (yes, true, on, 1, no, false, off, 0)."""
    try:
        return bool(validate_bool(value) if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{name} must be true or false, not {value!r}") from None


class Settings:
    """The settings; see the table at the top of this module.

    Assigning an invalid value raises :class:`ValueError`, which says what is wrong.
    """

    pipe_size: int
    max_pipes: int
    max_idle_hub: int
    max_idle: int
    offload: str
    threads: int
    patch_all: bool
    report: float

    _checks: Mapping[str, tuple[Callable[[str, object], Any], object]] = {
        "pipe_size": (_whole_number, 1 * MiB),
        "max_pipes": (_whole_number, 256),
        "max_idle_hub": (_whole_number, 16),
        "max_idle": (_whole_number, 64),
        "offload": (_policy, "auto"),
        "threads": (_at_least_one, 8),
        "patch_all": (_boolean, False),
        "report": (_seconds, 0.0),
    }

    def __init__(self, environ: Mapping[str, str]) -> None:
        values, wrong = self.read(environ)
        self.__dict__.update(values)
        for what in wrong.values():
            _say(what)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values that *environ* sets or the defaults, and the faults by variable."""
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
