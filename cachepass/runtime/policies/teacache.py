"""TeaCache."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from cachepass.ir.boundary import Blocks, Signal, Site, TimestepChange
from cachepass.runtime.policy import COMPUTE, Facts, Policy, check
from cachepass.runtime.triggers import polynomial


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeaCache(Policy):
    """Add up the estimated change of the output; reuse the stack's residual while it is small.

    Rule: ``acc += poly(rel(m, m of the call before))``; ``acc < threshold`` reuses, else
    compute and ``acc = 0``. m is the timestep embedding that enters the blocks (Wan's
    choice), so the decisions are the same for all requests of one schedule. Per branch
    and row; the first and the last step are computed. Source: TeaCache (arXiv 2411.19108,
    section 3.3, equation 7) and its code.
    """

    name: ClassVar[str] = "teacache"

    threshold: float = 0.08
    """Accumulated change up to which is reused; belongs to `coefficients`."""

    coefficients: tuple[float, ...] = (1.0, 0.0)
    """Polynomial from the change of m to that of the output, high power first. A polynomial
    belongs to one model and one definition of m; the default is the identity, which fits none
    closely and needs no calibration. Wan 1.3B [code]: (2396.76752, -1311.10545, 201.331979,
    -8.29855975, .137887774) with threshold .05 to .08."""

    warmup_steps: int = 10
    """Steps at the start that are computed in any case: 1 in the paper, 5 with Wan's "ret steps"
    [code]; 10 for the shapes testbed at 50 steps [ours]."""

    def __post_init__(self) -> None:
        check(self.threshold >= 0, self, "threshold", "at least 0")
        check(len(self.coefficients) > 0, self, "coefficients", "at least one number")
        check(self.warmup_steps >= 1, self, "warmup_steps", "at least 1")

    def sites(self) -> tuple[Site, ...]:
        """The whole stack."""
        return (Blocks(name="stack"),)

    def signals(self) -> tuple[Signal, ...]:
        """The timestep embedding."""
        return (TimestepChange(name="timestep"),)

    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """`state` is the accumulated change, a float."""
        accumulated = (state or 0.0) + polynomial(self.coefficients, facts.signal("timestep").rel)
        forced = facts.step < self.warmup_steps or facts.is_last or "stack" not in facts.warm
        if forced or not accumulated < self.threshold:
            return COMPUTE, 0.0
        return frozenset({"stack"}), accumulated
