"""Small files by pywsgi and gunicorn, with gsplice and without: CPU time of the server a request.

Up to 64 KiB a file is read and sent by either side; what is measured is how much it costs to find
that out. All on connections that are kept, the server on one core and the client on another.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from _measure import KiB, Report, in_turns
from _servers import KINDS, Server, running
from _words import in_words
from small_responses import CONNECTIONS, Client

#: Each server without gsplice, and with it. Unpatched, pywsgi has no ``wsgi.file_wrapper``, and the
#: application's own loop reads 64 KiB at a time.
PAIRS = {
    "pywsgi": ("pywsgi, 64 KiB a piece", "gsplice, pywsgi"),
    "gunicorn": ("gunicorn gevent", "gsplice, gunicorn gevent"),
}

#: The sizes of the files, and the most that a request may take of unpatched's CPU time.
SIZES = {1 * KiB: 1.0, 4 * KiB: 1.0, 16 * KiB: 1.0, 64 * KiB: 1.0, 256 * KiB: 0.75}

CAUSE = (
    "To look at the response, the handler and the file costs 10 us of Python, and one segment "
    "instead of two saves less than that"
)
BIG = (
    "A file that fits the processor's cache is copied at 10 GB/s or more; the 25 us that this "
    "takes are what recognising file and socket costs"
)


class Found(NamedTuple):
    cpu: float
    rate: float


def main() -> None:
    report = Report(__doc__)
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu = cpus[0] if len(cpus) > 1 else None
    if server_cpu is None:
        report.leave_out("a core for the servers alone", "there is one only")
    os.sched_setaffinity(0, cpus[-1:])
    by_name = {kind.name: kind for kind in KINDS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        for size in SIZES:
            (folder / str(size)).write_bytes(os.urandom(size))
        (folder / "ready").write_bytes(b"ready")  # asked for until a server answers
        for server, pair in PAIRS.items():
            servers = {
                name: stack.enter_context(
                    running(by_name[name], folder, folder / f"{name}-scratch", server_cpu)
                )
                for name in pair
            }
            compare(report, server, pair, servers)
    os.sched_setaffinity(0, cpus)
    report.close()


def compare(report: Report, server: str, pair: tuple[str, str], servers: dict[str, Server]) -> None:
    rounds, seconds = report.pick((9, 0.4), (3, 0.2), (1, 0.01))
    rows = []
    for size, most in SIZES.items():
        with contextlib.ExitStack() as stack:

            def side(one: Server) -> Callable[[], Found]:
                sockets = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", one.port)))
                    for _ in range(CONNECTIONS)
                ]
                client = Client(one, str(size), sockets)  # noqa: B023
                return lambda: Found(*client.loaded(seconds))

            samples = in_turns({name: side(one) for name, one in servers.items()}, rounds)
        least, median = ([pick(s.cpu for s in samples[name]) for name in pair] for pick in PICKS)
        ratios = least[1] / least[0], median[1] / median[0]
        rows.append([in_words(size), *(1e6 * each for each in (*least, *median)), *ratios])
        report.hold_to(
            f"{server}, file of {in_words(size)}: CPU/unpatched, the better of least and median",
            min(ratios),
            most=most,
            cause=CAUSE if size <= 64 * KiB else BIG,
            cost=size <= 64 * KiB,
        )
    head = ["", "least us, unpatched", "gsplice", "median us, unpatched", "gsplice", "ratio", ""]
    report.table(f"{server}: CPU time a request, {rounds} rounds", head, rows)


def middle(numbers: object) -> float:
    ordered = sorted(numbers)  # type: ignore[call-overload]
    return float(ordered[len(ordered) // 2])


PICKS: tuple[Callable[..., float], Callable[..., float]] = (min, middle)


if __name__ == "__main__":
    main()
