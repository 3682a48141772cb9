"""TeaCache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Site, TimestepChange
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policies.published import published
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy
from cachepass.runtime.triggers import Accumulated, Limited, Relative


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeaCache(NamedPolicy):
    """Add up the estimated change of the output; reuse while it is small.

    Rule: ``acc += poly(rel(m, m of the call before))``; ``acc < threshold`` reuses, else
    compute and ``acc = 0``. m is the timestep embedding that enters the blocks (the
    projection, in Wan's code), so the decisions are the same for all requests of one schedule.
    Per branch and row; the first and the last step are computed. Source: TeaCache (arXiv
    2411.19108, section 3.3, equation 7) and its code.
    """

    name: ClassVar[str] = "teacache"

    threshold: float = 0.08
    """Accumulated change up to which is reused; belongs to `coefficients`. With published ones
    .05 to .08 for Wan 1.3B, .14 to .2 for 14B [code]."""

    coefficients: tuple[float, ...] | None = None
    """Polynomial from the change of m to that of the output, high power first. None: the
    published one of the model, where there is one for this m; else the identity, which fits no
    model closely (`cachepass.calibrate` fits one)."""

    warmup_steps: int | float = 10
    """Steps at the start that are computed in any case: 1 in the paper, 5 with the polynomials for
    Wan's projection [code]; 10 for the shapes testbed at 50 steps [ours]."""

    site: Site | str = "step"
    """What is skipped: by default the call, whose last output is returned, as in the paper's
    text. "stack" is the residual of all blocks, as in its code; the output costs less quality on
    flow matching [ours]."""

    predictor: Predictor | str | None = "taylor"
    """What stands in: the last value carried on by its last change [ours]; None is the last value
    as it was, as in the source."""

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Accumulated` over the timestep embedding."""
        found = published("teacache", config) if self.coefficients is None else None
        coefficients = self.coefficients if found is None else found["coefficients"]
        notes = [f"teacache: published polynomial, of {found['source']}"] if found else []
        if coefficients is None:
            coefficients = (1.0, 0.0)
            notes.append(
                "teacache: no published polynomial fits this model and its timestep embedding; the "
                "identity is used. cachepass.calibrate fits one"
            )
        estimate = Relative(signal=TimestepChange(), coefficients=tuple(coefficients))
        accumulated = Accumulated(estimate=estimate, threshold=self.threshold)
        return Policy(
            name=self.name,
            sites=self.site,
            predictor=self.predictor,
            trigger=Limited(trigger=accumulated, warmup_steps=self.warmup_steps, last=1),
            notes=tuple(notes),
        )
