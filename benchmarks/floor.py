"""(b) What a policy's decisions cost: its loop against the floor of the blocks it computed.

The floor is what plain torch.compile would need for the same blocks: every call pays T0,
the model without blocks, and T_block for each block that was computed. Both come from a
line through plain models of no, half and all blocks, fitted anew in each round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.figures import Figure, Result
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import (
    ADAPTIVE,
    CachedLoop,
    Loop,
    Progress,
    cut,
    plain,
    plain_call,
    uniform,
)
from cachepass.runtime.policy import NamedPolicy
from examples.shapes.model import SIZES, load

STEPS = 50
PLAIN_STEPS = 10
NULL = "plain again"


def fit(blocks: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(T0, T_block) by least squares over models of so many blocks."""
    slope, start = np.polyfit(blocks, seconds, 1)
    return float(start), float(slope)


def measure(pairs: int, progress: Progress) -> Result:
    """Time the loops of all policies and of the plain models, in turns."""
    layers = SIZES["large"].layers
    sizes = (0, layers // 2, layers)
    policies: dict[str, NamedPolicy] = {**ADAPTIVE, "uniform, period 2": uniform(STEPS)}

    # One set of weights for all: where they lie in memory alone makes two equal models
    # differ by some percent.
    model = load("large")
    short = Loop.build(PLAIN_STEPS)
    plain_loops: dict[str, Callable[[], object]] = {
        name: functools.partial(short.run, plain_call(plain(cut(model, blocks))))
        for name, blocks in [*((f"plain {n}", n) for n in sizes), (NULL, layers)]
    }
    full = Loop.build(STEPS)
    cached = {name: CachedLoop.build(policy, full, model) for name, policy in policies.items()}
    subjects: dict[str, Callable[[], object]] = {**plain_loops, **cached}

    for name, subject in subjects.items():
        progress(f"compiling: {name}")
        subject()
    seconds = interleave(subjects, pairs, progress)

    per_call = {name: [s / (2 * PLAIN_STEPS) for s in seconds[name]] for name in plain_loops}
    fits = [
        fit(sizes, times) for times in zip(*(per_call[f"plain {n}"] for n in sizes), strict=True)
    ]
    figures = []
    requests = {name: loop.last_request() for name, loop in cached.items()}
    for name, request in requests.items():
        calls, computed = len(request["steps"]), request["blocks_computed"]
        floors = [calls * start + computed * block for start, block in fits]
        counts = ", ".join(f"{kind} {count}" for kind, count in request["calls"].items())
        share = computed / request["blocks"]
        figures.append(
            Figure(
                name=f"{name} / floor",
                estimate=ratio(seconds[name], floors),
                at_most=1.03,
                note=f"{share:.0%} of blocks: {counts}",
            )
        )
    figures += [
        Figure(
            name="plain again / floor (null)",
            estimate=ratio(per_call[NULL], [t0 + layers * block for t0, block in fits]),
        ),
        Figure(
            name="half of the blocks / floor (fit)",
            estimate=ratio(
                per_call[f"plain {sizes[1]}"], [t0 + sizes[1] * block for t0, block in fits]
            ),
        ),
        Figure(name="T0", estimate=median([1e3 * t0 for t0, _ in fits]), unit="ms"),
        Figure(name="T_block", estimate=median([1e3 * b for _, b in fits]), unit="ms"),
    ]
    return Result(
        figures=figures,
        details={
            "steps": STEPS,
            "seconds": seconds,
            "t0_and_t_block": fits,
            "requests": {
                name: {k: request[k] for k in ("calls", "blocks_computed", "blocks")}
                for name, request in requests.items()
            },
        },
    )
