"""What a benchmark says: tables, targets and pictures, on the terminal and in a folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gevent
from _words import text

T = TypeVar("T")


class Report:
    """Prints what is measured, and keeps it for ``--out``. A target missed is no failure."""

    def __init__(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        effort = parser.add_mutually_exclusive_group()
        effort.add_argument("--quick", action="store_true", help="few rounds: a rough idea only")
        effort.add_argument("--check", action="store_true", help="only whether it runs")
        parser.add_argument(
            "--out", type=Path, metavar="FOLDER", help="write the figures and pictures to FOLDER"
        )
        self.options = parser.parse_args()
        self.figures: dict[str, Any] = {
            "section": Path(sys.argv[0]).stem,
            "about": description or "",
            "effort": self.pick("full", "quick", "check"),
            "machine": machine(),
            "versions": {"Python": platform.python_version(), "gevent": gevent.__version__},
            "load": [os.getloadavg()[0]],
            "tables": {},
            "targets": [],
            "pictures": {},
            "left out": [],
        }
        versions = ", ".join(" ".join(pair) for pair in self.figures["versions"].items())
        print(f"{versions}, {self.figures['machine']}")

    @property
    def quick(self) -> bool:
        return bool(self.options.quick or self.options.check)

    def pick(self, full: T, quick: T, check: T) -> T:
        """Return the one that fits the effort that was asked for."""
        return check if self.options.check else quick if self.options.quick else full

    def version(self, what: str, version: str) -> None:
        """Keep the version of a rival."""
        self.figures["versions"][what] = version

    def leave_out(self, what: str, why: str) -> None:
        """Say that something is not measured."""
        print(f"\nLEFT OUT: {what}: {why}")
        self.figures["left out"].append(f"{what}: {why}")

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print *rows*, each a name and numbers, and keep them under *title*."""
        cells = [[text(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        print(f"\n{title}")
        for line in [head, *cells]:
            first, *others = (
                cell.ljust(width) if not number else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print(" ", first, *others, sep="  ")
        sys.stdout.flush()
        self.figures["tables"][title] = {"head": list(head), "rows": [list(row) for row in rows]}

    def target(
        self,
        what: str,
        value: float,
        *,
        most: float = 0,
        least: float = 0,
        cause: str = "",
        cost: bool = False,
    ) -> str:
        """Keep whether *value* is what it should be; return it in words.

        *cause* is what is known of why it is missed where it is. *cost*: it is what gsplice costs
        where it can't help.
        """
        met = value <= most if most else value >= least
        bound = f"at most {most:g}" if most else f"at least {least:g}"
        part = {"what": what, "value": value, "bound": bound, "of bound": value / (most or least)}
        part |= {"met": met, "cause": "" if met else cause, "cost": cost}
        self.figures["targets"].append(part)
        return f"{bound}: {'met' if met else 'MISSED'}"

    def hold_to(self, what: str, value: float, **bound: Any) -> None:
        """Print a target that is in no table, and keep it."""
        print(f"  {what} {value:.3f}, {self.target(what, value, **bound)}")

    def bars(
        self,
        name: str,
        title: str,
        unit: str,
        panels: Mapping[str, Mapping[str, float]],
        ours: Iterable[str],
    ) -> None:
        """Have a picture drawn: in each of *panels*, a bar for each name; *ours* stand out."""
        given = {panel: dict(bars) for panel, bars in panels.items()}
        spec = {"kind": "bars", "title": title, "unit": unit, "panels": given, "ours": [*ours]}
        self.figures["pictures"][name] = spec

    def lines(
        self,
        name: str,
        title: str,
        x: str,
        y: str,
        series: Mapping[str, Mapping[int, float]],
        ours: Iterable[str],
        in_bytes: bool = True,
    ) -> None:
        """Have a picture drawn: a line for each of *series*, both axes logarithmic.

        *in_bytes* says whether what is on the axis of *x* are bytes, or just numbers.
        """
        points = {label: [*map(list, sorted(by.items()))] for label, by in series.items()}
        spec = {"kind": "lines", "title": title, "x": x, "y": y, "series": points, "ours": [*ours]}
        self.figures["pictures"][name] = spec | {"in bytes": in_bytes}

    def close(self) -> None:
        """Write the figures and the pictures, if that was asked for."""
        self.figures["load"].append(os.getloadavg()[0])
        out = self.options.out
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.figures['section']}.json").write_text(
            json.dumps(self.figures, indent=1) + "\n"
        )
        try:
            from _plot import draw  # only the extra "bench" brings matplotlib
        except ImportError:
            print("\nNO PICTURES: matplotlib is not installed")
            return
        for name, spec in self.figures["pictures"].items():
            draw(spec, out / f"{name}.svg")


def machine() -> str:
    """Return what it is in general terms."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{platform.system()} {kernel}, {os.cpu_count()} CPUs, {model}"
