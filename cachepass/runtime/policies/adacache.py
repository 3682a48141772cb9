"""AdaCache, with and without motion regularization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Kind, Site, SublayerChange
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Codebook, Limited, Motion

FAST_30 = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))
SLOW_30 = ((0.08, 3), (0.16, 2), (1.0, 1))
FAST_100 = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
FLOW_50 = ((0.04, 4), (0.055, 3), (0.08, 2), (1.0, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaCache(NamedPolicy):
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

    site: Site | str = "step"
    """What is skipped: by default the call, whose last output is returned. "stack" is the residual
    of all blocks, as in the paper; the output costs less quality on flow matching [ours]."""

    predictor: Predictor | str | None = "taylor"
    """What stands in: the last value carried on by its last change [ours]; None is the last value
    as it was, as in the source."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """A codebook over the change of one sublayer's residual."""
        signal = SublayerChange(
            name="attention", kind=Kind.SELF_ATTENTION, block=self.block, motion=self.motion
        )
        motion = Motion(
            scale=self.motion_scale,
            power=self.motion_power,
            gradient=self.motion_gradient,
            window=self.motion_window,
        )
        codebook = Codebook(
            signal=signal, codebook=self.codebook, motion=motion if self.motion else None
        )
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=self.predictor,
            trigger=Limited(trigger=codebook, warmup_steps=1, last=2),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
