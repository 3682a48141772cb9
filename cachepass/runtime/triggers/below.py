"""Reuse while a change is small."""

from __future__ import annotations

import dataclasses
from typing import Any

from cachepass.ir.boundary import Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check
from cachepass.runtime.traced import Choice, State, TracedFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Below(Trigger):
    """Reuse where the relative change of a signal is at most `threshold`; NaN computes."""

    signal: Signal
    threshold: float

    def __post_init__(self) -> None:
        check(self.threshold >= 0, self, "threshold", "at least 0")

    def signals(self) -> tuple[Signal, ...]:
        return (self.signal,)

    def decide(self, facts: Facts, state: Any) -> Decision:
        small = facts.signal(self.signal.name).rel <= self.threshold
        return (facts.warm if small else COMPUTE), state

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        return facts.reuse(facts.signals[self.signal.name].rel <= self.threshold), state
