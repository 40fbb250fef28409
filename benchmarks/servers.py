"""File servers: those with gsplice, unpatched ones, aiohttp, Go, nginx; each on a core of its own.

Files of 64 KiB and less are fetched by wrk. It copies every byte, at a GiB a second or so, so that
with bigger ones it would be what is measured: these are fetched by a client that has the kernel
drop them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _measure import GiB, KiB, MiB, Report, in_turns, medians
from _servers import HERE, Kind, Server, installed, running
from _words import in_words

#: Above this size the client drops what it gets.
WRK_UP_TO = 64 * KiB
#: What the pictures and the targets are about.
CONNECTIONS = 50


class Load(NamedTuple):
    """What a server has done under load, by the client's clock, and what that took of its core."""

    rate: float  # bytes per second
    requests: float  # per second
    cpu_per_request: float
    cpu_per_byte: float
    busy: float  # of its core
    errors: float


#: Fetches files from a server: (its port, connections) -> what the client says.
Client = Callable[[int, int], dict[str, Any]]
Medians = dict[str, Load]


def main() -> None:
    report = Report(__doc__)
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    if server_cpu is None:
        report.leave_out("a core for the server alone", "there is one only")
    place = os.environ.get("TMPDIR", "/var/tmp")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        folder = scratch / "files"
        folder.mkdir()
        (folder / "ready").write_bytes(b"ready")
        kinds = installed(report)
        servers: dict[str, Server] = {}
        for number, kind in enumerate(kinds):
            servers[kind.name] = stack.enter_context(
                running(kind, folder, scratch / str(number), server_cpu)
            )
        hot(report, kinds, servers, folder, client_cpu)
        cold(report, kinds, servers, folder, client_cpu)
        for kind in kinds:
            if kind.tells:
                stats = servers[kind.name].stats()
                assert stats["bytes_spliced"], f"{kind.name} has not used splice: {stats}"
    report.close()


def write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        left = size
        while left:
            left -= file.write(random.randbytes(min(left, MiB)))
        file.flush()
        os.fsync(file.fileno())  # or the disk would be written to meanwhile


