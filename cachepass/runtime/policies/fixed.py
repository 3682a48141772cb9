"""Policies that look at nothing but the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Blocks, Cfg, Kind, Site, Sublayers, WholeCall
from cachepass.runtime.policy import COMPUTE, Facts, Policy, check

_ATTENTION = (Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION)
GRANULARITIES = ("step", "cfg", "stack", "block", "attention", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(Policy):
    """Never reuse: the model as it is, through the same compiler."""

    name: ClassVar[str] = "compute"

    def sites(self) -> tuple[Site, ...]:
        """None: the graph is outlined and nothing else."""
        return ()

    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """COMPUTE."""
        return COMPUTE, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Policy):
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
        return f"Schedule(reuse={dict(self.reuse)!r}, blocks={self.blocks!r})"

    def __hash__(self) -> int:
        return hash((tuple(self.reuse.items()), self.blocks))

    @classmethod
    def every(
        cls, period: int, *, steps: int, granularity: str = "stack", start: int = 5
    ) -> Schedule:
        """The blind baseline: from `start` on, compute each `period`-th step and the last."""
        cached = {i: granularity for i in range(start, steps - 1) if (i - start) % period != 0}
        return cls(reuse=cached)

    def sites(self) -> tuple[Site, ...]:
        """One for each granularity that occurs."""
        used = {kind for kinds in self.reuse.values() for kind in kinds}
        every: dict[str, Site] = {
            "step": WholeCall(),
            "cfg": Cfg(),
            "stack": Blocks(),
            "block": Blocks(name="block", start=self.blocks[0], stop=self.blocks[1]),
            "attention": Sublayers(name="attention", kinds=_ATTENTION),
            "mlp": Sublayers(name="mlp", kinds=(Kind.MLP,)),
        }
        return tuple(site for kind, site in every.items() if kind in used)

    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """What the list says for this step."""
        return frozenset(self.reuse.get(facts.step, ())), state
