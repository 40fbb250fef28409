"""``python -m benchmarks``: measure, draw, and write a page about it.

Runs the scripts of this folder that have no underscore, each in a process of its own, since some of
them patch and some must not. Each can be run alone as well, with the same options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _page import write_page  # noqa: E402

NAMES = sorted(path.stem for path in HERE.glob("[!_]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure gsplice beside what people would use otherwise, as far as that is "
        "installed. Writes FOLDER/RESULTS.md, and figures and pictures to FOLDER/results. What an "
        "earlier run has left there of other benchmarks stays, and stays on the page.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; or all")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="a rough idea, in two minutes")
    effort.add_argument("--check", action="store_true", help="only whether it runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark-results"), metavar="FOLDER", help="%(default)s"
    )
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}, but {', '.join(NAMES)}")
    results: Path = options.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    command = [f"--{effort}" for effort in ("quick", "check") if getattr(options, effort)]
    failed = []
    for name in options.names or NAMES:
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        script = HERE / f"{name}.py"
        done = subprocess.run([sys.executable, script, *command, "--out", results], check=False)
        if done.returncode:
            failed.append(name)
        print(f"\n  {name} took {time.monotonic() - start:.0f} s")
    page = write_page(options.out, results)
    print(f"\nwritten: {page}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
