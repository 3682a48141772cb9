"""TeaCache's polynomial: from the change of the timestep embedding to that of the output."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from cachepass.calibrate.runs import Call, Fitted, Runs
from cachepass.calibrate.search import Line, replay, solve
from cachepass.errors import PolicyError
from cachepass.ir.boundary import CacheChange, TimestepChange, WholeCall
from cachepass.runtime.policies import TeaCache
from cachepass.runtime.policy import Measure
from cachepass.runtime.triggers.accumulated import polynomial

DEGREE = 4
"""Of the polynomial [code]."""

_TIME = TimestepChange()
_OUTPUT = CacheChange(name="output", site="step")


def fit_teacache(runs: Runs, base: TeaCache, rate: float | None) -> Fitted:
    """Least squares over all prompts, branches, rows and steps but the first.

    x is rel(timestep embedding, that of the call before), y rel(output, the one before). Source:
    TeaCache (arXiv 2411.19108, section 3.3) and its code.

    Raises:
        PolicyError: too few steps for a polynomial of that degree.
    """
    import numpy as np  # comes with diffusers, not with torch

    points: list[tuple[float, float]] = []
    changes: dict[tuple[int, str, int], dict[int, float]] = collections.defaultdict(dict)
    length = 0

    def seen(call: Call) -> None:
        nonlocal length
        length = call.session.num_steps or 0
        both = zip(call.measures(_TIME.name), call.measures(_OUTPUT.name), strict=True)
        for row, (x, y) in enumerate(both):
            changes[call.prompt, call.branch, row][call.step] = x.rel
            if math.isfinite(x.rel) and math.isfinite(y.rel):
                points.append((x.rel, y.rel))

    runs.expect(len(runs.prompts))
    runs.watch(WholeCall(), (_TIME, _OUTPUT), seen)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) <= DEGREE:
        raise PolicyError(
            f"calibrate(`num_inference_steps`={runs.num_inference_steps}): a polynomial of degree "
            f"{DEGREE} takes at least {DEGREE + 1} different changes of the timestep embedding, "
            f"and {len(set(xs))} were measured: take at least {DEGREE + 2} steps"
        )
    # `full` returns the rank, where polyfit would warn of it.
    coefficients = tuple(float(c) for c in np.polyfit(xs, ys, DEGREE, full=True)[0])
    errors = [(polynomial(coefficients, x) - y) ** 2 for x, y in points]
    fields: dict[str, object] = {"coefficients": coefficients}
    measured = {"error": math.sqrt(sum(errors) / len(errors))}
    if rate is not None:
        lines = _lines(changes, length)
        fitted = dataclasses.replace(base, coefficients=coefficients)

        def share(threshold: float) -> float:
            return replay(dataclasses.replace(fitted, threshold=threshold).combine(), lines)

        threshold, reached = solve(share, rate, steps=length, policy=base.name)
        fields["threshold"], measured["share"] = threshold, reached
    return Fitted(fields=fields, measured=measured)


def _lines(changes: Mapping[tuple[int, str, int], Mapping[int, float]], steps: int) -> list[Line]:
    """Each different course of changes once: most models have one for all prompts."""
    courses = {
        (branch, tuple(of_step.get(step, math.nan) for step in range(steps)))
        for (_, branch, _), of_step in changes.items()
    }

    def line(branch: str, course: tuple[float, ...]) -> Line:
        def measured(step: int, _: Sequence[int]) -> dict[str, Measure]:
            return {_TIME.name: Measure(diff=course[step], ref=1.0, step=step, gap=1)}

        return Line(branch=branch, steps=steps, measured=measured)

    return [line(*course) for course in sorted(courses)]
