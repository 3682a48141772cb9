"""(a) What `compute` costs: cachepass without a cache against plain torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from benchmarks.figures import Figure, Result
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import CachedLoop, Loop, Progress, plain, plain_call
from cachepass.runtime.policies import Compute
from examples.shapes.model import load

# Short samples and many of them: drift within a round is what blurs the ratio most.
STEPS = 2
ROUNDS_PER_PAIR = 8


def against_plain(
    name: str, cached: CachedLoop, model: nn.Module, rounds: int, progress: Progress
) -> tuple[list[Figure], dict[str, list[float]]]:
    """Time a model's loop and that of two plain ones, in turns; the figures, and all seconds.

    All on one set of weights: where they lie in memory alone makes two equal models differ by some
    percent.
    """
    subjects: dict[str, Callable[[], object]] = {
        "plain": functools.partial(cached.loop.run, plain_call(plain(model))),
        "plain again": functools.partial(cached.loop.run, plain_call(plain(model))),
        name: cached,
    }
    progress("compiling")
    interleave(subjects, 2)  # compiles, then settles
    seconds = interleave(subjects, rounds, progress)
    figures = [
        Figure(
            name=f"{name} / plain",
            estimate=ratio(seconds[name], seconds["plain"]),
            at_most=1.02,
        ),
        Figure(
            name="plain again / plain (null)",
            estimate=ratio(seconds["plain again"], seconds["plain"]),
        ),
    ]
    return figures, seconds


def measure(pairs: int, progress: Progress) -> Result:
    """Time loops of two plain models and of `compute`, in turns."""
    model = load("large")
    cached = CachedLoop.build(Compute(), Loop.build(STEPS), model)
    figures, seconds = against_plain("compute", cached, model, ROUNDS_PER_PAIR * pairs, progress)
    milliseconds = {name: [1e3 * s / (2 * STEPS) for s in all_] for name, all_ in seconds.items()}
    call = Figure(name="one plain call", estimate=median(milliseconds["plain"]), unit="ms")
    return Result(
        figures=[*figures, call],
        details={"steps_per_sample": STEPS, "milliseconds_per_call": milliseconds},
    )
