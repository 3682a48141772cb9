"""FasterCache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Cfg, Kind, Sublayers
from cachepass.ir.predictors import Extrapolate, FrequencySplit
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Periodic, PerSite, Windowed

_SELF = (Kind.SELF_ATTENTION, Kind.SPATIAL_ATTENTION, Kind.TEMPORAL_ATTENTION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterCache(NamedPolicy):
    """Extrapolated attention at every other step, and an unconditional call in two bands.

    Attention: ``A1 + w (A1 - A2)`` (see `Extrapolate`). Guidance: the difference of the branches
    split by frequency, each band with a growing weight (see `FrequencySplit`). Source:
    FasterCache (arXiv 2410.19355) and the hooks of diffusers [code].
    """

    name: ClassVar[str] = "fastercache"

    attention_period: int = 2
    """Steps from one computed self-attention to the next [code]."""

    attention_weight: float = 0.5
    """w [code]."""

    attention_timesteps: tuple[float, float] = (-1, 681)
    """Between which attention is reused [code]."""

    cfg_period: int = 5
    """Steps from one unconditional call to the next [code]."""

    cfg_growth: float = 1.1
    """Factor on the bands at each reused step: 1.1; 1.15 for Open-Sora [code]."""

    cfg_timesteps: tuple[float, float] = (-1, 641)
    """Between which the unconditional call is reused [code]."""

    start: int | float = 0.36
    """First step that reuses: 18 of 50, 12 of 30 [code]."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """A trigger for each of two sites."""
        return Policy(
            name=self.name,
            sites=(
                Sublayers(
                    name="self-attention",
                    kinds=_SELF,
                    predictor=Extrapolate(weight=self.attention_weight),
                ),
                Cfg(predictor=FrequencySplit(growth=self.cfg_growth)),
            ),
            trigger=PerSite(
                triggers={
                    "self-attention": Windowed(
                        trigger=Periodic(period=self.attention_period, absolute=True),
                        timesteps=self.attention_timesteps,
                        start=self.start,
                    ),
                    "cfg": Windowed(
                        trigger=Periodic(period=self.cfg_period),
                        timesteps=self.cfg_timesteps,
                        start=self.start,
                    ),
                }
            ),
        )
