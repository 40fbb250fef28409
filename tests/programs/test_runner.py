"""``python -m gsplice``: programs run as Python itself would run them, and patched."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

#: Tells what a program can see of how it was started. Of a script, __package__ is None, or "" by
#: runpy, which gevent.monkey uses as well.
TELL = """
import sys
print(__name__, __file__, __package__ or None, sys.argv, sys.path[0])
print(sys.modules["__main__"].__dict__ is globals())
"""
PATCHED = """
import shutil, socket, gevent.monkey
print(gevent.monkey.is_module_patched("socket"))
print(gevent.monkey.is_object_patched("shutil", "copyfileobj"))
"""


def python(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python in *directory*."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environ,
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with a script, a package, a directory and an archive."""
    package = tmp_path / "sub" / "package"
    package.mkdir(parents=True)
    (tmp_path / "sub" / "sibling.py").write_text("")
    (tmp_path / "sub" / "script.py").write_text("import sibling" + TELL + PATCHED)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("from . import other" + TELL + PATCHED)
    (package / "other.py").write_text("")
    (package / "module.py").write_text(TELL + PATCHED)
    (tmp_path / "sub" / "silent").mkdir()
    (tmp_path / "sub" / "silent" / "__init__.py").write_text("")
    (tmp_path / "sub" / "broken.py").write_text("import missing_in_broken")
    (tmp_path / "sub" / "directory").mkdir()
    (tmp_path / "sub" / "directory" / "__main__.py").write_text(TELL + PATCHED)
    with zipfile.ZipFile(tmp_path / "sub" / "archive.pyz", "w") as archive:
        archive.writestr("__main__.py", TELL + PATCHED)
    return tmp_path


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("", ["sub/script.py"]),
        ("", ["sub/script.py", "-m", "--help", "--", "x y"]),
        ("sub", ["script.py", "--no-thread"]),
        ("sub", ["directory", "1"]),
        ("sub", ["archive.pyz", "1"]),
        ("sub", ["-m", "package", "-m", "--help"]),
        ("sub", ["-m", "package.module", "1"]),
        ("sub", ["-P", "-m", "package", "1"]),
        ("", ["-P", "sub/script.py"]),
    ],
    ids=str,
)
def test_a_program_sees_what_it_sees_when_python_runs_it(
    programs: Path, where: str, arguments: list[str]
) -> None:
    options = []
    if arguments[0] == "-P":
        if sys.version_info < (3, 11):
            pytest.skip("-P is new in Python 3.11")
        options = ["-P"]
        arguments = arguments[1:]
    environ = {"PYTHONPATH": str(programs / "sub")} if options else {}
    directory = programs / where
    usual = python(directory, *options, *arguments, **environ)
    ours = python(directory, *options, "-m", "gsplice", *arguments, **environ)
    assert (usual.stderr, ours.stderr) == ("", "")
    # sys.argv[0] of a script becomes absolute, as __file__ is.
    usual_lines = usual.stdout.replace(f"['{arguments[0]}'", f"['{directory / arguments[0]}'")
    assert usual_lines.endswith("True\nFalse\nFalse\n")
    assert ours.stdout == usual_lines.replace("False", "True")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "ending",
    ["raise SystemExit(7)", "raise SystemExit('sorry')", "1/0", "import os; os._exit(3)", ""],
)
@pytest.mark.parametrize("option", [[], ["-m"]])
def test_it_ends_as_the_program_ends(tmp_path: Path, ending: str, option: list[str]) -> None:
    (tmp_path / "program.py").write_text(ending)
    target = [*option, "program" if option else "program.py"]
    usual = python(tmp_path, *target)
    ours = python(tmp_path, "-m", "gsplice", *target)
    assert ours.returncode == usual.returncode
    assert ours.stderr.splitlines()[-1:] == usual.stderr.splitlines()[-1:]


def test_everything_is_patched_before_the_program_imports_anything(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("""
import ssl, threading, gevent.monkey, gsplice
ssl.create_default_context().minimum_version = ssl.TLSVersion.TLSv1_2
done = []
thread = threading.Thread(target=done.append, args=[1])
thread.start(); thread.join()
assert done and gsplice.patch_all()
gevent.monkey.patch_all()
""")
    ours = python(tmp_path, "-W", "error", "-m", "gsplice", "program.py")
    assert (ours.returncode, ours.stderr) == (0, "")


def test_the_variable_is_not_asked(programs: Path) -> None:
    ours = python(programs / "sub", "-m", "gsplice", "script.py", GSPLICE_PATCH_ALL="0")
    assert ours.stdout.endswith("True\nTrue\nTrue\n")


def test_classes_of_the_program_can_be_pickled(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("""
import pickle
class Thing: pass
assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
""")
    for target in (["program.py"], ["-m", "program"]):
        ours = python(tmp_path, "-m", "gsplice", *target)
        assert (ours.returncode, ours.stderr) == (0, "")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["doctor", "serve"])
def test_a_script_called_like_a_command_is_run_by_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("print('the script', __name__)")
    ours = python(tmp_path, "-m", "gsplice", f"./{name}")
    assert (ours.stdout, ours.stderr) == ("the script __main__\n", "")
    ours = python(tmp_path, "-m", "gsplice", name, "--help")
    assert ours.stdout.startswith(f"usage: gsplice {name} ")


@pytest.mark.few(1)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tmp_path: Path, option: str) -> None:
    ours = python(tmp_path, "-m", "gsplice", option)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout.startswith("usage: python -m gsplice ")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing to run"),
        (["-m"], 2, "-m needs the name of a module"),
        (["--no-thread", "script.py"], 2, "no such option: --no-thread"),
        (["nowhere.py"], 1, "[Errno 2] No such file or directory: '{}/nowhere.py'"),
        (["-m", "nowhere"], 1, "No module named nowhere"),
        (["-m", "nowhere.at.all"], 1, "No module named 'nowhere'"),
        (["-m", "silent"], 1, "'silent' is a package and cannot be directly executed"),
        (["silent"], 1, "can't find '__main__' module in '{}/silent'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_line(
    programs: Path, arguments: list[str], code: int, said: str
) -> None:
    directory = programs / "sub"
    ours = python(directory, "-m", "gsplice", *arguments)
    last = ours.stderr.splitlines()[-1]
    assert ours.returncode == code
    assert last.startswith("gsplice: ")
    assert said.format(directory) in last
    assert "Traceback" not in ours.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize("target", [["broken.py"], ["-m", "broken"]])
def test_errors_of_the_program_keep_their_traceback(programs: Path, target: list[str]) -> None:
    ours = python(programs / "sub", "-m", "gsplice", *target)
    assert ours.returncode == 1
    assert ours.stderr.startswith("Traceback")
    assert ours.stderr.endswith("ModuleNotFoundError: No module named 'missing_in_broken'\n")


def test_where_nothing_can_be_patched_the_program_runs_all_the_same(programs: Path) -> None:
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=splice:error=ENOSYS"]
        + [sys.executable, "-m", "gsplice", "script.py"],
        cwd=programs / "sub",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("True\nTrue\nFalse\n")
    assert done.stderr.startswith("gsplice: patched: nothing; not patched: socket.sendfile (splice")
