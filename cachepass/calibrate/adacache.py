"""AdaCache's motion scale, and the bounds of its codebook."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from cachepass.calibrate.runs import Call, Fitted, Runs
from cachepass.calibrate.search import Line, replay, solve
from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import WholeCall
from cachepass.runtime.policies import AdaCache
from cachepass.runtime.policy import Measure
from cachepass.runtime.session import Observation, Sums

Course = dict[int, dict[int, list[Measure]]]
"""Step -> steps back -> the measures of the branches."""


def fit_adacache(runs: Runs, base: AdaCache, rate: float | None) -> Fitted:
    """The median motion score as `motion_scale`; with a rate, one factor for all bounds.

    The median is over prompts, branches, rows and all steps but the first, which measures nothing.
    The residual is compared with those of as many steps before as the codebook may skip, so that a
    replay meets what the rule would measure, but for what caching itself changes.

    Raises:
        PolicyError: there is nothing to fit.
    """
    (signal,) = base.combine().trigger.signals()
    longest = max(steps for _, steps in base.codebook) if rate is not None else 1
    kept: dict[tuple[int, str], collections.deque[tuple[int, int, list[Tensor]]]] = {}
    courses: dict[tuple[int, int], Course] = collections.defaultdict(dict)
    scores: list[float] = []
    length = 0

    def seen(call: Call) -> None:
        nonlocal length
        length = call.session.num_steps or 0
        now = call.kept(signal.name)
        key = (call.denoiser, call.branch)
        earlier = kept.setdefault(key, collections.deque(maxlen=longest))
        for row, measure in enumerate(call.measures(signal.name)):
            of_step = courses[call.prompt, row].setdefault(call.step, {})
            if measure.second is not None:
                scores.append(measure.second)
            for prompt, step, values in earlier:
                if prompt == call.prompt:
                    sums = Sums(ops.l1_sums(now[row], values[row]), 1)
                    found = Observation(sums, 0, call.step, step).measure()
                    found = dataclasses.replace(found, second=measure.second)
                    of_step.setdefault(found.gap, []).append(found)
        earlier.append((call.prompt, call.step, now))

    if rate is None and not base.motion:
        raise PolicyError(
            "policy 'adacache' without `motion` has nothing to fit but its `codebook`: say with "
            "`rate` which share of the steps is to be computed, such as rate=0.5"
        )
    runs.expect(len(runs.prompts))
    runs.watch(WholeCall(), (signal,), seen)
    fields: dict[str, object] = {}
    measured: dict[str, float] = {}
    if base.motion and scores:
        fields["motion_scale"] = statistics.median(scores)
    fitted = dataclasses.replace(base, **fields)  # type: ignore[arg-type]
    if rate is not None:
        lines = [_line(signal.name, course, length) for course in courses.values()]

        def scaled(factor: float) -> tuple[tuple[float, int], ...]:
            return tuple((bound * factor, steps) for bound, steps in base.codebook)

        def share(factor: float) -> float:
            return replay(dataclasses.replace(fitted, codebook=scaled(factor)).combine(), lines)

        factor, measured["share"] = solve(share, rate, steps=length, policy=base.name)
        fields["codebook"] = scaled(factor)
    elif not fields:
        raise PolicyError(
            "policy 'adacache' found no motion to fit `motion_scale` to (the model's latent is no "
            "video): give `rate`, by which its `codebook` is scaled"
        )
    return Fitted(fields=fields, measured=measured)


def _line(name: str, course: Course, steps: int) -> Line:
    def measured(_: int, full: Sequence[int]) -> Mapping[str, Measure]:
        if len(full) < 2:
            return {}
        of_branches = course[full[-1]].get(full[-1] - full[-2])
        return {name: _together(of_branches)} if of_branches else {}

    return Line(branch="cond", steps=steps, measured=measured)


def _together(measures: Sequence[Measure]) -> Measure:
    """The branches decide together: sums add up."""
    seconds = [m.second for m in measures if m.second is not None and math.isfinite(m.second)]
    return dataclasses.replace(
        measures[0],
        diff=sum(m.diff for m in measures),
        ref=sum(m.ref for m in measures),
        second=statistics.fmean(seconds) if seconds else None,
    )
