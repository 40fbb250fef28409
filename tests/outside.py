"""Run CPython's own tests with gsplice and without, and report what only gsplice makes fail.

    python tests/outside.py [--list] [--timeout SECONDS] [--json FILE] [NAME ...]

A NAME is one of the suites below (all of them if none is given) or any name that unittest can load.
Each suite runs twice, in a process and a working directory of its own: after
``gevent.monkey.patch_all()``, and after ``gevent.monkey.patch_all(); gsplice.patch_all()``. Plain
unittest runs them, because gevent's own harness leaves out the very tests that matter here. A test
that passes without gsplice and does anything else with it is run again alone, and then reported; of
the suite ``sendfile`` every test has to pass.

The exit code is 1 if any is left, or if a suite could not be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

ROOT: Final = Path(__file__).resolve().parent.parent

#: By name: what unittest loads, and which tests of it (``python -m unittest -k``).
SUITES: Final[dict[str, tuple[str, str | None]]] = {
    "sendfile": ("test.test_socket", "*Sendfile*"),
    "fileobject": ("test.test_socket", "*.FileObjectClassTestCase.*"),
    "fileobject_variants": ("test.test_socket", "*[a-z]FileObjectClassTestCase.*"),
    "httpservers": ("test.test_httpservers.SimpleHTTPServerTestCase", None),
    "shutil": ("test.test_shutil", None),
    "zipfile": ("test.test_zipfile", None),
    "tarfile": ("test.test_tarfile", None),
    "urllib": ("test.test_urllib", None),
    "urllib2_localnet": ("test.test_urllib2_localnet", None),
    "ftplib": ("test.test_ftplib", None),
    "httplib": ("test.test_httplib", None),
}

#: Suites that must pass as a whole with gsplice, though they don't without.
ALL_PASS: Final = {"sendfile"}

#: What can become of a test. HUNG: it had not ended when the time was up.
PASSED, FAILED, ERROR, SKIPPED, HUNG = OUTCOMES = ("passed", "failed", "errors", "skipped", "hung")

#: Many tests wait at their end until no thread is left that was not there before. One that has
#: looked up a name for gevent would otherwise linger for five seconds.
ENVIRONMENT: Final = {"GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT": "0.01"}

#: Tests that may hang, in one suite, before the rest of it is given up.
MOST_HANGS: Final = 5


class CannotRun(Exception):
    """The suite could not be run; the message says why."""


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


def compare(name: str, timeout: float = 600.0) -> Comparison:
    """Run the suite *name* twice. Raises CannotRun."""
    plain = run(name, patched=False, timeout=timeout)
    patched = run(name, patched=True, timeout=timeout)
    differences, flakes = [], []
    for test, outcome in plain.outcomes.items():
        expected = outcome == PASSED or name in ALL_PASS
        if not expected or patched.outcomes.get(test) == PASSED:
            continue
        try:
            again = run(test, patched=True, timeout=timeout)
        except CannotRun:
            again = Run()
        passes_alone = again.count(PASSED) == len(again.outcomes) > 0
        (flakes if passes_alone else differences).append(test)
    return Comparison(plain, patched, differences, flakes)


def run(name: str, *, patched: bool, timeout: float) -> Run:
    """Run the suite *name* once. A test that hangs is left out, and the rest run again."""
    result = Run()
    started = time.monotonic()
    for _ in range(MOST_HANGS):
        hung = _run_process(name, patched, timeout, result)
        if hung is None:
            break
        result.outcomes[hung] = HUNG
        result.messages[hung] = f"had not ended after {timeout:g} s"
    else:
        raise CannotRun(f"{name}: {MOST_HANGS} tests hang")
    result.seconds = time.monotonic() - started
    if not result.outcomes:
        raise CannotRun(f"{name}: there is no such test")
    return result


def _run_process(name: str, patched: bool, timeout: float, result: Run) -> str | None:
    """Run what *result* does not have yet; return the test that hung, if one did."""
    left_out = [test for test, outcome in result.outcomes.items() if outcome == HUNG]
    with tempfile.TemporaryDirectory(prefix="outside-", ignore_cleanup_errors=True) as directory:
        work = Path(directory, "work")
        work.mkdir()
        report, output = Path(directory, "report"), Path(directory, "output")
        arguments = json.dumps(
            {"name": name, "patched": patched, "report": str(report), "left_out": left_out}
        )
        with output.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", arguments],
                cwd=work,
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
            raise CannotRun(f"{name}: {how}\n{output.read_text(errors='replace')[-4000:]}")
    return None


class _Reporter(unittest.TestResult):
    """Writes each outcome down at once, so that it is there when a later test hangs."""

    def __init__(self, report: TextIO) -> None:
        super().__init__()
        self._report = report
        self._outcomes: dict[str, tuple[str, str]] = {}

    def write(self, *entry: object) -> None:
        print(json.dumps(entry), file=self._report, flush=True)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.write("start", test.id())

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        outcome, message = self._outcomes.pop(test.id(), (PASSED, ""))
        self.write(outcome, test.id(), message)

    def _bad(self, test: unittest.TestCase, outcome: str, err: Any) -> None:
        message = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]
        if isinstance(test, unittest.TestCase):
            earlier = self._outcomes.get(test.id(), ("", ""))[1]
            self._outcomes[test.id()] = outcome, earlier + message
        else:  # setUpClass and the like, which is no test
            self.write(outcome, test.id(), message)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._bad(test, FAILED, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self._bad(test, ERROR, err)

    def addSubTest(self, test: unittest.TestCase, subtest: Any, err: Any) -> None:
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            self._bad(test, FAILED if failed else ERROR, err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        if isinstance(test, unittest.TestCase):
            self._outcomes.setdefault(test.id(), (SKIPPED, reason))
        else:
            self.write(SKIPPED, test.id(), reason)

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._outcomes[test.id()] = FAILED, "unexpected success"


def _child(name: str, patched: bool, report: str, left_out: Sequence[str]) -> None:
    """Run the suite *name* in this process, writing to the file *report*."""
    sys.path[0] = str(ROOT)
    import gevent.monkey

    gevent.monkey.patch_all()
    if patched:
        import gsplice

        result = gsplice.patch_all()
        if not result:
            raise SystemExit(str(result))
    with open(report, "w") as out:
        reporter = _Reporter(out)
        try:
            suite = _load(name)
        except CannotRun as err:
            reporter.write("cannot run", str(err))
            return
        unittest.TestSuite(t for t in _flatten(suite) if t.id() not in left_out).run(reporter)
        reporter.write("end", gsplice.stats().as_dict() if patched else {})
    # Threads that a test has left behind must not keep the process.
    os._exit(0)


def _load(name: str) -> unittest.TestSuite:
    target, pattern = SUITES.get(name, (name, None))
    package = target.partition(".")[0]
    if package == "test":
        if importlib.util.find_spec("test.support") is None:
            raise CannotRun(
                f"{name}: {sys.executable} has no CPython tests (the package test); "
                f"Debian and Ubuntu have them in libpython3-testsuite"
            )
        support = importlib.import_module("test.support")
        # All but what needs the world outside. None, as found, means everything.
        support.use_resources = ["audio", "cpu", "decimal", "largefile", "subprocess", "walltime"]
    loader = unittest.TestLoader()
    loader.testNamePatterns = [pattern] if pattern else None
    suite = loader.loadTestsFromName(target)
    if loader.errors:
        raise CannotRun(f"{name}: {loader.errors[0]}")
    return suite


def _flatten(suite: unittest.TestSuite) -> Iterable[Any]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flatten(test)
        else:
            yield test


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names of the suites")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a suite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE too")
    options = parser.parse_args(arguments)
    if options.list:
        print(*SUITES, sep="\n")
        return 0

    width = max(map(len, options.names or SUITES))
    print(f"CPython {platform.python_version()}, {' '.join(platform.uname()[::2])}")
    print(f"{'':{width}}          {' '.join(OUTCOMES)} seconds")
    bad: list[str] = []
    everything: dict[str, Mapping[str, Any]] = {}
    for name in options.names or SUITES:
        try:
            comparison = compare(name, options.timeout)
        except CannotRun as err:
            print(f"{name:{width}} cannot run: {err}", flush=True)
            bad.append(name)
            continue
        everything[name] = dataclasses.asdict(comparison)
        print(f"{name:{width}} gevent   {comparison.plain}")
        print(f"{'':{width}} +gsplice {comparison.patched}  {_counters(comparison.patched.stats)}")
        for test in comparison.flakes:
            outcome = comparison.patched.outcomes.get(test, "not run")
            print(f"  {outcome}, but passed with gsplice when run again alone: {test}")
        for test in comparison.differences:
            outcome = comparison.patched.outcomes.get(test, "not run")
            print(f"  {comparison.plain.outcomes[test]} without gsplice, {outcome} with it: {test}")
            print(comparison.patched.messages.get(test, ""))
        sys.stdout.flush()
        bad += comparison.differences
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    print(f"{len(bad)} to look at: {', '.join(bad)}" if bad else "no difference")
    return 1 if bad else 0


def _counters(stats: Mapping[str, Any]) -> str:
    counts = {name: number for name, number in stats.items() if not name.startswith("pipes")}
    counts["fallbacks"] = sum(stats.get("fallbacks", {}).values())
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(**json.loads(sys.argv[2]))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no child is left behind
        sys.exit(main())
