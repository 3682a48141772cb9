"""Checks every transformer that diffusers' pipelines call in a loop, and writes docs/models.md.

    python -m benchmarks.coverage                        all, eagerly: half an hour on two cores
    python -m benchmarks.coverage --compiled             with Inductor in both lowerings: two hours
    python -m benchmarks.coverage --only Wan,Flux        classes whose names hold a word

After a new release of diffusers, run it: a class that is new stands in the table as one without a
configuration, until tests/zoo has one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage import check
from benchmarks.coverage.loops import called_in_loops, transformer_classes
from benchmarks.coverage.page import page
from examples.shapes.progress import StatusLine
from tests.zoo import ZOO

LIMIT = 1800
"""Seconds after which a class is given up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = _parser().parse_args(arguments)
    wanted = [n for n in ZOO if not options.only or any(w in n for w in options.only.split(","))]
    kept: dict[str, Any] = {}
    if options.out.exists():
        kept = json.loads(options.out.read_text(encoding="utf-8"))
    status, done = StatusLine(), 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(_check, name, options.compiled): name for name in wanted}
        for finished in concurrent.futures.as_completed(running):
            name, done = running[finished], done + 1
            found = finished.result()
            if not options.compiled and name in kept:  # what was found compiled stays
                found["lowerings"] = kept[name].get("lowerings", {}) | found.get("lowerings", {})
            kept[name] = found
            status.update(f"{done}/{len(wanted)} {name}")
            # At once: what is found is not lost if a later class hangs.
            options.out.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")
    status.clear()
    text = page(kept, called_in_loops(), transformer_classes())
    options.page.write_text(text, encoding="utf-8")
    print(text[: text.index("|")].strip())


def _check(name: str, compiled: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", check.__name__, name, *(["--compiled"] if compiled else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    if done.returncode:
        return {"error": check.in_a_line(done.stderr.strip().splitlines()[-1])}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description="Check all of diffusers' transformers."
    )
    add = parser.add_argument
    add("--only", metavar="A,B", help="classes whose names hold one of these words")
    add("--compiled", action="store_true", help="with Inductor, too")
    add("--jobs", type=int, default=2, help="processes at a time, of a thread each")
    add("--out", type=Path, default=Path("benchmarks/results/coverage.json"))
    add("--page", type=Path, default=Path("docs/models.md"))
    return parser


if __name__ == "__main__":
    main()
