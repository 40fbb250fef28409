"""Run tests that are not ours with gsplice and without, and report what only gsplice makes fail.

    python tests/support/outside.py [--list] [--timeout SECONDS] [--json FILE] [NAME ...]

A NAME is one of the suites below, which are CPython's own tests (all of them if none is given), or
any name that unittest can load, or one of the packages in packages.py, whose tests come with its
source package. Each suite runs twice, in a process of its own: after ``gevent.monkey.patch_all()``,
and after ``gevent.monkey.patch_all(); gsplice.patch_all()``. Plain unittest runs CPython's, because
gevent's own harness leaves out the very tests that matter here. A test that passes without gsplice
and does anything else with it is run again alone, and then reported; of the suite ``sendfile``
every test has to pass.

The exit code is 1 if any is left, or if a suite could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import signal
import sys
import unittest
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import outcomes
from outcomes import (
    ERROR,
    FAILED,
    OUTCOMES,
    PASSED,
    SKIPPED,
    CannotRun,
    Comparison,
    Report,
    Run,
    Suite,
    Task,
)
from packages import PACKAGES, ROOT, prepared

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


def compare(name: str, timeout: float = 600.0) -> Comparison:
    """Run the suite *name* twice, for at most *timeout* seconds each time. Raises CannotRun."""
    with _suite(name) as suite:
        return outcomes.compare(suite, timeout)


def run(name: str, *, patched: bool, timeout: float) -> Run:
    """Run the suite *name* once. Raises CannotRun."""
    with _suite(name) as suite:
        return outcomes.run(suite, patched=patched, timeout=timeout)


def _suite(name: str) -> contextlib.AbstractContextManager[Suite]:
    if name in PACKAGES:
        return prepared(name)
    command = (sys.executable, __file__, "--child")
    return contextlib.nullcontext(Suite(name, command, all_pass=name in ALL_PASS))


class _Reporter(unittest.TestResult):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report
        self._outcomes: dict[str, tuple[str, str]] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._report.start(test.id())

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._report.outcome(test.id(), *self._outcomes.pop(test.id(), (PASSED, "")))

    def _bad(self, test: unittest.TestCase, outcome: str, err: Any) -> None:
        message = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]
        if isinstance(test, unittest.TestCase):
            earlier = self._outcomes.get(test.id(), ("", ""))[1]
            self._outcomes[test.id()] = outcome, earlier + message
        else:  # setUpClass and the like, which is no test
            self._report.outcome(test.id(), outcome, message)

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
            self._report.outcome(test.id(), SKIPPED, reason)

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._outcomes[test.id()] = FAILED, "unexpected success"


def _child(task: Task) -> None:
    """Do *task* in this process, with a suite of CPython's or a name that unittest can load."""
    sys.path[0] = str(ROOT)
    import gevent.monkey

    gevent.monkey.patch_all()
    if task.patched:
        import gsplice

        result = gsplice.patch_all()
        if not result:
            raise SystemExit(str(result))
    with open(task.report, "w") as out:
        report = Report(out)
        try:
            suite = _load(task.only or task.name)
        except CannotRun as err:
            report.cannot_run(str(err))
            return
        tests = (test for test in _flatten(suite) if test.id() not in task.left_out)
        unittest.TestSuite(tests).run(_Reporter(report))
        report.end(gsplice.stats().as_dict() if task.patched else {})
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
        print(*SUITES, *PACKAGES, sep="\n")
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
        _child(Task(**json.loads(sys.argv[2])))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no child is left behind
        sys.exit(main())
