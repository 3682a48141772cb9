"""Let a change say how many steps may pass: AdaCache's rule, with motion regularization."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass.ir.boundary import Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check
from cachepass.runtime.traced import Choice, Dtypes, State, TracedFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Motion:
    """Scale a change by how much there is of motion, and by how that develops.

    ``change *= r + |g|``, ``r = (m / scale) ** power``, ``g = gradient * (r - r before) / rate``,
    m the `second` of the measure. Source: AdaCache (arXiv 2411.02397, section 3.3) and its code.
    """

    scale: float
    power: float
    gradient: float
    window: tuple[float, float]
    """Share of the steps, counted from 1, in which it applies."""

    def __post_init__(self) -> None:
        check(self.scale > 0, self, "scale", "above 0")
        low, high = self.window
        check(0 <= low <= high <= 1, self, "window", "two ascending shares from 0 to 1")


@dataclasses.dataclass(frozen=True, slots=True)
class CodebookState:
    """Of one row: when it last computed, what followed from it, the motion before."""

    last: int = 0
    rate: int = 1
    motion: float = 1.0
    seen: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(Trigger):
    """Map a signal's change per step to the number of steps until the next computed one."""

    signal: Signal
    codebook: tuple[tuple[float, int], ...]
    """(bound, rate), ascending: the rate of the first bound above the change, else the last."""

    motion: Motion | None = None
    shared_by_branches = True

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.codebook]
        check(
            bool(bounds) and bounds == sorted(bounds) and all(r >= 1 for _, r in self.codebook),
            self,
            "codebook",
            "pairs (bound, rate) with ascending bounds and rates of at least 1",
        )

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.motion is not None

    def signals(self) -> tuple[Signal, ...]:
        return (self.signal,)

    def decide(self, facts: Facts, state: Any) -> Decision:
        row: CodebookState = state or CodebookState()
        measure = facts.signal(self.signal.name)
        if measure.step > row.seen and not math.isnan(measure.rel):
            change, motion = measure.rel / measure.gap, row.motion
            if self.motion is not None and measure.second is not None:
                assert facts.num_steps is not None
                low, high = (share * facts.num_steps for share in self.motion.window)
                if low < measure.step + 1 < high:
                    motion = (measure.second / self.motion.scale) ** self.motion.power
                    gradient = self.motion.gradient * (motion - row.motion) / row.rate
                    change *= motion + abs(gradient)
            row = CodebookState(row.last, look_up(self.codebook, change), motion, measure.step)
        if facts.step >= row.last + row.rate or not facts.warm:
            return COMPUTE, dataclasses.replace(row, last=facts.step)
        return facts.warm, row

    @property
    def traced_state(self) -> Dtypes:
        """`CodebookState`, less what it starts with."""
        whole, real = torch.int64, torch.float64
        return {"last": whole, "rate": whole, "motion": real, "seen": whole}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        start = CodebookState()
        rate, seen = state["rate"] + start.rate, state["seen"] + start.seen
        motion, measure = state["motion"] + start.motion, facts.signals[self.signal.name]
        change, moved = measure.rel / measure.gap, motion
        if self.motion is not None:
            low, high = (share * facts.num_steps.double() for share in self.motion.window)
            inside = (low < measure.step + 1) & (measure.step + 1 < high)
            inside = inside & ~measure.second.isnan()
            scaled = (measure.second / self.motion.scale) ** self.motion.power
            gradient = self.motion.gradient * (scaled - motion) / rate
            moved = torch.where(inside, scaled, motion)
            change = torch.where(inside, change * (scaled + gradient.abs()), change)
        fresh = (measure.step > seen) & ~measure.rel.isnan()
        rate = torch.where(fresh, traced_look_up(self.codebook, change), rate)
        goes_on = facts.any_warm & (facts.step < state["last"] + rate)
        return facts.reuse(goes_on), {
            "last": torch.where(goes_on, state["last"], facts.step),
            "rate": rate - start.rate,
            "motion": torch.where(fresh, moved, motion) - start.motion,
            "seen": torch.where(fresh, measure.step, seen) - start.seen,
        }


def look_up(codebook: Sequence[tuple[float, int]], x: float) -> int:
    """The rate of the first entry whose bound lies above `x`, else of the last one.

    NaN lies below no bound and gets the smallest rate: what cannot be told is computed.
    """
    if math.isnan(x):
        return min(rate for _, rate in codebook)
    return next((rate for bound, rate in codebook if x < bound), codebook[-1][1])


def traced_look_up(codebook: Sequence[tuple[float, int]], x: Tensor) -> Tensor:
    """`look_up` of (rows,) values."""
    rate = torch.full_like(x, codebook[-1][1], dtype=torch.int64)
    for bound, smaller in reversed(codebook):
        rate = torch.where(x < bound, smaller, rate)
    return torch.where(x.isnan(), min(rate for _, rate in codebook), rate)
