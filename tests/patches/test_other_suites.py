"""What passes of the tests of CPython and of some packages under gevent passes with gsplice too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import outside
import pytest

#: All others are long.
MARKS = {
    "fileobject": [],
    "httpservers": [pytest.mark.thorough],
    "sendfile": [pytest.mark.thorough],
    "shutil": [pytest.mark.thorough],
}

#: A counter that has to move, or the suite has tested nothing of gsplice.
USES = {
    "sendfile": "bytes_spliced",
    "httpservers": "fallbacks",
    "shutil": "bytes_copy_file_range",
    "zipfile": "fallbacks",
}

#: Packages whose tests move bytes by gsplice. Those of the others have no socket for a file, or
#: have it in another process.
TRANSFERS = {"werkzeug", "geventhttpclient"}

SUITE = """
    import os, sys, time, unittest

    gsplice = "gsplice" in sys.modules

    class Suite(unittest.TestCase):
        def test_breaks(self):
            self.assertFalse(gsplice)

        def test_breaks_in_a_subtest(self):
            with self.subTest():
                self.assertFalse(gsplice)

        def test_is_broken_anyway(self):
            self.fail()

        def test_is_skipped(self):
            if gsplice:
                self.skipTest("")

        def test_passes(self):
            pass

        def test_passes_alone(self):
            if gsplice and not os.path.exists(FLAG):
                open(FLAG, "x").close()
                raise RuntimeError

        if gsplice:
            def test_is_new(self):
                self.fail()
        else:
            def test_vanishes(self):
                pass
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flag = f"FLAG = {str(tmp_path / 'flag')!r}\n"
    path = tmp_path / "invented_suite.py"
    path.write_text(flag + textwrap.dedent(SUITE))
    return path


def names(tests: list[str]) -> set[str]:
    return {test.rpartition(".test_")[2] for test in tests}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=MARKS.get(n, pytest.mark.long)) for n in outside.SUITES],
)
def test_nothing_fails_that_passes_without_gsplice(name: str) -> None:
    found = outside.compare(name)
    assert {test: found.patched.messages.get(test) for test in found.differences} == {}
    assert found.patched.count(outside.PASSED) >= found.plain.count(outside.PASSED) > 0
    assert name not in USES or found.patched.stats[USES[name]]
    if name == "sendfile":
        assert found.patched.count(outside.PASSED) == len(found.patched.outcomes) == 22


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", outside.PACKAGES)
def test_no_test_of_a_package_fails_that_passes_without_gsplice(name: str) -> None:
    """Needs what pip gets packages from. Some fail in both: they need the network, or threads."""
    found = outside.compare(name)
    assert {test: found.patched.messages.get(test) for test in found.differences} == {}
    plain, patched = found.plain.count(outside.PASSED), found.patched.count(outside.PASSED)
    assert patched + len(found.flakes) >= plain > 300
    assert name not in TRANSFERS or found.patched.stats["transfers"]


@pytest.mark.thorough
def test_each_way_to_do_worse_with_gsplice_is_found(suite: Path) -> None:
    found = outside.compare("invented_suite", timeout=60)
    assert names(found.differences) == {
        "breaks",
        "breaks_in_a_subtest",
        "is_skipped",
        "vanishes",
    }
    assert names(found.flakes) == {"passes_alone"}


@pytest.mark.long
def test_a_test_that_hangs_with_gsplice_is_found_and_the_rest_run(suite: Path) -> None:
    with suite.open("a") as file:
        file.write("    def test_hangs(self): time.sleep(3600 if gsplice else 0)\n")
    found = outside.compare("invented_suite", timeout=10)
    [hung] = [t for t, outcome in found.patched.outcomes.items() if outcome == outside.HUNG]
    assert names([hung]) == {"hangs"} <= names(found.differences)
    assert "passes" in names([t for t, o in found.patched.outcomes.items() if o == outside.PASSED])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("present", "message"),
    [("test/__init__.py", "libpython3-testsuite"), ("other.py", "no such test")],
)
def test_a_suite_that_is_not_there_is_a_failure(tmp_path: Path, present: str, message: str) -> None:
    path = tmp_path / present
    path.parent.mkdir(exist_ok=True)
    path.touch()
    name = "shutil" if present.startswith("test/") else "other"
    done = subprocess.run(
        [sys.executable, outside.__file__, name],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stdout


def test_a_suite_that_dies_is_a_failure(suite: Path) -> None:
    with suite.open("a") as file:
        file.write("os._exit(0)\n")
    with pytest.raises(outside.CannotRun, match="ended early"):
        outside.run("invented_suite", patched=True, timeout=60)
