"""Policies that look at nothing but the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Blocks
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, SITES, Config, NamedPolicy, Policy, check
from cachepass.runtime.triggers import AtSteps, Never

GRANULARITIES = tuple(SITES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(NamedPolicy):
    """Never reuse: the model as it is, through the same compiler."""

    name: ClassVar[str] = "compute"

    def combine(self, config: Config = EMPTY) -> Policy:
        """No sites: the graph is outlined and nothing else."""
        return Policy(name=self.name, sites=(), trigger=Never())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(NamedPolicy):
    """Reuse at fixed steps: ``Schedule(reuse={6: "stack", 7: "cfg"})``.

    Granularities: `step` (the whole call's output), `cfg` (the unconditional call),
    `stack` (all blocks), `block` (the blocks of `blocks`), `attention`, `mlp`. A step may
    name several, as a tuple. A step that is reused anywhere writes no cache.
    """

    name: ClassVar[str] = "schedule"

    reuse: Mapping[int, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Step (from 0) -> granularity to reuse."""

    blocks: tuple[int | float, int | float] = (0.25, 0.75)
    """The blocks of granularity `block`, as counts or shares."""

    predictor: Predictor | str | None = None
    """What stands in; None is what is usual for each granularity."""

    def __post_init__(self) -> None:
        frozen = {
            step: (kind,) if isinstance(kind, str) else tuple(kind)
            for step, kind in sorted(dict(self.reuse).items())
        }
        for step, kinds in frozen.items():
            for kind in kinds:
                if kind not in GRANULARITIES:
                    raise PolicyError(
                        f"Schedule(`reuse`={{{step}: {kind!r}}}): must be one of "
                        f"{', '.join(GRANULARITIES)}"
                    )
            check(
                isinstance(step, int) and step >= 0,
                self,
                "reuse",
                "keyed by steps from 0",
            )
        object.__setattr__(self, "reuse", MappingProxyType(frozen))

    def __repr__(self) -> str:
        stand_in = f", predictor={self.predictor!r}" if self.predictor is not None else ""
        return f"Schedule(reuse={dict(self.reuse)!r}, blocks={self.blocks!r}{stand_in})"

    def __hash__(self) -> int:
        return hash((tuple(self.reuse.items()), self.blocks, self.predictor))

    @classmethod
    def every(
        cls,
        period: int,
        *,
        steps: int,
        granularity: str = "stack",
        start: int = 5,
        predictor: Predictor | str | None = None,
    ) -> Schedule:
        """The blind baseline: from `start` on, compute each `period`-th step and the last."""
        cached = {i: granularity for i in range(start, steps - 1) if (i - start) % period != 0}
        return cls(reuse=cached, predictor=predictor)

    def combine(self, config: Config = EMPTY) -> Policy:
        """`AtSteps`, with a site for each granularity that occurs."""
        used = {kind for kinds in self.reuse.values() for kind in kinds}
        low, high = self.blocks
        sites = {**SITES, "block": Blocks(name="block", start=low, stop=high)}
        return Policy(
            name=self.name,
            sites=tuple(site for kind, site in sites.items() if kind in used),
            predictor=self.predictor,
            trigger=AtSteps(reuse={step: tuple(kinds) for step, kinds in self.reuse.items()}),
        )
