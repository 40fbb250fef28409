"""``python -m gsplice doctor``: what it says is so; what is wrong, it finds and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program
from slowfs import SlowFS

DOCTOR = [sys.executable, "-m", "gsplice", "doctor", "--json"]


class Report:
    """What the doctor said, by subject."""

    def __init__(self, command: list[str], code: int, **environ: str) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | environ
        )
        assert (done.returncode, done.stderr) == (code, ""), done.stdout
        said = json.loads(done.stdout)
        self.fine = said["fine"]
        self.findings: dict[str, dict[str, Any]] = {
            each["subject"]: each for each in said["findings"]
        }
        assert len(self.findings) == len(said["findings"])
        assert self.fine == (code == 0)
        assert all(each["to_do"] for each in self.findings.values() if each["status"] != "ok")

    def attention(self) -> list[str]:
        return [name for name, each in self.findings.items() if each["status"] == "attention"]


def test_here_all_is_fine_and_nothing_is_left_behind(tmp_path: Path) -> None:
    report = Report([*DOCTOR, str(tmp_path), "/dev/shm"], 0)
    assert report.attention() == []
    for name in ("splice", "sendfile", "copy_file_range", "what is patched", "transfer"):
        assert report.findings[name]["status"] == "ok"
    assert "/dev/shm (tmpfs): page cache" in report.findings
    assert "inside the kernel" in report.findings["transfer"]["found"]
    assert os.listdir(tmp_path) == []


def test_for_people(tmp_path: Path) -> None:
    command = [*DOCTOR[:-1], str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.startswith("gsplice ")
    words = " ".join(done.stdout.split())
    assert f" ATTENTION {tmp_path}/nowhere: cannot be examined: No such file" in words
    assert done.stdout.endswith("\n1 needs attention.\n")


def test_called_wrongly() -> None:
    done = subprocess.run([*DOCTOR, "--nonsense"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: gsplice doctor ")


@pytest.mark.parametrize(
    ("call", "subjects"),
    [
        ("splice", {"splice", "{}: splice", "patch_all()"}),
        ("sendfile", {"sendfile", "{}: splice", "transfer"}),
        ("copy_file_range", {"copy_file_range"}),
    ],
)
def test_what_a_sandbox_refuses(tmp_path: Path, call: str, subjects: set[str]) -> None:
    (tmp_path / "file").write_bytes(b"x")
    path = str(tmp_path / "file")
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={call}:error=EPERM"]
    report = Report([*strace, *DOCTOR, path], 1)
    kind = next(name for name in report.findings if name.startswith(path)).split(":")[0]
    assert set(report.attention()) >= {subject.format(kind) for subject in subjects - {"transfer"}}
    assert "seccomp" in report.findings[call]["to_do"]


def test_a_path_that_can_only_be_read(tmp_path: Path) -> None:
    script = f"""
mount -t tmpfs none {tmp_path} && mkdir {tmp_path}/sub && echo x > {tmp_path}/sub/file
mount -o remount,ro {tmp_path} && exec "$@"
"""
    report = Report(["unshare", "-m", "sh", "-ec", script, "sh", *DOCTOR, str(tmp_path)], 0)
    kind = f"{tmp_path} (tmpfs, read-only)"
    assert report.findings[f"{kind}: splice"]["status"] == "ok"
    assert "in memory" in report.findings[f"{kind}: page cache"]["found"]
    assert f"{kind}: copy_file_range" not in report.findings


def test_fuse(tmp_path: Path) -> None:
    with SlowFS(tmp_path) as slow:
        empty = Report([*DOCTOR, str(slow.mount)], 0)
        assert "no file found" in empty.findings[str(slow.mount)]["found"]
        (slow.directory / "file").write_bytes(b"x" * 10_000)
        report = Report([*DOCTOR, str(slow.mount / "file")], 0)  # it can't be listed, either
        assert os.listdir(slow.directory) == ["file"]
    kind = next(name for name in report.findings if name.startswith(str(slow.mount))).split(":")[0]
    assert "(fuse" in kind
    finding = report.findings[f"{kind}: page cache"]
    assert "every piece goes by a thread" in finding["found"]
    assert "GSPLICE_THREADS" in finding["to_do"]
    assert report.findings[f"{kind}: splice"]["status"] == "ok"


def test_fuse_that_wants_to_be_asked_each_time(tmp_path: Path) -> None:
    with SlowFS(tmp_path, "--direct-io") as slow:
        (slow.directory / "file").write_bytes(b"x" * 10_000)
        [subject] = Report([*DOCTOR, str(slow.mount / "file")], 1).attention()
    assert subject.startswith(str(slow.mount)) and subject.endswith(": splice")


def test_a_directory_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as closed:  # nobody else's
        run_program(f"""
