"""DiCache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Against, BlockChange, Blocks, Site
from cachepass.ir.predictors import Predictor, TwoAnchor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Accumulated, Limited, Relative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiCache(NamedPolicy):
    """Add up the change of a shallow probe; stand in along the line of the last two residuals.

    Rule: ``error += rel(probe's output, that of the call before)``; reuse while error < threshold.
    What stands in: see `TwoAnchor`. A computed call goes on from the probe. Source: DiCache (arXiv
    2508.17356) and its code.
    """

    name: ClassVar[str] = "dicache"

    threshold: float = 0.08
    """Error up to which is reused: .08 Wan, .1 Hunyuan, .4 FLUX [code]."""

    probe_blocks: int = 1
    """Blocks of the probe [code]."""

    warmup_steps: int | float = 0.2
    """Steps at the start that are computed [code]."""

    site: Site | None = None
    """What is skipped; None: the blocks after the probe, as in the source."""

    predictor: Predictor | str | None = None
    """What stands in; None: `TwoAnchor`, as in the source."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Accumulated` over a probe that is measured in two ways."""
        blocks = self.probe_blocks
        probe = BlockChange(name="probe", blocks=blocks, keep="output", against=Against.STEP)
        trend = BlockChange(name="trend", blocks=blocks, trend=True)
        estimate = Relative(signal=probe, also=(trend,))
        return Policy(
            name=self.name,
            sites=self.site or Blocks(name="tail", start=blocks),
            predictor=self.predictor or TwoAnchor(),
            trigger=Limited(
                trigger=Accumulated(estimate=estimate, threshold=self.threshold),
                warmup_steps=self.warmup_steps,
                last=1,
            ),
        )
