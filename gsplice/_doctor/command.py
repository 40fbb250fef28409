"""``python -m gsplice doctor``: what gsplice finds on this machine, and what to do about it.

Nothing is changed: the only file ever written is one without a name, in a directory that is asked
about. The process has gsplice's names patched for a moment, and a hub.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from typing import Final

import gevent

from .findings import Finding, examine

_EXIT_CODES: Final = """\
exit code: 0 if nothing needs attention, 1 if something does, 2 if called wrongly
"""


def main(arguments: list[str]) -> int:
    """Print what is found; return the exit code. Ends with exit code 2 for wrong *arguments*."""
    parser = argparse.ArgumentParser(
        prog="gsplice doctor",
        description="Try out what gsplice needs, and say what to do about what is not there.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        default=["."],
        help="a directory or file to be served or written to; default: the current directory",
    )
    parser.add_argument("--json", action="store_true", help="for programs to read")
    options = parser.parse_args(arguments)
    findings = [*examine(options.paths)]
    print(as_json(findings) if options.json else as_text(findings))
    return int(any(finding.attention for finding in findings))


def as_text(findings: list[Finding]) -> str:
    """Return the findings for people to read."""
    lines = [", ".join(f"{name} {value}" for name, value in _versions().items()), ""]
    for finding in findings:
        marker = finding.status.upper() if finding.attention else finding.status
        lines += _paragraph(f"{marker:10} ", f"{finding.subject}: {finding.found}")
        if finding.to_do:
            lines += _paragraph(f"{'':10} > ", finding.to_do)
    number = sum(finding.attention for finding in findings)
    lines += ["", f"{number or 'Nothing'} need{'s' * (number < 2)} attention."]
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """Return the findings as an object with ``versions``, ``fine`` and ``findings``."""
    return json.dumps(
        {
            "versions": _versions(),
            "fine": not any(finding.attention for finding in findings),
            "findings": [
                {
                    "subject": finding.subject,
                    "status": finding.status,
                    "found": finding.found,
                    "to_do": finding.to_do or None,
                }
                for finding in findings
            ],
        },
        indent=2,
    )


def _paragraph(begin: str, text: str) -> list[str]:
    indent = " " * len(begin)
    return textwrap.wrap(text, 100, initial_indent=begin, subsequent_indent=indent)


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("gsplice")
    except importlib.metadata.PackageNotFoundError:
        own = "(not installed)"
    return {
        "gsplice": own,
        "gevent": gevent.__version__,
        "Python": platform.python_version(),
        platform.system(): platform.release(),
        "user": str(os.geteuid()),
    }
