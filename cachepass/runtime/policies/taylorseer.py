"""TaylorSeer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Site
from cachepass.ir.predictors import Taylor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Limited, Periodic


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaylorSeer(NamedPolicy):
    """Compute each `interval`-th step; in between, carry the finite differences on.

    Source: TaylorSeer (arXiv 2503.06923, section 3.2) and its code. The source forecasts every
    sublayer; sums of forecasts are forecasts of sums, so one for the whole call or stack is
    the same but for what lies between (and holds far less memory). ``site="attention"`` and
    ``"mlp"`` are sublayers.
    """

    name: ClassVar[str] = "taylorseer"

    interval: int = 5
    """Steps from one computed to the next [code]."""

    order: int = 1
    """Of the series, 0 to 3 [code]."""

    damping: float = 1.0
    """Below 1, less of the differences is carried on [ours]."""

    warmup_steps: int | float = 3
    """Steps at the start that are computed [code]."""

    site: Site | str | tuple[Site | str, ...] = "step"
    """What is skipped."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Periodic` with a `Taylor` predictor; the last step is computed."""
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=Taylor(order=self.order, damping=self.damping),
            trigger=Limited(
                trigger=Periodic(period=self.interval), warmup_steps=self.warmup_steps, last=1
            ),
        )
