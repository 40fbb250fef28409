"""``python -m benchmarks`` runs, and writes what it says it writes."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from paths import PROJECT


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "names",
    [
        ("pool",),
        pytest.param(
            ("pool", "saying_no", "slow_readers", "file_to_socket"), marks=pytest.mark.thorough
        ),
    ],
    ids=len,
)
def test_the_cheap_ones_run_and_write_their_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    done = run("--check", "--out", tmp_path, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "RESULTS.md").read_text()
    results = tmp_path / "results"
    for name in names:
        figures = json.loads((results / f"{name}.json").read_text())
        assert figures["targets"]
        for title, table in figures["tables"].items():
            assert title in page
            assert all(len(row) == len(table["head"]) for row in table["rows"])
        for picture in figures["pictures"]:
            assert f"(results/{picture}.svg)" in page
            assert len([*ElementTree.parse(results / f"{picture}.svg").iter()]) > 20


def test_no_module_imports_one_that_imports_it() -> None:
    paths = {path.stem: path for path in (PROJECT / "benchmarks").glob("*.py")}
    imported: dict[str, set[str]] = {}
    for name, path in paths.items():
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        imported[name] = names & paths.keys()
    order = [*graphlib.TopologicalSorter(imported).static_order()]  # raises at a circle
    assert order.index("_words") < order.index("_plot") < order.index("_report")


def test_a_benchmark_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    done = run("--out", tmp_path, "no-such-thing")
    assert done.returncode == 2
    assert "'no-such-thing'" in done.stderr
    assert "pool" in done.stderr
