"""(a) What `compute` costs: cachepass without a cache against plain torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks.figures import Figure, Result
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import CachedLoop, Loop, Progress, plain, plain_call
from cachepass.runtime.policies import Compute
from examples.shapes.model import load

# Short samples and many of them: drift within a round is what blurs the ratio most.
STEPS = 2
ROUNDS_PER_PAIR = 8


def measure(pairs: int, progress: Progress) -> Result:
    """Time loops of two plain models and of `compute`, in turns."""
    loop = Loop.build(STEPS)
    # One set of weights for all: where they lie in memory alone makes two equal models
    # differ by some percent.
    model = load("large")
    subjects: dict[str, Callable[[], object]] = {
        "plain": functools.partial(loop.run, plain_call(plain(model))),
        "plain again": functools.partial(loop.run, plain_call(plain(model))),
        "compute": CachedLoop.build(Compute(), loop, model),
    }
    progress("compiling")
    interleave(subjects, 2)  # compiles, then settles
    seconds = interleave(subjects, ROUNDS_PER_PAIR * pairs, progress)
    milliseconds = {name: [1e3 * s / (2 * STEPS) for s in all_] for name, all_ in seconds.items()}
    return Result(
        figures=[
            Figure(
                name="compute / plain",
                estimate=ratio(seconds["compute"], seconds["plain"]),
                at_most=1.02,
            ),
            Figure(
                name="plain again / plain (null)",
                estimate=ratio(seconds["plain again"], seconds["plain"]),
            ),
            Figure(
                name="one plain call",
                estimate=median(milliseconds["plain"]),
                unit="ms",
            ),
        ],
        details={"steps_per_sample": STEPS, "milliseconds_per_call": milliseconds},
    )
