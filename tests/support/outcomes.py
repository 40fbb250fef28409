"""What becomes of the tests of a suite that is not ours, with gsplice and without."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

#: What can become of a test. HUNG: it had not ended when the time was up.
PASSED, FAILED, ERROR, SKIPPED, HUNG = OUTCOMES = ("passed", "failed", "errors", "skipped", "hung")

#: Many tests wait at their end until no thread is left that was not there before. One that has
#: looked up a name for gevent would otherwise linger for five seconds.
ENVIRONMENT: Final = {"GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT": "0.01"}

#: Tests that may hang, in one suite, before the rest of it is given up.
MOST_HANGS: Final = 5


class CannotRun(Exception):
    """The suite could not be run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tests that a process of their own runs.

    Its last argument is a :class:`Task` as JSON, and it writes a :class:`Report`.
    """

    name: str
    command: Sequence[str]
    #: Where it runs; None: in a new directory each time.
    directory: Path | None = None
    #: Whether all tests must pass with gsplice, though they don't without.
    all_pass: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What the process of a suite is to do."""

    #: The suite, or the one test to run.
    name: str
    only: str | None
    patched: bool
    left_out: Sequence[str]
    report: str


class Report:
    """Has each outcome written down at once, so that it is there when a later test hangs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def _write(self, *entry: object) -> None:
        print(json.dumps(entry), file=self._file, flush=True)

    def start(self, test: str) -> None:
        self._write("start", test)

    def outcome(self, test: str, outcome: str, message: str = "") -> None:
        self._write(outcome, test, message)

    def end(self, stats: dict[str, Any]) -> None:
        """All tests have been run, and this is what ``gsplice.stats()`` had counted."""
        self._write("end", stats)

    def cannot_run(self, why: str) -> None:
        self._write("cannot run", why)


@dataclasses.dataclass
class Run:
    """What became of the tests of one suite, in one process."""

    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: dict[str, str] = dataclasses.field(default_factory=dict)
    #: What ``gsplice.stats()`` had counted in the end.
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        return sum(each == outcome for each in self.outcomes.values())

    def __str__(self) -> str:
        counts = " ".join(f"{self.count(outcome):>{len(outcome)}}" for outcome in OUTCOMES)
        return f"{counts} {self.seconds:>7.1f}"


@dataclasses.dataclass
class Comparison:
    """One suite, with gsplice and without."""

    plain: Run
    patched: Run
    #: Tests that should pass with gsplice and do not, twice; and those that passed when run again.
    differences: list[str]
    flakes: list[str]


def compare(suite: Suite, timeout: float) -> Comparison:
    """Run *suite* twice, and what does worse with gsplice once more, alone. Raises CannotRun."""
    plain = run(suite, patched=False, timeout=timeout)
    patched = run(suite, patched=True, timeout=timeout)
    differences, flakes = [], []
    for test, outcome in plain.outcomes.items():
        expected = outcome == PASSED or suite.all_pass
        if not expected or patched.outcomes.get(test) == PASSED:
            continue
        try:
            again = run(suite, patched=True, timeout=timeout, only=test)
        except CannotRun:
            again = Run()
        passes_alone = again.count(PASSED) == len(again.outcomes) > 0
        (flakes if passes_alone else differences).append(test)
    return Comparison(plain, patched, differences, flakes)


def run(suite: Suite, *, patched: bool, timeout: float, only: str | None = None) -> Run:
    """Run *suite* once, or one test of it. A test that hangs is left out, and the rest run again.

    Raises CannotRun.
    """
    result = Run()
    started = time.monotonic()
    for _ in range(MOST_HANGS):
        hung = _run_process(suite, patched, timeout, only, result)
        if hung is None:
            break
        result.outcomes[hung] = HUNG
        result.messages[hung] = f"had not ended after {timeout:g} s"
    else:
        raise CannotRun(f"{suite.name}: {MOST_HANGS} tests hang")
    result.seconds = time.monotonic() - started
    if not result.outcomes:
        raise CannotRun(f"{only or suite.name}: there is no such test")
    return result


def _run_process(
    suite: Suite, patched: bool, timeout: float, only: str | None, result: Run
) -> str | None:
    """Run what *result* does not have yet; return the test that hung, if one did."""
    left_out = [test for test, outcome in result.outcomes.items() if outcome == HUNG]
    with tempfile.TemporaryDirectory(prefix="outside-", ignore_cleanup_errors=True) as directory:
        work = Path(directory, "work")
        work.mkdir()
        report, output = Path(directory, "report"), Path(directory, "output")
        task = Task(suite.name, only, patched, left_out, str(report))
        with output.open("wb") as out:
            process = subprocess.Popen(
                [*suite.command, json.dumps(dataclasses.asdict(task))],
                cwd=suite.directory or work,
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(work)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                    process.wait()
        lines = report.read_text().split("\n")[:-1] if report.exists() else []
        entries = [json.loads(line) for line in lines]
        under_way, ended = None, False
        for kind, *rest in entries:
            if kind == "start":
                under_way = rest[0]
            elif kind == "end":
                result.stats, ended = rest[0], True
            elif kind == "cannot run":
                raise CannotRun(rest[0])
            else:
                test, message = rest
                result.outcomes[test] = kind
                if message:
                    result.messages[test] = message
        if code is None and under_way is not None and under_way not in result.outcomes:
            return under_way
        if not ended:
            how = "had not ended in time" if code is None else f"ended early, exit code {code}"
            raise CannotRun(f"{suite.name}: {how}\n{output.read_text(errors='replace')[-4000:]}")
    return None
