"""(c) First calls in fresh processes: from nothing, and from Inductor's cache.

A first call is split in dynamo's part, which both sides pay alike, and the rest:
passes, AOTAutograd, Inductor, the C++ compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Figure, Result
from benchmarks.sampling import Estimate, median, ratio
from benchmarks.testbed import Progress

SHALLOW, DEEP = 12, 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process to start."""

    name: str
    what: str
    layers: int
    cache: str
    """A folder; the first to name it finds it empty. Inductor cannot cope with spaces."""


# The order is part of it: a warm start follows what fills its cache.
CASES = (
    Case(name="plain 12", what="plain", layers=SHALLOW, cache="plain"),
    Case(name="compute 12", what="compute", layers=SHALLOW, cache="compute"),
    Case(name="mixcache 12", what="mixcache", layers=SHALLOW, cache="mixcache"),
    Case(name="plain 40", what="plain", layers=DEEP, cache="plain-deep"),
    Case(name="compute 40", what="compute", layers=DEEP, cache="compute-deep"),
    Case(name="plain 12, warm", what="plain", layers=SHALLOW, cache="plain"),
    Case(name="compute 12, warm", what="compute", layers=SHALLOW, cache="compute"),
    Case(name="mixcache 12, warm", what="mixcache", layers=SHALLOW, cache="mixcache"),
    Case(name="mixcache 12 after compute", what="mixcache", layers=SHALLOW, cache="compute"),
)

Outcome = dict[str, Any]


def measure(repeats: int, progress: Progress) -> Result:
    """Start every case in its own process, in turns, `repeats` times."""
    outcomes: dict[str, list[Outcome]] = {case.name: [] for case in CASES}
    for i in range(repeats):
        with tempfile.TemporaryDirectory(prefix="cachepass-bench-") as folder:
            for case in CASES:
                progress(f"repeat {i + 1}/{repeats}: {case.name}")
                outcomes[case.name].append(_run(case, folder))
    return Result(figures=_figures(outcomes), details={"first_calls": outcomes})


def _run(case: Case, folder: str) -> Outcome:
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.first_call",
            "--what", case.what, "--layers", str(case.layers),
        ],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{case.cache}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )  # fmt: skip
    outcome: Outcome = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _figures(outcomes: dict[str, list[Outcome]]) -> list[Figure]:
    def part(name: str, key: str = "seconds") -> list[float]:
        return [outcome[key] for outcome in outcomes[name]]

    def compare(name: str, over: str, key: str = "seconds") -> Estimate:
        return ratio(part(name, key), part(over, key))

    growth = f"{SHALLOW} to {DEEP} blocks"
    figures = [
        Figure(
            name="compute / plain, cold, 12 blocks",
            estimate=compare("compute 12", "plain 12"),
            at_most=0.5,
        ),
        Figure(
            name="compute / plain, cold, 40 blocks",
            estimate=compare("compute 40", "plain 40"),
        ),
        Figure(
            name=f"compute, all but dynamo, {growth}",
            estimate=compare("compute 40", "compute 12", "other"),
            at_most=1.1,
        ),
        Figure(
            name=f"plain, all but dynamo, {growth}",
            estimate=compare("plain 40", "plain 12", "other"),
        ),
        Figure(
            name="mixcache / plain, cold, 12 blocks",
            estimate=compare("mixcache 12", "plain 12"),
        ),
        Figure(
            name="compute, warm / cold",
            estimate=compare("compute 12, warm", "compute 12"),
        ),
        Figure(
            name="mixcache, warm / cold",
            estimate=compare("mixcache 12, warm", "mixcache 12"),
        ),
        Figure(
            name="mixcache after compute / cold",
            estimate=compare("mixcache 12 after compute", "mixcache 12"),
        ),
        Figure(
            name="plain, warm / cold",
            estimate=compare("plain 12, warm", "plain 12"),
        ),
    ]
    for name in outcomes:
        figures.append(
            Figure(
                name=f"{name}: seconds",
                estimate=median(part(name)),
                unit="s",
                note=f"dynamo {median(part(name, 'dynamo')).value:.1f} s; {_cache(outcomes[name])}",
            )
        )
    return figures


def _cache(outcomes: Sequence[Outcome]) -> str:
    """What Inductor's cache did, in words; the same in each repeat or said to differ."""
    said = {
        f"cache hits {o['cache_hits']}, misses {o['cache_misses']}"
        + (f", bypasses {o['cache_bypasses']}" if o["cache_bypasses"] else "")
        + (f", whole graphs {o['whole_graph_hits']}" if o["whole_graph_hits"] else "")
        + (f", HEADERS COMPILED {o['headers_compiled']}" if o["headers_compiled"] else "")
        for o in outcomes
    }
    return said.pop() if len(said) == 1 else f"differs: {' | '.join(sorted(said))}"
