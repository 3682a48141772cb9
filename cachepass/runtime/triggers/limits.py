"""Triggers around other triggers: steps that compute anyway, windows, one trigger per site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cachepass.ir.boundary import Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check, share_of
from cachepass.runtime.traced import (
    Choice,
    Dtypes,
    State,
    TracedFacts,
    any_of,
    nested,
    within,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around(Trigger):
    """What a trigger around another needs: what the other one does."""

    trigger: Trigger

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.trigger.needs_num_steps

    @property
    def needs_timestep(self) -> bool:  # type: ignore[override]
        return self.trigger.needs_timestep

    @property
    def shared_by_branches(self) -> bool:  # type: ignore[override]
        return self.trigger.shared_by_branches

    @property
    def independent(self) -> bool:  # type: ignore[override]
        return self.trigger.independent

    @property
    def names(self) -> frozenset[str]:  # type: ignore[override]
        return self.trigger.names

    def signals(self) -> tuple[Signal, ...]:
        return self.trigger.signals()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limited(Around):
    """Computes at the edges of a request and after too many reuses; else what `trigger` says.

    Where it computes, `trigger` is told that no site could be reused, and so starts afresh.
    """

    warmup_steps: int | float = 0
    """Steps at the start that compute: a count, or (a float) a share of all."""

    warmup_at_least: int = 0
    """Of a warm-up that is a share: so many steps, however short the request."""

    last: int = 0
    """Steps at the end that compute."""

    max_in_a_row: int | None = None
    """Reuses in a row, at most."""

    max_in_all: int | None = None
    """Reuses in a request, at most."""

    def __post_init__(self) -> None:
        ok = self.warmup_steps >= 0 and not (
            isinstance(self.warmup_steps, float) and self.warmup_steps > 1
        )
        check(ok, self, "warmup_steps", "a count of at least 0 or a share from 0.0 to 1.0")
        check(self.last >= 0, self, "last", "at least 0")
        check(
            self.max_in_a_row is None or self.max_in_a_row >= 1, self, "max_in_a_row", "at least 1"
        )
        check(self.max_in_all is None or self.max_in_all >= 1, self, "max_in_all", "at least 1")

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return isinstance(self.warmup_steps, float) or self.trigger.needs_num_steps

    def decide(self, facts: Facts, state: Any) -> Decision:
        """`state` is (reuses in a row, reuses in all, the inner state)."""
        row, total, inner = state or (0, 0, None)
        from_end = facts.num_steps is not None and facts.step >= facts.num_steps - self.last
        forced = (
            facts.step < max(share_of(self.warmup_steps, facts.num_steps), self.warmup_at_least)
            or (self.last > 0 and from_end)
            or (self.max_in_a_row is not None and row >= self.max_in_a_row)
            or (self.max_in_all is not None and total >= self.max_in_all)
        )
        seen = dataclasses.replace(facts, warm=frozenset()) if forced else facts
        choice, inner = self.trigger.decide(seen, inner)
        reused = choice & seen.warm
        return reused, (row + 1 if reused else 0, total + bool(reused), inner)

    @property
    def traced_state(self) -> Dtypes:
        counts = {"row": self.max_in_a_row, "total": self.max_in_all}
        own = {name: torch.int64 for name, most in counts.items() if most is not None}
        return {**own, **nested("inner", self.trigger.traced_state)}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        warmup = facts.steps_of(self.warmup_steps).clamp(min=self.warmup_at_least)
        allowed = facts.step >= warmup
        if self.last:
            from_end = (facts.num_steps >= 0) & (facts.step >= facts.num_steps - self.last)
            allowed = allowed & ~from_end
        allowed = allowed | facts.nothing
        if self.max_in_a_row is not None:
            allowed = allowed & (state["row"] < self.max_in_a_row)
        if self.max_in_all is not None:
            allowed = allowed & (state["total"] < self.max_in_all)
        seen = facts.where(allowed)
        choice, inner = self.trigger.traced(seen, within("inner", state))
        reused = {name: mask & seen.warm[name] for name, mask in choice.items()}
        some, new = any_of(reused, facts.nothing), nested("inner", inner)
        if "row" in state:
            new["row"] = torch.where(some, state["row"] + 1, 0)
        if "total" in state:
            new["total"] = state["total"] + some
        return reused, new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windowed(Around):
    """`trigger` where the timestep lies between two bounds and the step has come; else compute."""

    timesteps: tuple[float, float]
    """Open interval, from 0 to 1000; of models that are given less than that, in thousandths."""

    start: int | float = 0
    """First step of it: a count, or (a float) a share of all."""

    @property
    def needs_timestep(self) -> bool:  # type: ignore[override]
        return True

    def __post_init__(self) -> None:
        low, high = self.timesteps
        check(low < high, self, "timesteps", "two ascending numbers")

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return isinstance(self.start, float) or self.trigger.needs_num_steps

    def decide(self, facts: Facts, state: Any) -> Decision:
        low, high = self.timesteps
        inside = low < facts.timestep < high
        if not inside or facts.step < share_of(self.start, facts.num_steps):
            facts = dataclasses.replace(facts, warm=frozenset())
        choice, state = self.trigger.decide(facts, state)
        return choice & facts.warm, state

    @property
    def traced_state(self) -> Dtypes:
        return self.trigger.traced_state

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        low, high = self.timesteps
        inside = (low < facts.timestep) & (facts.timestep < high)
        seen = facts.where(inside & (facts.step >= facts.steps_of(self.start)))
        choice, state = self.trigger.traced(seen, state)
        return {name: mask & seen.warm[name] for name, mask in choice.items()}, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerSite(Trigger):
    """A trigger for each site; sites are refreshed independently of each other."""

    triggers: Mapping[str, Trigger]
    """Name of a site -> its trigger."""

    independent = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "triggers", MappingProxyType(dict(self.triggers)))
        shared = {t.shared_by_branches for t in self.triggers.values()}
        check(len(shared) <= 1, self, "triggers", "all shared by the branches, or none")

    def __hash__(self) -> int:
        return hash(tuple(self.triggers.items()))

    @property
    def names(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.triggers)

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return any(t.needs_num_steps for t in self.triggers.values())

    @property
    def needs_timestep(self) -> bool:  # type: ignore[override]
        return any(t.needs_timestep for t in self.triggers.values())

    @property
    def shared_by_branches(self) -> bool:  # type: ignore[override]
        return any(t.shared_by_branches for t in self.triggers.values())

    def signals(self) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(s for t in self.triggers.values() for s in t.signals()))

    def decide(self, facts: Facts, state: Any) -> Decision:
        """`state` maps sites to the states of their triggers."""
        choices, states = COMPUTE, dict(state or {})
        for name, trigger in self.triggers.items():
            own = dataclasses.replace(facts, warm=facts.warm & {name}, sites=frozenset({name}))
            choice, states[name] = trigger.decide(own, states.get(name))
            choices |= choice & {name}
        return choices, states

    @property
    def traced_state(self) -> Dtypes:
        triggers = self.triggers.items()
        return {k: v for name, t in triggers for k, v in nested(name, t.traced_state).items()}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        choices: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        for name, trigger in self.triggers.items():
            own = dataclasses.replace(facts, warm={name: facts.warm[name]})
            choice, inner = trigger.traced(own, within(name, state))
            choices |= {site: mask for site, mask in choice.items() if site == name}
            states |= nested(name, inner)
        return choices, states
