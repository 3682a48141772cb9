"""EasyCache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Site
from cachepass.ir.predictors import RESIDUAL, Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Accumulated, Limited, TransformRate


@dataclasses.dataclass(frozen=True, kw_only=True)
class EasyCache(NamedPolicy):
    """Foretell the output's change from the latent's, by their ratio at full steps.

    Rule: see `TransformRate`; reuse while the sum is below `threshold`. What stands in is
    ``out = x + (out_k - x_k)``. Decided on the conditional call, shared by both. Source: EasyCache
    (arXiv 2507.02860, section 3.2) and its code.
    """

    name: ClassVar[str] = "easycache"

    threshold: float = 0.05
    """τ: .05 Wan, .025 Hunyuan [code]."""

    warmup_steps: int | float = 10
    """Steps at the start that are computed: 10 Wan, 5 Hunyuan [code]."""

    site: Site | str = "step"
    """What is skipped."""

    predictor: Predictor | str = RESIDUAL
    """What stands in: the latent plus the last difference to it, as in the source. "last" is the
    last output."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Accumulated` over the transformation rate; the last step is computed."""
        accumulated = Accumulated(estimate=TransformRate(), threshold=self.threshold)
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=self.predictor,
            trigger=Limited(trigger=accumulated, warmup_steps=self.warmup_steps, last=1),
        )
