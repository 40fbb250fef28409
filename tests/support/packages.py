"""The tests of packages that run on gevent, from the source package of the version installed here.

As a program it is the process that runs them: with pytest, in an environment of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from outcomes import ERROR, FAILED, PASSED, SKIPPED, CannotRun, Report, Suite, Task
from paths import PROJECT

ROOT: Final = PROJECT


@dataclasses.dataclass(frozen=True)
class Package:
    """Where a package has its tests, and what they need besides the package, gevent and pytest."""

    tests: str
    requirements: Sequence[str] = ()
    #: The extra of the package that has its requirements.
    extra: str = ""


PACKAGES: Final[dict[str, Package]] = {
    "werkzeug": Package("tests", ("cffi", "cryptography", "ephemeral-port-reserve", "watchdog")),
    "bottle": Package("test", ("jinja2", "mako")),
    "webob": Package("tests", extra="testing"),
    "geventhttpclient": Package("tests", ("dpkt", "httplib2", "pytest-rerunfailures", "requests")),
    "gunicorn": Package("tests", extra="testing"),
}

#: Instead of the package's own, which are about coverage. No test of theirs takes that many seconds
#: unless it hangs, which some do under gevent.
OPTIONS: Final = ("-o", "addopts=", "-p", "no:cacheprovider", "--timeout=60")


@contextlib.contextmanager
def prepared(name: str) -> Iterator[Suite]:
    """Have the package's source and an environment for its tests, until the block is left.

    Takes them from where pip gets packages. Raises CannotRun.
    """
    package = PACKAGES[name]
    try:
        exactly = f"{name}=={version(name)}"
    except PackageNotFoundError:
        raise CannotRun(f"{name}: is not installed, so there is no version to test") from None
    with tempfile.TemporaryDirectory(prefix="outside-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        python = str(place / "venv" / "bin" / "python")
        _call(sys.executable, "-m", "venv", str(place / "venv"))
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        download = ("download", "-q", "--no-deps", "--no-binary", name, exactly, "-d", directory)
        _call(*pip, *download)
        [archive] = [path for path in place.iterdir() if path.is_file()]
        shutil.unpack_archive(archive, place / "source")
        [source] = (place / "source").iterdir()
        if package.extra:
            exactly = exactly.replace("==", f"[{package.extra}]==")
        gevent = f"gevent=={version('gevent')}"
        pytest = ("pytest", "pytest-timeout")
        _call(*pip, "install", "-q", exactly, *package.requirements, *pytest, gevent, str(ROOT))
        yield Suite(name, (python, __file__), source)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class _Reporter:
    """A plugin of pytest's that picks the tests of *task* and reports what becomes of them."""

    def __init__(self, task: Task, report: Report) -> None:
        self._task = task
        self._report = report
        self._outcome = (PASSED, "")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        only, left_out = self._task.only, self._task.left_out
        items[:] = [
            item
            for item in items
            if item.nodeid not in left_out and (only is None or item.nodeid == only)
        ]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._report.outcome(report.nodeid, ERROR, report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome = (PASSED, "")
        self._report.start(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            outcome = FAILED if report.when == "call" else ERROR
            self._outcome = outcome, self._outcome[1] + report.longreprtext
        elif report.skipped and self._outcome[0] == PASSED:
            self._outcome = SKIPPED, str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._report.outcome(nodeid, *self._outcome)


def _child(task: Task) -> None:
    """Run the tests of the package in the current directory, as *task* says."""
    sys.path[0] = os.getcwd()  # as ``python -m pytest`` has it
    os.environ["GSPLICE_PATCH_ALL"] = str(int(task.patched))  # here and in what the tests start
    import gevent.monkey

    gevent.monkey.patch_all()
    if task.patched != gevent.monkey.is_object_patched("gevent._socket3.socket", "sendfile"):
        raise SystemExit(f"patched by gsplice: {not task.patched}")
    import pytest

    with open(task.report, "w") as out:
        report = Report(out)
        code = pytest.main(
            [*OPTIONS, PACKAGES[task.name].tests],
            plugins=[_Reporter(task, report)],
        )
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            report.end(_stats() if task.patched else {})
    # Threads that a test has left behind must not keep the process.
    sys.stdout.flush()
    os._exit(code)


def _stats() -> dict[str, Any]:
    import gsplice

    return gsplice.stats().as_dict()


if __name__ == "__main__":
    _child(Task(**json.loads(sys.argv[1])))