def drop(paths: Sequence[Path]) -> None:
    """Have the page cache forget *paths*, which have been synced."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def pinned(cpu: int | None, command: Sequence[Any]) -> str:
    prefix = [] if cpu is None else ["taskset", "-c", str(cpu)]
    return subprocess.check_output([*prefix, *command], text=True)


def by_wrk(cpu: int | None, name: str, seconds: int) -> Client:
    def client(port: int, connections: int) -> dict[str, Any]:
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "-s", HERE / "wrk_as_json.lua"]
        said = pinned(cpu, ["wrk", *options, f"http://127.0.0.1:{port}/{name}"])
        return json.loads(said.rpartition("JSON ")[2])  # type: ignore[no-any-return]

    return client


def by_dropping(cpu: int | None, names: Sequence[str], seconds: float) -> Client:
    def client(port: int, connections: int) -> dict[str, Any]:
        command = [sys.executable, HERE / "_fetch.py", str(port), str(connections), str(seconds)]
        return json.loads(pinned(cpu, [*command, *names]))  # type: ignore[no-any-return]

    return client


def under_load(server: Server, client: Client, connections: int, size: int) -> Load:
    before = server.cpu()
    found = client(server.port, connections)
    cpu, seconds = server.cpu() - before, found["seconds"]
    # What a client has got of responses that were under way at the end counts, too.
    requests = found["requests"] if size <= WRK_UP_TO else found["bytes"] / size
    if found["errors"]:
        print(f"  {server.name}: {found['errors']} errors: {found['first error']}", flush=True)
    return Load(
        found["bytes"] / seconds,
        requests / seconds,
        cpu / (requests or 1),
        cpu / (found["bytes"] or 1),
        cpu / seconds,
        found["errors"],
    )


HEAD = [
    "",
    "MiB/s",
    "requests/s",
    "CPU us/request",
    "CPU s/GiB",
    "per cent busy",
    "speed/nginx",
    "errors",
]


def measure(
    report: Report,
    title: str,
    servers: dict[str, Server],
    side: Callable[[Server], Load],
    rounds: int,
) -> Medians:
    """Measure all servers in turns; print the table; return the medians."""
    samples = in_turns(
        {name: lambda server=server: side(server) for name, server in servers.items()},
        rounds,
        warm_up=0,
    )
    found = {name: medians(several) for name, several in samples.items()}
    base = found["nginx"].rate if "nginx" in found else float("nan")
    rows = [
        [
            name,
            load.rate / MiB,
            load.requests,
            load.cpu_per_request * 1e6,
            load.cpu_per_byte * GiB,
            round(100 * load.busy),
            load.rate / base,
            round(sum(each.errors for each in samples[name])),
        ]
        for name, load in found.items()
    ]
    report.table(f"{title}, median of {rounds} rounds", HEAD, rows)
    return found


def hot(
    report: Report,
    kinds: Sequence[Kind],
    servers: dict[str, Server],
    folder: Path,
    client_cpu: int | None,
) -> None:
    """All in the page cache."""
    sizes = report.pick(
        (KiB, 64 * KiB, MiB, 100 * MiB), (KiB, 64 * KiB, MiB, 100 * MiB), (KiB, MiB)
    )
    crowds = report.pick((1, CONNECTIONS, 500), (CONNECTIONS,), (CONNECTIONS,))
    rounds, seconds = report.pick((3, 1.0), (1, 0.4), (1, 0.05))
    found: dict[tuple[int, int], Medians] = {}
    has_wrk = shutil.which("wrk") is not None and not report.quick  # it knows whole seconds
    if not has_wrk:
        report.leave_out(
            "wrk", "there is none, or it takes too long: all is fetched by the client that drops"
        )
    for size in sizes:
        path = folder / str(size)
        write(path, size)
        for connections in crowds:
            client, by = by_dropping(client_cpu, [path.name], seconds), "dropped"
            if has_wrk and size <= WRK_UP_TO:
                client, by = by_wrk(client_cpu, path.name, max(1, round(seconds))), "by wrk"
            for server in servers.values():
                by_dropping(client_cpu, [path.name], 0)(server.port, 1)  # once, to be warm
            found[size, connections] = measure(
                report,
                f"Hot, {in_words(size)}, {connections} connections, {by}",
                servers,
                lambda server, c=client, n=connections, s=size: under_load(server, c, n, s),
                rounds,
            )
        path.unlink()
    pictures(report, kinds, found)
    targets(report, kinds, found)


def cold(
    report: Report,
    kinds: Sequence[Kind],
    servers: dict[str, Server],
    folder: Path,
    client_cpu: int | None,
) -> None:
    """Each file once, from the disk."""
    rounds = report.pick(3, 1, 1)
    for size, number in report.pick(
        ((64 * KiB, 400), (MiB, 200), (100 * MiB, 4)), ((MiB, 40),), ((64 * KiB, 2),)
    ):
        paths = [folder / f"{size}-{each}" for each in range(number)]
        for path in paths:
            write(path, size)
        client = by_dropping(client_cpu, [path.name for path in paths], 0)
        for connections in report.pick((1, 8), (8,), (2,)):

            def side(
                server: Server,
                paths: Any = paths,
                client: Any = client,
                n: int = connections,
                size: int = size,
            ) -> Load:
                drop(paths)
                return under_load(server, client, n, size)

            title = f"Cold, {number} files of {in_words(size)}, {connections} connections"
            measure(report, title, servers, side, rounds)
        for path in paths:
            path.unlink()


def pictures(report: Report, kinds: Sequence[Kind], found: dict[tuple[int, int], Medians]) -> None:
    ours = [kind.name for kind in kinds if kind.is_ours]
    crowd = {size: by for (size, connections), by in found.items() if connections == CONNECTIONS}
    big = {size: by for size, by in crowd.items() if size > KiB}

    def panels(of: dict[Any, Medians], value: Callable[[Load], float]) -> Any:
        return {
            key if isinstance(key, str) else in_words(key): {
                name: value(load) for name, load in by.items()
            }
            for key, by in of.items()
        }

    report.bars(
        "servers",
        f"File servers on one core, {CONNECTIONS} connections: throughput by size of the file",
        "GiB per second (more is better)",
        panels(big, lambda load: load.rate / GiB),
        ours,
    )
    report.bars(
        "servers_cpu",
        f"File servers, {CONNECTIONS} connections: CPU time by size of the file",
        "CPU seconds per GiB (less is better)",
        panels(big, lambda load: load.cpu_per_byte * GiB),
        ours,
    )
    small = {
        f"{connections} connection{'s' if connections > 1 else ''}": by
        for (size, connections), by in found.items()
        if size == KiB
    }
    report.bars(
        "servers_small",
        "File servers on one core: files of 1 KiB",
        "requests per second (more is better)",
        panels(small, lambda load: load.requests),
        ours,
    )


#: Servers that people have, with gsplice switched on: what is promised is promised of these.
HELD = ("gsplice, pywsgi", "gsplice, gunicorn gevent")

REQUEST = (
    "A request costs pywsgi and gunicorn 150 to 200 us of Python; nginx needs 20 us for one, and "
    "Go 40, with all that the kernel does"
)
SMALL = (
    "A request costs these servers 140 to 170 us of Python already; to know the file, the socket "
    "and what is in the page cache adds 20 us, which the 10 us that reading and sending 64 KiB "
    "costs can't make up for"
)
CHUNKS = (
    "gsplice sends 2 MiB at a time and lets other greenlets run then; in pieces of 16 MiB the "
    "throughput was 10 % higher, asyncio's sendfile has no such limit"
)

CAUSES = {64 * KiB: SMALL, MiB: REQUEST, 100 * MiB: CHUNKS}


def targets(report: Report, kinds: Sequence[Kind], found: dict[tuple[int, int], Medians]) -> None:
    """Hold ours to the others: by throughput, and by what a second of their core gets done.

    The second is what remains comparable when the machine has other things to do, or the client is
    what a server waits for.
    """
    crowd = {size: by for (size, connections), by in found.items() if connections == CONNECTIONS}
    python = [kind.name for kind in kinds if kind.is_python and not kind.is_ours]
    measures: dict[str, Callable[[Load], float]] = {
        "speed": lambda load: load.rate,
        "bytes per CPU second": lambda load: 1 / load.cpu_per_byte,
    }
    for size, least in ((100 * MiB, 0.9), (MiB, 0.5)):
        by = crowd.get(size, {})
        for ours in HELD:
            for what, value in measures.items():
                if ours in by and "nginx" in by:
                    title = f"{ours}, {in_words(size)}: {what}/nginx"
                    ratio = value(by[ours]) / value(by["nginx"])
                    report.hold_to(title, ratio, least=least, cause=CAUSES[size])
    for size, by in crowd.items():
        rivals = [name for name in by if name in python]
        if size == 100 * MiB and "Go http.FileServer" in by:
            rivals.append("Go http.FileServer")
        for ours in HELD:
            for what, value in measures.items():
                if ours in by and rivals and size >= WRK_UP_TO:
                    best = max(rivals, key=lambda name: value(by[name]))
                    title = f"{ours}, {in_words(size)}: {what}/the best of the others ({best})"
                    ratio = value(by[ours]) / value(by[best])
                    report.hold_to(title, ratio, least=1, cause=CAUSES.get(size, ""))


if __name__ == "__main__":
    main()
