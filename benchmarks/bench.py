"""Measures speed and quality, prints a table and keeps the figures as JSON.

    python -m benchmarks.bench                 everything, most of an hour
    python -m benchmarks.bench --only a,c      parts of it

What the parts mean is in benchmarks/README.md. Figures are ratios of times taken in
turns on one machine, which should have nothing else to do; no test depends on them.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import compile_time, floor, graph_time, one_graph, overhead, quality, relay
from benchmarks.figures import Result, keep, parts_of, table
from benchmarks.testbed import Progress
from examples.shapes.progress import StatusLine

TITLES = {
    "a": "(a) cachepass without a cache against plain torch.compile",
    "b": "(b) policies against the floor of the blocks they compute",
    "c": "(c) first calls in fresh processes",
    "d": "(d) quality at equal cost",
    "e": "(e) a small model takes over",
    "f": "(f) one graph, and onnxruntime",
    "g": "(g) capture and passes of a deep model",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    parts: dict[str, Callable[[Progress], Result]] = {
        "a": lambda progress: overhead.measure(options.pairs, progress),
        "b": lambda progress: floor.measure(options.pairs, progress),
        "c": lambda progress: compile_time.measure(options.repeats, progress),
        "d": lambda progress: quality.measure(
            options.prompts, options.seeds, options.window, progress
        ),
        "e": lambda progress: relay.measure(options.prompts, options.seeds, progress),
        "f": lambda progress: one_graph.measure(options.pairs, options.videos, progress),
        "g": lambda progress: graph_time.measure(options.repeats, progress),
    }
    status = StatusLine()
    tables = []
    for part in options.only:
        started = time.perf_counter()
        result = parts[part](functools.partial(_show, status, part))
        seconds = time.perf_counter() - started
        status.clear()
        # At once: what is measured is not lost if a later part fails.
        keep(options.out, part, result, seconds)
        print(f"({part}) done in {seconds:.0f} s", flush=True)
        tables.append(table(TITLES[part], result.figures))
    print("\n" + "\n\n".join(tables))
    print(f"\nmedians or means with 95 % intervals; details in {options.out}")


def _show(status: StatusLine, part: str, what: str) -> None:
    status.update(f"({part}) {what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description="Measure what cachepass costs and gains.",
    )
    add = parser.add_argument
    add(
        "--only",
        type=parts_of(TITLES),
        default=list(TITLES),
        metavar="A,B",
        help="parts: a,b,c,d,e,f,g",
    )
    add("--pairs", type=int, default=15, help="(a, b, f) rounds; at least 15 for a figure")
    add("--repeats", type=int, default=3, help="(c, g) fresh processes, or rounds")
    add("--prompts", type=int, default=4, help=f"(d, e) at most {len(quality.PROMPTS)}")
    add("--seeds", type=int, default=2, help="(d, e) videos for each prompt")
    add("--videos", type=int, default=5, help="(f) rounds of videos")
    add("--window", type=float, default=0.1, help="(d) costs of schedules around a policy's")
    add("--out", type=Path, default=Path("benchmarks/results/bench.json"))
    return parser


if __name__ == "__main__":
    main()
