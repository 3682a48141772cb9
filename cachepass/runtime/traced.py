"""What a rule sees where there is no host: the facts of a call as tensors, all rows at once.

`Trigger.traced` is `Trigger.decide` in tensor code, for programs that decide on their own
(`lowering="graph"`, exported ones). Sums are looked at in float64, as on the host, so both
decide alike. State is a few tensors of one value per row, and *starts as zeros*: a program
whose caches are all zeros is a program before its first call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""Name -> (rows,)."""

Dtypes = Mapping[str, torch.dtype]

Choice = tuple[Mapping[str, Tensor], State]
"""Site -> (rows,) bool, whether to reuse it (sites left out are computed); the new state."""


@dataclasses.dataclass(frozen=True)
class TracedMeasure:
    """`policy.Measure` of all rows; every field is (rows,)."""

    diff: Tensor
    ref: Tensor
    step: Tensor
    gap: Tensor
    second: Tensor
    """NaN where there is none."""

    @property
    def rel(self) -> Tensor:
        """Relative L1 change; NaN where it cannot be told."""
        told = self.diff.isfinite() & self.ref.isfinite() & (self.ref > 0)
        return torch.where(told, self.diff / self.ref, torch.nan)


@dataclasses.dataclass(frozen=True)
class TracedFacts:
    """`policy.Facts` of all rows."""

    step: Tensor
    """() int64, from 0."""

    num_steps: Tensor
    """() int64, -1 where it is not known."""

    uncond: Tensor
    """() bool: whether the call belongs to the unconditional branch."""

    warm: Mapping[str, Tensor]
    """Site -> (rows,) bool."""

    signals: Mapping[str, TracedMeasure]
    timestep: Tensor
    """(rows,) float64, from 1000 to 0."""

    nothing: Tensor
    """(rows,) bool, all False."""

    @property
    def any_warm(self) -> Tensor:
        """(rows,) whether some site could be reused."""
        return any_of(self.warm, self.nothing)

    def reuse(self, where: Tensor) -> dict[str, Tensor]:
        """All that is warm, in the rows that are named; `where` is () or (rows,)."""
        return {name: warm & where for name, warm in self.warm.items()}

    def where(self, allowed: Tensor) -> TracedFacts:
        """The same with sites warm in some rows only."""
        return dataclasses.replace(self, warm=self.reuse(allowed))

    def steps_of(self, where: int | float) -> Tensor:
        """`policy.share_of`: steps from a count or a share."""
        if not isinstance(where, float):
            return torch.full_like(self.num_steps, where)
        share = torch.ceil(where * self.num_steps.double()).to(torch.int64)
        return torch.where(self.num_steps >= 0, share, 0)


def any_of(masks: Mapping[str, Tensor], nothing: Tensor) -> Tensor:
    """(rows,) the union of masks."""
    found = nothing
    for mask in masks.values():
        found = found | mask
    return found


def nested(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """State of a rule within another one."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(prefix: str, state: State) -> dict[str, Tensor]:
    """What `nested` made."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
    }
