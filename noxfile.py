"""The tests, on each Python, gevent and event loop that is supported: ``nox --list`` names them.

    nox -s "quick-3.12(newest, libuv)"
    nox -s whole-3.13 -- -k sendfile

``whole`` runs all tests but the long ones, ``quick`` the part of what ``pytest`` alone runs that
depends most on what is underneath: the ways of the bytes, patching, and real servers.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["quick"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
LOOPS = ["libev-cext", "libuv"]

#: What the oldest of is tried as well: the lower bounds in pyproject.toml.
OLDEST = ("gevent", "gunicorn")

QUICK = ("ends", "move", "patches", "servers")


def oldest() -> list[str]:
    """Return the requirements that ask for the lower bounds."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    pairs = (each.partition(">=") for each in requirements)
    return [f"{name}=={version}" for name, _, version in pairs if name in OLDEST]


def over_all(function):
    """Make *function* a session for every Python, gevent and event loop."""
    gevent = nox.parametrize("gevent", [nox.param(each, id=each) for each in ("newest", "oldest")])
    loop = nox.parametrize("loop", [nox.param(each, id=each) for each in LOOPS])
    return nox.session(python=PYTHONS)(loop(gevent(function)))


def run(session: nox.Session, gevent: str, loop: str, *tests: str) -> None:
    """Run *tests*, or else all that pytest finds."""
    if gevent == "oldest" and session.python == "3.14":
        session.skip("gevent 24.10 has no Python 3.14")
    session.install("-q", ".[test]", *(oldest() if gevent == "oldest" else []))
    session.run("python", "-m", "pytest", "-q", *tests, *session.posargs, env={"GEVENT_LOOP": loop})


@over_all
def whole(session: nox.Session, gevent: str, loop: str) -> None:
    """Run all tests but the long ones."""
    run(session, gevent, loop, "-m", "not long")


@over_all
def quick(session: nox.Session, gevent: str, loop: str) -> None:
    """Run the tests that depend most on what is underneath."""
    run(session, gevent, loop, *(f"tests/{folder}" for folder in QUICK))
