"""Triggers that look at nothing but the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check
from cachepass.runtime.traced import Choice, Dtypes, State, TracedFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never(Trigger):
    """Compute everything."""

    def decide(self, facts: Facts, state: Any) -> Decision:
        return COMPUTE, state

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        return {}, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtSteps(Trigger):
    """Reuse at the steps of a list the sites that stand there."""

    reuse: Mapping[int, tuple[str, ...]]
    """Step (from 0) -> names of sites."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reuse", MappingProxyType(dict(self.reuse)))

    def __hash__(self) -> int:
        return hash(tuple(self.reuse.items()))

    @property
    def names(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(name for names in self.reuse.values() for name in names)

    def decide(self, facts: Facts, state: Any) -> Decision:
        return frozenset(self.reuse.get(facts.step, ())), state

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        choice = {}
        for name in sorted(self.names):
            steps = [step for step, names in self.reuse.items() if name in names]
            now = (torch.tensor(steps, device=facts.step.device) == facts.step).any()
            choice[name] = facts.nothing | now
        return choice, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic(Trigger):
    """Compute each `period`-th step, counted from the last computed one."""

    period: int
    absolute: bool = False
    """Count from the start of the request: steps 0, `period`, ... compute in any case."""

    def __post_init__(self) -> None:
        check(self.period >= 1, self, "period", "at least 1")

    def decide(self, facts: Facts, state: Any) -> Decision:
        """`state` is the number of steps reused in a row."""
        reused: int = state or 0
        due = facts.step % self.period == 0 if self.absolute else reused >= self.period - 1
        if due or not facts.warm:
            return COMPUTE, 0
        return facts.warm, reused + 1

    @property
    def traced_state(self) -> Dtypes:
        return {} if self.absolute else {"reused": torch.int64}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        if self.absolute:
            return facts.reuse(facts.step % self.period != 0), state
        goes_on = (state["reused"] < self.period - 1) & facts.any_warm
        return facts.reuse(goes_on), {"reused": torch.where(goes_on, state["reused"] + 1, 0)}
