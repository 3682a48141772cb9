"""First-Block cache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import BlockChange, Site
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Below, Limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstBlock(NamedPolicy):
    """Run block 0; where its residual hardly changed, skip the rest.

    Rule: ``rel(r, r at the last full call) <= threshold``, per branch and row. Source: the
    First-Block cache of ParaAttention and of diffusers' hooks [code].
    """

    name: ClassVar[str] = "firstblock"

    threshold: float = 0.06
    """Relative L1 change up to which is reused: .05 Wan, .06 Hunyuan, .08 FLUX [code]."""

    warmup_steps: int | float = 10
    """Steps at the start that are computed in any case: a count, or (a float) a share of all. The
    sources have none; on the shapes testbed what is reused early costs most quality [ours]."""

    site: Site | str = "step"
    """What is skipped: by default the rest of the call, whose last output is returned.
    ``Blocks(name="tail", start=1)`` is the residual of the other blocks, as in the sources; the
    output costs less quality on flow matching [ours]."""

    predictor: Predictor | str | None = "taylor"
    """What stands in: the last value carried on by its last change [ours]; None is the last value
    as it was, as in the source."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Below` on the first block."""
        below = Below(signal=BlockChange(name="probe"), threshold=self.threshold)
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=self.predictor,
            trigger=Limited(trigger=below, warmup_steps=self.warmup_steps),
        )