import os
from gsplice._doctor import findings as _findings
[*_findings.examine(["/"])]  # which imports what the user may not be able to read
os.setgroups([])
os.setuid(65534)
finding, = _findings._path({closed!r})
assert finding.attention
assert "Permission denied" in finding.found, finding
""")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    report = Report([*DOCTOR, str(tmp_path / "fifo")], 1)
    assert "neither a directory nor" in report.findings[str(tmp_path / "fifo")]["found"]


def test_a_wrong_name_and_a_policy_in_the_environment(tmp_path: Path) -> None:
    report = Report([*DOCTOR, str(tmp_path)], 1, GSPLICE_MAXPIPES="7", GSPLICE_OFFLOAD="never")
    assert report.attention() == ["settings: GSPLICE_MAXPIPES"]
    assert "GSPLICE_MAX_PIPES" in report.findings["settings: GSPLICE_MAXPIPES"]["to_do"]
    assert report.findings["settings"]["found"] == "GSPLICE_OFFLOAD=never"
    page_cache = next(name for name in report.findings if name.endswith("page cache"))
    assert report.findings[page_cache]["status"] == "note"


def test_variables_that_make_no_sense() -> None:
    wrong = {"GSPLICE_MAX_PIPES": "abc", "GSPLICE_THREADS": "0", "GSPLICE_PATCH_ALL": "perhaps"}
    ignored = ["-W", "ignore::RuntimeWarning"]
    quiet = [DOCTOR[0], *ignored, "-c", QUIET, *DOCTOR[3:]]
    report = Report(quiet, 1, **wrong, GSPLICE_MAX_IDLE="7")
    assert report.attention() == [f"settings: {name}" for name in wrong]
    assert report.findings["settings: GSPLICE_MAX_PIPES"]["found"] == (
        "GSPLICE_MAX_PIPES must be a whole number from 0 up, not 'abc'; it counts as not set"
    )
    assert report.findings["settings"]["found"] == "GSPLICE_MAX_IDLE=7"


#: The doctor alone is to speak.
QUIET = """
import logging, runpy
logging.getLogger("gsplice").addHandler(logging.NullHandler())
runpy.run_module("gsplice", run_name="__main__", alter_sys=True)
"""


def test_as_many_pipes_as_can_be_asked_for() -> None:
    report = Report(DOCTOR, 1, GSPLICE_MAX_PIPES=str(1 << 30))
    assert report.attention() == ["descriptors"]
    assert report.findings["pipe room"]["found"].startswith(f"{1 << 30} transfers at a time")


def test_too_few_descriptors() -> None:
    limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *DOCTOR]
    report = Report(limited, 1)
    assert report.attention() == ["descriptors"]


def test_a_pipe_smaller_than_the_limit_of_the_system_allows() -> None:
    assert Report(DOCTOR, 0, GSPLICE_PIPE_SIZE="65536").findings["pipe capacity"]["found"] == (
        "a new pipe got the 64 KiB that it asked for"
    )


#: Becomes an ordinary user of whom nobody else has pipes.
ORDINARY = """
import os, random, resource, sys
import gsplice
from gsplice import pipes
from gsplice._doctor import findings as _findings, trials as _trials
from gsplice._pool.idle import idle_lists
[*_findings.examine(["/"])]  # which imports what the user may not be able to read
for idle in idle_lists():
    while idle:
        idle.pop().close()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
os.setgroups([])
os.setuid(random.randrange(100_000, 1_000_000))
soft, hard = (_trials.pipe_limit("user-pages-" + which) for which in ("soft", "hard"))
gsplice.config.settings.max_pipes = 2000
"""


def test_an_ordinary_user_gets_as_many_pipes_as_it_says() -> None:
    run_program(f"""{ORDINARY}
finding = _findings._pipe_room(soft, hard, _trials.is_exempt())
assert finding.attention
said = int(finding.found.split()[0])
had = []
while (pipe := pipes.acquire()) is not None:
    had.append(pipe)
assert len(had) == said, (len(had), said, finding)
assert 0 < said < 2000
assert f"GSPLICE_MAX_PIPES={{said}}." in finding.to_do, finding
gsplice.config.settings.max_pipes = said
for pipe in had:
    pipe.close()
assert not _findings._pipe_room(soft, hard, False).attention
assert _findings._pipe_room(soft, hard, True).found.startswith(f"{{said}} transfers")
""")


def test_an_ordinary_user_whose_room_is_used_up() -> None:
    run_program(f"""{ORDINARY}
had = []
while (pipe := pipes.acquire()) is not None:
    had.append(pipe)
findings = {{finding.subject: finding for finding in _findings._pipes()}}
assert findings["pipe capacity"].attention, findings
assert "used up" in findings["pipe capacity"].found, findings
for pipe in had:
    pipe.close()
findings = {{finding.subject: finding for finding in _findings.examine(["/"])}}
assert not findings["pipe capacity"].attention, findings
assert not findings["transfer"].attention, findings
assert findings["pipe room"].attention  # of 2,000
assert gsplice.stats().pipes_in_use == 0
""")


def test_what_was_patched_before_stays_so_and_nothing_else_does() -> None:
    run_program("""
import shutil, gsplice
from gsplice._doctor import findings as _findings
original = shutil.copyfileobj
[*_findings.examine(["."])]
assert shutil.copyfileobj is original
gsplice.patch_all()
patched = shutil.copyfileobj
assert patched is not original
[*_findings.examine(["."])]
assert shutil.copyfileobj is patched
""")


def test_elsewhere_than_on_linux() -> None:
    run_program("""
import sys
sys.platform = "darwin"
sys.modules["fcntl"] = sys.modules["resource"] = None
from gsplice._doctor import findings as _findings
[finding] = _findings.examine(["."])
assert finding.attention and "needs Linux" in finding.to_do
""")
