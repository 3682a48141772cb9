"""MagCache's ratios: how the size of the stack's residual goes on from step to step."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics

import torch
from torch import Tensor

from cachepass.calibrate.runs import Call, Fitted, Runs
from cachepass.calibrate.search import Line, replay, solve
from cachepass.errors import PolicyError
from cachepass.ir.boundary import Blocks
from cachepass.runtime.policies import MagCache

_STACK = Blocks()


def fit_magcache(runs: Runs, base: MagCache, rate: float | None) -> Fitted:
    """Mean over tokens, rows and prompts of |R_t| / |R_(t-1)|, R the residual of all blocks.

    |R| is the norm over the channels of a token. Of the first step, and where nothing was
    computed by this model before, it is 1. Branches other than `uncond` make up `ratios`. Source:
    MagCache (arXiv 2506.09045, section 3.3) and its code.

    Raises:
        PolicyError: a ratio is not finite.
    """
    before: dict[tuple[int, str], tuple[int, Tensor]] = {}
    found: dict[bool, dict[int, list[float]]] = {
        False: collections.defaultdict(list),
        True: collections.defaultdict(list),
    }
    length = 0

    def seen(call: Call) -> None:
        nonlocal length
        length = call.session.num_steps or 0
        rows = call.kept(_STACK.name)
        sizes = torch.cat([value.float().norm(dim=-1).flatten() for value in rows])
        prompt, last = before.get((call.denoiser, call.branch), (-1, sizes))
        ratio = float((sizes / last).mean()) if prompt == call.prompt else 1.0
        found[call.branch == "uncond"][call.step].append(ratio)
        before[call.denoiser, call.branch] = call.prompt, sizes

    runs.expect(len(runs.prompts))
    runs.watch(_STACK, (), seen)
    ratios, uncond = (
        tuple(statistics.fmean(of_step[step]) for step in sorted(of_step))
        for of_step in (found[False], found[True])
    )
    for step, ratio in enumerate((*ratios, *uncond)):
        if not math.isfinite(ratio):
            raise PolicyError(
                f"the ratio of the residuals' sizes is {ratio} at step {step % length}: tokens of "
                "size 0 or values that are not finite; this model needs another policy"
            )
    fields: dict[str, object] = {"ratios": ratios, "uncond_ratios": uncond}
    measured: dict[str, float] = {}
    if rate is not None:
        branches = ("cond", "uncond") if uncond else ("cond",)
        lines = [Line(branch=b, steps=length, measured=lambda *_: {}) for b in branches]
        fitted = dataclasses.replace(base, ratios=ratios, uncond_ratios=uncond)

        def share(threshold: float) -> float:
            return replay(dataclasses.replace(fitted, threshold=threshold).combine(), lines)

        fields["threshold"], measured["share"] = solve(share, rate, steps=length, policy=base.name)
    return Fitted(fields=fields, measured=measured)
