"""Settings, and the policy of the pool with its reasons: the one place for both.

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
    Most pipes open in the process; with 0, only transfers that need no pipe are taken.
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

#: Capacity of a new pipe by how many are open already: (up to this many pipes, at most this many
#: bytes). An unprivileged user has 64 MiB of pipe room for all processes (``pipe-user-pages-soft``
#: in pipe(7), Linux 4.5: 16,384 pages). Filled to ``max_pipes`` these steps take
#: 16 x 1 MiB + 48 x 256 KiB + 192 x 64 KiB = 40 MiB of it.
CAPACITY_STEPS: Final = ((16, 1 * MiB), (64, 256 * KiB))

#: Past the last step a pipe has the kernel's default. One that is granted less has two slots (the
#: user's room is used up) and is not used: two system calls for 8 KiB cost more than read and send.
DEFAULT_CAPACITY: Final = 64 * KiB

#: Idle pipes that reclamation leaves open, in the whole process: enough for a quiet server's next
#: requests, two megabytes of pipe room at the most.
LOW_WATER: Final = 4

#: Seconds between two looks at the idle pipes while a hub runs. A pipe that was idle at two looks
#: in a row and not used between them is closed, so idle pipes live 10 to 20 seconds.
RECLAIM_PERIOD: Final = 10.0

#: Seconds for which the kernel is not asked for a pipe after it has refused one: that costs 12 us,
#: and where a user's room is used up each transfer would ask many times.
REFUSED_PERIOD: Final = 0.1

#: Most bytes that move between two chances for other greenlets. At the 5 GB/s seen on loopback this
#: takes 0.4 ms; giving way costs 5 us, under libuv 25.
PIECE: Final = 2 * MiB

#: A relay receives at most so much at once, as programs on gevent do; after a full read it splices,
#: which costs the same at 40 KB and half as much at 400 KB (benchmarks/relay.py).
READ: Final = 64 * KiB

#: A relay through methods counts what it has sent after each so many bytes: the most in a record of
#: TLS (RFC 8446, 5.1), which goes as a whole.
RECORD: Final = 16 * KiB

#: After so many fills in a row of less than READ it receives again. After one, the end of each big
#: message would be taken for the end of the stream.
SHORT_FILLS: Final = 2

#: A fill of less than this has most likely left nothing, so that the source is waited for: a
#: splice(2) in vain costs as much as giving way.
LULL: Final = 128 * KiB

#: A file with no more than this left goes by one read and one send: they cost less than sendfile(2)
#: up to 100 KiB or so (benchmarks/file_to_socket.py), and nothing about them can surprise. A plain
#: sendfile() reads so much without asking first how big the file is.
SMALL: Final = 64 * KiB

#: The largest body of an HTTP response, by its length, that its own read() gets: to a file in
#: memory this is where splice begins to cost less (benchmarks/download.py).
SMALL_BODY: Final = 1 * MiB

#: Most bytes of a file that a thread puts into a pipe at once, while as many more are read ahead.
#: More makes the first byte, and whoever queues for the thread, wait longer.
COLD_PIECE: Final = 1 * MiB

#: Most bytes that a thread moves from a socket to a file before it comes back. The way there and
#: back takes 0.3 ms of CPU time, and moving this much 3 ms (benchmarks/download.py).
PUMP: Final = 8 * MiB

#: What is in the page cache is asked of one page in so many bytes: a question costs 0.9 us, and
#: sendfile(2) of this much takes 55 us.
STRIDE: Final = 512 * KiB

#: Beyond what the kernel, and the threads, read ahead of a reader.
READ_AHEAD: Final = 4 * MiB

#: How much goes by a thread without asking where the disk was met first; doubled each time, so that
#: a file that is read from the disk from end to end is hardly ever asked about.
COLD_STRETCH: Final = 4 * MiB

#: Seconds for which an answer of the page cache is believed, and one about a filesystem's type: the
#: number of its device is another's only after it has been unmounted.
BELIEVED: Final = 1.0
TYPE_BELIEVED: Final = 1.0

#: A piece of more than this is written to a disk on a thread. The kernel makes a writer wait, up to
#: 200 ms, when too much is dirty, and looks once in 128 KiB or so (balance_dirty_pages()).
BIG_WRITE: Final = 64 * KiB

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
