"""(a) What `compute` costs: cachepass without a cache against plain torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import cachepass
from benchmarks.figures import Figure, Result
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import Call, Loop, Progress, plain, plain_call, session_call
from examples.shapes.model import load

CALLS = 2


def measure(pairs: int, progress: Progress) -> Result:
    """Time single calls of two plain models and of `compute`, in turns."""
    loop = Loop.build(CALLS)
    # One set of weights for all: where they lie in memory alone makes two equal models
    # differ by some percent.
    model = load("large")
    first, second = plain(model), plain(model)
    cached = cachepass.compile(model, policy="compute")

    @torch.no_grad()
    def calls(call: Call) -> None:
        for i, time in enumerate(loop.times):
            call(loop.noise, time, loop.cond, i, "cond")

    def cached_calls() -> None:
        session = cachepass.session(cached, num_inference_steps=CALLS)
        calls(session_call(cached, session))

    subjects: dict[str, Callable[[], object]] = {
        "plain": functools.partial(calls, plain_call(first)),
        "plain again": functools.partial(calls, plain_call(second)),
        "compute": cached_calls,
    }
    progress("compiling")
    interleave(subjects, 2)  # compiles, then settles
    seconds = interleave(subjects, pairs, progress)
    milliseconds = {name: [1e3 * s / CALLS for s in all_] for name, all_ in seconds.items()}
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
        details={"calls_per_sample": CALLS, "milliseconds_per_call": milliseconds},
    )
