"""MagCache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Site
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policies.published import published
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Accumulated, Limited, MagnitudeRatio


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagCache(NamedPolicy):
    """Skip by calibrated ratios of the residual's magnitude from step to step.

    Rule: ``ratio *= γ_t``, ``error += |1 - ratio|``; reuse while error < threshold, at most
    `max_in_a_row` steps in a row. Nothing is measured: decisions are the same for all requests.
    Source: MagCache (arXiv 2506.09045, section 3.3) and its code.
    """

    name: ClassVar[str] = "magcache"

    threshold: float = 0.12
    """Error up to which is reused: .12 Wan, .24 Hunyuan [code]."""

    ratios: tuple[float, ...] | None = None
    """γ of each step, the first 1. None: the published ones of the model."""

    uncond_ratios: tuple[float, ...] = ()
    """Of the unconditional branch, where it was calibrated apart."""

    warmup_steps: int | float = 0.2
    """Steps at the start that are computed: a fifth of all [code]."""

    max_in_a_row: int | None = 2
    """K: 2 for Wan [code]."""

    site: Site | str = "step"
    """What is skipped; "stack" is the residual of all blocks, as in the source; the output costs
    less quality on flow matching [ours]."""

    predictor: Predictor | str | None = None
    """What stands in; the usual of the site is the last value."""

    def __post_init__(self) -> None:
        if self.ratios is not None:  # else it takes a model to know them
            super().__post_init__()

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Accumulated` over ratios."""
        ratios, uncond = self.ratios, self.uncond_ratios
        notes = []
        if ratios is None:
            found = published("magcache", config)
            if found is None:
                raise PolicyError(
                    "policy 'magcache' needs the ratios of this model, and none are published for "
                    f"{config.get('_class_name', 'it')}: let cachepass.calibrate(pipe, prompts, "
                    "policy='magcache') measure them, or give `ratios`"
                )
            ratios, uncond = tuple(found["ratios"]), tuple(found.get("uncond_ratios", ()))
            notes.append(f"magcache: published ratios, of {found['source']}")
        estimate = MagnitudeRatio(ratios=ratios, uncond_ratios=uncond)
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=self.predictor,
            trigger=Limited(
                trigger=Accumulated(estimate=estimate, threshold=self.threshold),
                warmup_steps=self.warmup_steps,
                max_in_a_row=self.max_in_a_row,
            ),
            notes=tuple(notes),
        )
