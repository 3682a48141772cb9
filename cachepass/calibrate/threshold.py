"""Thresholds of signals that caching itself changes: run the policy, and look at its report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cachepass import api
from cachepass.calibrate.runs import Fitted, Runs
from cachepass.errors import PolicyError
from cachepass.runtime.policies import for_model

RUNS = 6
"""At most so many, on the first prompt."""

_FACTOR = 4.0
"""From one threshold to the next, as long as the wished one lies outside of those tried."""


def fit_threshold(runs: Runs, base: Any, rate: float | None) -> Fitted:
    """Bisection of `threshold` (in its logarithm) by the share of blocks that were computed.

    Raises:
        PolicyError: the rate is out of reach by more than a step.
    """
    assert rate is not None
    runs.expect(RUNS)
    tried: dict[float, float] = {}
    low: float | None = None  # computes too much
    high: float | None = None
    threshold = base.threshold or 0.05
    with runs.compiled(base) as models:
        for _ in range(RUNS):
            for model in models:  # a threshold is no part of the program
                policy = dataclasses.replace(base, threshold=threshold)
                model.denoiser.policy = for_model(policy, model._orig_mod)
            runs(0)
            requests = [r for m in models for r in api.report(m).to_dict()["requests"][-1:]]
            blocks = sum(request["blocks"] for request in requests)
            share = sum(request["blocks_computed"] for request in requests) / blocks
            tried[threshold] = share
            if abs(share - rate) < 0.5 / runs.num_inference_steps:
                break
            if share > rate:
                low = threshold
            else:
                high = threshold
            if low is not None and high is not None:
                threshold = math.sqrt(low * high)
            else:
                threshold = threshold * _FACTOR if high is None else threshold / _FACTOR
    best = min(tried, key=lambda t: abs(tried[t] - rate))
    if high is None and tried[best] > rate + 1 / runs.num_inference_steps:
        raise PolicyError(
            f"calibrate(`rate`={rate:g}): policy {base.name!r} computed {tried[best]:.3g} of the "
            f"blocks even with a threshold of {max(tried):.3g}: choose a larger rate, or other "
            "`options` (a shorter warm-up, say)"
        )
    return Fitted(fields={"threshold": best}, measured={"share": tried[best]})
