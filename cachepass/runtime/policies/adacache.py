"""AdaCache, with and without motion regularization."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from cachepass.ir.boundary import Blocks, Kind, Signal, Site, SublayerChange
from cachepass.runtime.policy import COMPUTE, Facts, Policy, check
from cachepass.runtime.triggers import look_up

FAST_30 = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))
SLOW_30 = ((0.08, 3), (0.16, 2), (1.0, 1))
FAST_100 = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
FLOW_50 = ((0.04, 4), (0.055, 3), (0.08, 2), (1.0, 1))


@dataclasses.dataclass(frozen=True, slots=True)
class AdaCacheState:
    """Of one row: when it last computed, what followed from it, the motion before."""

    last: int = 0
    rate: int = 1
    motion: float = 1.0
    seen: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaCache(Policy):
    """Let the change of a middle block's attention residual say when to compute next.

    At each computed step ``diff = rel(R, R cached) / steps since``; a codebook maps it to a
    rate, the number of steps to the next computation. In between, the stack's residual
    stands in (the sum of the per-block residuals that the paper caches). The first and the
    last two steps are computed. Source: AdaCache (arXiv 2411.02397, sections 3.2 and 3.3)
    and its code.

    Motion regularization: ``diff *= r + |g|`` with ``r = (m / motion_scale) **
    motion_power`` and ``g = motion_gradient * (r - r before) / rate``, m the mean change of
    R from frame to frame over its size. More motion means a larger diff, so more is
    computed. Active for steps in `motion_window`.
    """

    name: ClassVar[str] = "adacache"
    needs_num_steps: ClassVar[bool] = True
    shared_by_branches: ClassVar[bool] = True

    codebook: tuple[tuple[float, int], ...] = FLOW_50
    """(bound, rate), ascending. The default fits 50 flow-matching steps [ours]; FAST_30,
    SLOW_30 and FAST_100 of this module are the published ones [code]."""

    block: int | float = 0.5
    """The block that is looked at; 13 of 28 in Open-Sora [code], the middle elsewhere [ours]."""

    motion: bool = True
    """Motion regularization."""

    motion_scale: float = 0.09
    """Motion score that leaves the diff as it is: .385 for Open-Sora [code], which saturates
    elsewhere; the default is what a still video of the shapes testbed has [ours]."""

    motion_power: float = 0.5
    """Exponent: 1 in the paper's text, 8 for Open-Sora [code]; .5 on the shapes testbed [ours]."""

    motion_gradient: float = 10.0
    """Weight of the change of the motion score [code]."""

    motion_window: tuple[float, float] = (4 / 30, 26 / 30)
    """Share of the steps in which motion counts: steps 4 to 26 of 30 [code]."""

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.codebook]
        check(
            bool(bounds) and bounds == sorted(bounds) and all(r >= 1 for _, r in self.codebook),
            self,
            "codebook",
            "pairs (bound, rate) with ascending bounds and rates of at least 1",
        )
        check(self.motion_scale > 0, self, "motion_scale", "above 0")
        low, high = self.motion_window
        check(
            0 <= low <= high <= 1,
            self,
            "motion_window",
            "two ascending shares from 0 to 1",
        )

    def sites(self) -> tuple[Site, ...]:
        """The whole stack."""
        return (Blocks(name="stack"),)

    def signals(self) -> tuple[Signal, ...]:
        """The gated self-attention residual of one block."""
        return (
            SublayerChange(
                name="attention",
                kind=Kind.SELF_ATTENTION,
                block=self.block,
                motion=self.motion,
            ),
        )

    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """Compute at the first and last two steps and when the rate is up."""
        row: AdaCacheState = state or AdaCacheState()
        measure = facts.signal("attention")
        if measure.step > row.seen and not math.isnan(measure.rel):
            diff = measure.rel / measure.gap
            motion = row.motion
            if self.motion and measure.motion is not None and self._in_window(measure.step, facts):
                motion = (measure.motion / self.motion_scale) ** self.motion_power
                gradient = self.motion_gradient * (motion - row.motion) / row.rate
                diff *= motion + abs(gradient)
            row = AdaCacheState(row.last, look_up(self.codebook, diff), motion, measure.step)
        assert facts.num_steps is not None
        edge = facts.step == 0 or facts.step >= facts.num_steps - 2
        if edge or facts.step >= row.last + row.rate or "stack" not in facts.warm:
            return COMPUTE, dataclasses.replace(row, last=facts.step)
        return frozenset({"stack"}), row

    def _in_window(self, step: int, facts: Facts) -> bool:
        assert facts.num_steps is not None
        low, high = self.motion_window
        return low * facts.num_steps < step + 1 < high * facts.num_steps
