"""Run the attacks and print a table of them.

python tests/faults/run.py                   # the quick ones
python tests/faults/run.py --long            # all of them, an hour or so
python tests/faults/run.py --long soak --minutes 5 --plot soak.png
"""

from __future__ import annotations

import argparse
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

HERE = Path(__file__).parent
ATTACKS = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py"))
#: Figures that are added up; of all others each value is shown.
COUNTED = ("cases", "whole", "told", "injected")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the attacks, and print a table of them.")
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--long", action="store_true", help="the long ones as well")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak (20)")
    parser.add_argument("--plot", metavar="FILE", help="where the soak's plot goes")
    parser.add_argument("-n", metavar="PROCESSES", default="auto", help="how many at once (auto)")
    arguments = parser.parse_args()
    for attack in arguments.attacks:
        if attack not in ATTACKS:
            parser.error(f"there is no attack {attack!r}; there are {', '.join(ATTACKS)}")
    return arguments


def main() -> int:
    arguments = parse()
    os.environ["GSPLICE_SOAK_MINUTES"] = str(arguments.minutes)
    if arguments.plot:
        os.environ["GSPLICE_SOAK_PLOT"] = str(Path(arguments.plot).absolute())
    attacks = arguments.attacks or ATTACKS
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        options = ["-q", "-n", arguments.n, f"--junit-xml={report}", "-o", "junit_family=xunit1"]
        if arguments.long:
            options += ["-m", "long or not long"]
        code = pytest.main([*options, *(str(HERE / f"test_{attack}.py") for attack in attacks)])
        print()
        print_table(ElementTree.parse(report))
    return int(code)


def print_table(report: ElementTree.ElementTree) -> None:
    """Print a line for each attack: how many tests and cases, how they ended, and other figures."""
    columns = ["tests", "failed", *COUNTED, "seconds"]
    figures: dict[str, Counter[str]] = {}
    others: dict[str, list[str]] = {}
    for case in report.iter("testcase"):
        attack = case.attrib["classname"].split(".")[-1].removeprefix("test_")
        row = figures.setdefault(attack, Counter())
        row["tests"] += 1
        row["failed"] += case.find("failure") is not None or case.find("error") is not None
        row["seconds"] += round(float(case.attrib["time"]))
        for each in case.iter("property"):
            name, value = each.attrib["name"], each.attrib["value"]
            if name in COUNTED:
                row[name] += int(value)
            else:
                others.setdefault(attack, []).append(f"{name}: {value}")
    print(f"{'attack':12}" + "".join(f"{column:>10}" for column in columns))
    for attack, row in figures.items():
        print(f"{attack:12}" + "".join(f"{row[column] or '':>10}" for column in columns))
        for line in others.get(attack, ()):
            print(f"{'':14}{line}")


if __name__ == "__main__":
    sys.exit(main())
