"""The page about the results, made of what the benchmarks have left in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _words import text

INTRODUCTION = """\
# Results

Written by `python -m benchmarks`; [README.md](README.md) says what each part measures. Times are
medians of rounds in which all sides took turns. Compare the sides of one table, and nothing across
tables: the machine may have been busy with other things at another time.
"""


def write_page(folder: Path, results: Path) -> Path:
    """Write RESULTS.md into *folder* about the figures in *results*; return its path."""
    sections = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    page = folder / "RESULTS.md"
    parts = [INTRODUCTION, *_machine(sections), *_targets(sections)]
    for section in sections:
        parts += _section(section, results.relative_to(folder))
    parts += _repeat()
    page.write_text("\n".join(parts))
    return page


def _machine(sections: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Where\n"
    for machine in sorted({section["machine"] for section in sections}):
        yield f"- {machine}"
    versions: dict[str, str] = {}
    for section in sections:
        versions |= section["versions"]
    yield "- " + ", ".join(f"{what} {versions[what]}" for what in sorted(versions, key=str.lower))
    for section in sections:
        first, last = section["load"]
        yield (
            f"- {section['section']}: a {section['effort']} run; load average {first:.1f} when it "
            f"began, {last:.1f} when it ended"
        )
    for section in sections:
        for what in section["left out"]:
            yield f"- left out of {section['section']}: {what}"
    yield ""


def _targets(sections: list[dict[str, Any]]) -> Iterator[str]:
    targets = [(section["section"], each) for section in sections for each in section["targets"]]
    costs = [each for each in targets if each[1].get("cost")]
    yield from _table("What it costs where it can't help", costs)
    yield from _table("Targets", [each for each in targets if each not in costs])


def _table(title: str, targets: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    met = sum(target["met"] for _, target in targets)
    yield f"## {title}: {met} of {len(targets)} met\n"
    yield "| | what | bound | measured | |"
    yield "| --- | --- | --- | ---: | --- |"
    for section, target in targets:
        word = "met" if target["met"] else f"**missed**. {target['cause']}".rstrip(". ")
        yield (
            f"| {section} | {target['what']} | {target['bound']} | {text(target['value'])} | "
            f"{word} |"
        )
    yield ""


def _section(section: dict[str, Any], results: Path) -> Iterator[str]:
    name = section["section"]
    yield f"## {name}\n"
    yield section["about"].strip() + "\n"
    for picture, spec in section["pictures"].items():
        yield f"![{spec['title']}]({results / picture}.svg)\n"
    for title, table in section["tables"].items():
        yield f"<details><summary>{title}</summary>\n"
        yield f"| {' | '.join(table['head'])} |"
        yield f"| --- |{' ---: |' * (len(table['head']) - 1)}"
        for row in table["rows"]:
            yield f"| {' | '.join(map(text, row))} |"
        yield "\n</details>\n"


def _repeat() -> Iterator[str]:
    yield """\
## To repeat it

```sh
pip install '.[bench]'
python -m benchmarks --out FOLDER            # all of it, on a machine that does nothing else
python -m benchmarks --quick --out FOLDER    # a rough idea, in two minutes
python -m benchmarks --out FOLDER servers    # one part; the others stay as they were
```

Of nginx, haproxy, Go, wrk and a C compiler, what is installed is used, and what is not is left out.
"""
