"""First-Block cache."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from cachepass.ir.boundary import BlockChange, Blocks, Signal, Site
from cachepass.runtime.policy import COMPUTE, Facts, Policy, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstBlock(Policy):
    """Run block 0; where its residual hardly changed, reuse the residual of all others.

    Rule: ``rel(r, r at the last full call) <= threshold``, per branch and row. Source: the
    First-Block cache of ParaAttention and of diffusers' hooks [code].
    """

    name: ClassVar[str] = "firstblock"

    threshold: float = 0.06
    """Relative L1 change up to which the tail is reused: .05 Wan, .06 Hunyuan, .08 FLUX [code]."""

    warmup_steps: int = 10
    """Steps at the start that are computed in any case. The sources have none; on the shapes
    testbed what is reused before step 10 of 50 costs most quality [ours]."""

    def __post_init__(self) -> None:
        check(self.threshold >= 0, self, "threshold", "at least 0")
        check(self.warmup_steps >= 0, self, "warmup_steps", "at least 0")

    def sites(self) -> tuple[Site, ...]:
        """All blocks but the first."""
        return (Blocks(name="tail", start=1),)

    def signals(self) -> tuple[Signal, ...]:
        """The residual of the first block."""
        return (BlockChange(name="probe", block=0),)

    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """Compare with the threshold; NaN computes."""
        small = facts.signal("probe").rel <= self.threshold
        if facts.step < self.warmup_steps or not small or "tail" not in facts.warm:
            return COMPUTE, state
        return frozenset({"tail"}), state
