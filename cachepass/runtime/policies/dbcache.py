"""DBCache: dual block caching."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import BlockChange, Blocks
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy, check
from cachepass.runtime.triggers import Below, Limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class DBCache(NamedPolicy):
    """Run the first blocks, and judge by their residual; skip the middle, run the last blocks.

    Rule: ``rel(r, r at the last full call) <= threshold``, r the residual of the first
    `front` blocks together. Source: DBCache of cache-dit [code].
    """

    name: ClassVar[str] = "dbcache"

    front: int = 8
    """F: blocks at the start that always run [code]."""

    back: int = 0
    """B: blocks at the end that always run [code]."""

    threshold: float = 0.08
    """Relative L1 change up to which is reused [code]."""

    warmup_steps: int | float = 8
    """Steps at the start that are computed [code]."""

    max_in_a_row: int | None = None
    """Reuses in a row, at most."""

    max_in_all: int | None = None
    """Reuses in a request, at most."""

    predictor: Predictor | str | None = None
    """What stands in; the usual is the last residual. `Taylor` is cache-dit's calibrator."""

    def __post_init__(self) -> None:
        check(self.front >= 1, self, "front", "at least 1")
        check(self.back >= 0, self, "back", "at least 0")
        super().__post_init__()

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Below` on the first blocks."""
        signal = BlockChange(name="probe", blocks=self.front)
        middle = Blocks(name="middle", start=self.front, stop=-self.back if self.back else None)
        return Policy(
            name=self.name,
            sites=middle,
            predictor=self.predictor,
            trigger=Limited(
                trigger=Below(signal=signal, threshold=self.threshold),
                warmup_steps=self.warmup_steps,
                max_in_a_row=self.max_in_a_row,
                max_in_all=self.max_in_all,
            ),
        )
