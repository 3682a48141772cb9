"""Pyramid Attention Broadcast."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Kind, Sublayers
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Periodic, PerSite, Windowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PAB(NamedPolicy):
    """Compute each kind of attention at its own pace, and use its last output in between.

    Rule: within a window of timesteps, reuse where ``step % range != 0``. Kinds that a model has
    not are left out, and so is the published broadcast of MLPs. Source: PAB (arXiv 2408.12588,
    section 3.2) and its code.
    """

    name: ClassVar[str] = "pab"

    self_attention: int = 2
    """Steps from one computation to the next where attention is over all tokens: 2 [code]."""

    spatial: int = 2
    """Of attention within frames: 2 [code]."""

    temporal: int = 4
    """Of attention across frames: 4 for Open-Sora, 3 for Latte [code]."""

    cross: int = 6
    """Of attention to the text: 6 [code]."""

    timesteps: tuple[float, float] = (100, 850)
    """Between which is reused: (450, 930) for Open-Sora, (100, 800) for Latte, (100, 850) for
    CogVideoX [code]."""

    predictor: Predictor | str | None = None
    """What stands in; the usual is the last output."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Periodic` for each kind, within a window."""
        periods = {
            Kind.SELF_ATTENTION: self.self_attention,
            Kind.SPATIAL_ATTENTION: self.spatial,
            Kind.TEMPORAL_ATTENTION: self.temporal,
            Kind.CROSS_ATTENTION: self.cross,
        }
        return Policy(
            name=self.name,
            sites=tuple(
                Sublayers(name=kind.value, kinds=(kind,), optional=True) for kind in periods
            ),
            predictor=self.predictor,
            trigger=PerSite(
                triggers={
                    kind.value: Windowed(
                        trigger=Periodic(period=period, absolute=True), timesteps=self.timesteps
                    )
                    for kind, period in periods.items()
                }
            ),
        )
