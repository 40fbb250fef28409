"""A transfer in a process of its own, some of whose system calls strace makes fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from ends import GUARD, MiB
from paths import PYTHONPATH

# ---- system calls made to fail by strace, in a process of its own: answers that are no errors of
# the ends. All the others are in faults/test_errors.py.

PROGRAM = """
import json, os, sys
from pathlib import Path
import gevent
import gsplice  # not patched: patch_all() tries splice() once, and would get the failure
from conftest import open_descriptors, some_bytes
from ends import Ends, until

source, sink, size, directory = sys.argv[1:]
data = some_bytes(int(size))
gevent.sleep(0)
before = open_descriptors()
with Ends(Path(directory)) as ends:
    src = ends.source(source, data)
    dst, finish = ends.sink(sink)
    try:
        with gevent.Timeout(20):
            if sink.startswith("bare") and source == "file":
                result = gsplice.sendfile(dst, src)
            else:
                result = gsplice.copy(src, dst)
        failed = None
    except OSError as err:
        result, failed = None, err.errno
    position = src.tell() if source == "file" else None
    written = dst.tell() if sink == "file" else None
    arrived = finish()
stats = gsplice.stats().as_dict()
print(json.dumps({
    "result": result,
    "failed": failed,
    "position": position,
    "written": written,
    "arrived": len(arrived),
    "prefix": data.startswith(arrived),
    "leaked": open_descriptors() - before - 2 * stats["pipes_idle"],
    **stats,
}))
"""

SIZE = 12 * MiB  # at least five calls, whichever way


def traced(
    directory: Path,
    source: str,
    sink: str,
    *options: str,
    size: int = SIZE,
    environ: dict[str, str] | None = None,
) -> tuple[SimpleNamespace, list[str]]:
    """Run a transfer under strace; return what the program said, and the trace."""
    log = directory / "strace.log"
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", str(log), *options]
    command += [sys.executable, "-c", PROGRAM, source, sink, str(size), str(directory)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=GUARD * 2,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **(environ or {})},
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**json.loads(done.stdout)), log.read_text().splitlines()
