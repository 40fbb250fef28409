"""``python -m gsplice``, or ``gsplice``: run a program that knows nothing of gevent or gsplice,
patched by both, or one of gsplice's own commands.
"""

from __future__ import annotations

import os
import pkgutil
import runpy
import sys
import traceback
from typing import Final, NoReturn

import gevent.monkey

import gsplice

_HELP: Final = """\
usage: python -m gsplice SCRIPT [ARGUMENT ...]
       python -m gsplice -m MODULE [ARGUMENT ...]
       python -m gsplice doctor [--json] [PATH ...]
       python -m gsplice serve [OPTION ...] [DIR]

Calls gevent.monkey.patch_all() and gsplice.patch_all(), then runs the program as Python itself
would: a script, a directory or zip file with a __main__.py, or a module. "gsplice" is the same as
"python -m gsplice".

doctor  tries out what gsplice needs, and says what to do about what is not there
serve   serves the files of a directory over HTTP
Each has a --help. A script that is called doctor or serve is run as ./doctor or ./serve.

To choose what gevent patches, use its own runner instead:
       GSPLICE_PATCH_ALL=1 python -m gevent.monkey --no-thread SCRIPT [ARGUMENT ...]
"""


def script() -> None:
    """Do what :func:`main` does, as the console script ``gsplice``.

    ``python -m`` has the current directory on the path; a script, the one that it is in.
    """
    if not _safe_path():
        sys.path[0] = os.getcwd()
    main()


def main() -> None:
    """Run what ``sys.argv`` names, which is then what it would be without ``-m gsplice``.

    Lets out what the program raises. Ends with exit code 2 if it is called wrongly, 1 if there is
    no such program.
    """
    match sys.argv[1:]:
        case ["-h" | "--help", *_]:
            print(_HELP, end="")
        case []:
            _wrong("nothing to run")
        case ["-m"]:
            _wrong("-m needs the name of a module")
        case ["-m", module, *arguments]:
            _run(module, arguments, is_module=True)
        case [option, *_] if option.startswith("-"):
            _wrong(f"no such option: {option}")
        case ["doctor", *arguments]:
            from ._doctor.command import main as doctor

            sys.exit(doctor(arguments))
        case ["serve", *arguments]:
            sys.exit(_serve(arguments))
        case [script, *arguments]:
            _run(os.path.abspath(script), arguments, is_module=False)


def _wrong(message: str) -> NoReturn:
    print(_HELP, file=sys.stderr)
    print(f"gsplice: {message}", file=sys.stderr)
    sys.exit(2)


def _serve(arguments: list[str]) -> int:
    gevent.monkey.patch_all(gsplice=False)  # the server does it, unless it is told not to
    try:
        from .file_server import main as serve
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if missing not in ("jinja2", "markupsafe", "werkzeug"):
            raise
        sys.exit(f"gsplice: serve needs {missing}: pip install 'gsplice[serve]'")
    return serve(arguments, "gsplice serve")


def _run(program: str, arguments: list[str], *, is_module: bool) -> None:
    gevent.monkey.patch_all(gsplice=False)  # the next line does it, plugin or not
    result = gsplice.patch_all()
    if not result:
        print(f"gsplice: {result}", file=sys.stderr)
    sys.argv[:] = [program, *arguments]
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            _replace_first_path(program)
            runpy.run_path(program, run_name="__main__")
    except (ImportError, OSError) as err:
        if _comes_from_runpy(err):
            sys.exit(f"gsplice: {err}")
        raise


def _replace_first_path(script: str) -> None:
    """Have ``sys.path`` start where *script* is, and not with the current directory."""
    if _safe_path():
        return
    if pkgutil.get_importer(script) is None:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    else:
        del sys.path[0]  # a directory or zip file: runpy puts it there


def _safe_path() -> bool:
    """Say whether Python was told to have no directory of the program's on the path."""
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))  # -P, new in 3.11, and -I


def _comes_from_runpy(err: Exception) -> bool:
    """Return whether there was nothing to run, and *err* is not the program's own."""
    frames = [frame for frame, _ in traceback.walk_tb(err.__traceback__)]
    return all(frame.f_globals.get("__name__") == "runpy" for frame in frames[1:])


if __name__ == "__main__":
    main()
