"""One full step, then a run of cached ones, each at the site that promises the least error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cachepass.ir.boundary import CacheChange, Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check
from cachepass.runtime.traced import Choice, Dtypes, State, TracedFacts


@dataclasses.dataclass(frozen=True, slots=True)
class CheapestState:
    """Of one row: whether caching is on, the run it is in, what it chose last."""

    enabled: bool
    full: int
    interval: int
    chosen: str | None = None
    judged: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cheapest(Trigger):
    """MixCache's rule: see `policies.mixcache` for its source.

    Every site's cached object is measured at full steps against the full step before. A run of
    up to ``interval - 1`` cached steps takes at each step the site of smallest ``P = D * I``.
    """

    influence: Mapping[str, float]
    """Site -> I, its influence on the result; the first one's change starts caching."""

    settled: float
    """Change of the first site per step below which caching starts."""

    latest_start: float
    """Share of the steps after which it starts in any case."""

    interval: tuple[int, int]
    start_interval: int
    shorten: float
    lengthen: float
    repeat_penalty: float
    shared_by_branches = True
    needs_num_steps = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "influence", MappingProxyType(dict(self.influence)))
        check(min(self.influence.values()) >= 0, self, "influence", "numbers of at least 0")

    def __hash__(self) -> int:
        return hash((tuple(self.influence.items()), self.settled, self.interval))

    @property
    def names(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.influence)

    def signals(self) -> tuple[Signal, ...]:
        return tuple(CacheChange(name=site, site=site) for site in self.influence)

    def decide(self, facts: Facts, state: Any) -> Decision:
        row: CheapestState = state or CheapestState(False, 0, self.start_interval)
        assert facts.num_steps is not None
        choices = [site for site in self.influence if site in facts.warm]
        change = facts.signal(next(iter(self.influence)))
        settled = change.rel / change.gap < self.settled
        if choices and (settled or facts.step >= self.latest_start * facts.num_steps):
            row = dataclasses.replace(row, enabled=True)
        row = self._judge(row, facts)
        due = facts.step >= row.full + row.interval
        if not row.enabled or due or not choices:
            return COMPUTE, dataclasses.replace(row, full=facts.step)
        chosen = min(choices, key=lambda site: self._error(site, row, facts))
        # The full step before this run is judged already, or ended no run.
        return frozenset({chosen}), dataclasses.replace(row, chosen=chosen, judged=row.full)

    def _judge(self, row: CheapestState, facts: Facts) -> CheapestState:
        """Adapt the interval once after each full step that ended a cached run."""
        if row.chosen is None or row.judged >= row.full:
            return row
        measure = facts.signal(row.chosen)
        if measure.step != row.full:
            return row
        interval = adapt_interval(
            row.interval, measure.rel,
            low=self.lengthen, high=self.shorten, bounds=self.interval,
        )  # fmt: skip
        return dataclasses.replace(row, interval=interval, judged=row.full)

    def _error(self, site: str, row: CheapestState, facts: Facts) -> float:
        measure = facts.signal(site)
        error = measure.rel / measure.gap * self.influence[site]
        error *= self.repeat_penalty if site == row.chosen else 1.0
        return math.inf if math.isnan(error) else error

    @property
    def traced_state(self) -> Dtypes:
        """`CheapestState`, less what it starts with; `chosen` is the place of a site, from 1."""
        return dict.fromkeys(("enabled", "full", "interval", "chosen", "judged"), torch.int64)

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        measures = [facts.signals[site] for site in self.influence]
        there = torch.stack([facts.warm[site] for site in self.influence], dim=1)
        settled = measures[0].rel / measures[0].gap < self.settled
        late = facts.step >= self.latest_start * facts.num_steps.double()
        some = there.any(dim=1)
        enabled = (state["enabled"] > 0) | (some & (settled | late))

        full, chosen, judged = state["full"], state["chosen"], state["judged"] - 1
        last = (chosen - 1).clamp(min=0)[:, None]
        changes = torch.stack([m.rel for m in measures], dim=1)
        steps = torch.stack([m.step for m in measures], dim=1)
        due = (chosen > 0) & (judged < full) & (steps.gather(1, last)[:, 0] == full)
        interval = state["interval"] + self.start_interval
        adapted = traced_adapt(
            interval, changes.gather(1, last)[:, 0],
            low=self.lengthen, high=self.shorten, bounds=self.interval,
        )  # fmt: skip
        interval, judged = torch.where(due, adapted, interval), torch.where(due, full, judged)

        reuse = enabled & some & (facts.step < full + interval)
        gaps = torch.stack([m.gap for m in measures], dim=1)
        influence = torch.tensor(
            list(self.influence.values()), dtype=torch.float64, device=full.device
        )
        place = torch.arange(1, len(measures) + 1, device=full.device)
        penalty = torch.where(chosen[:, None] == place, self.repeat_penalty, 1.0)
        errors = changes / gaps * influence * penalty
        errors = torch.where(errors < _MOST, errors, _MOST)
        cheapest = torch.where(there, errors, torch.inf).argmin(dim=1) + 1
        choice = {site: reuse & (cheapest == i) for i, site in enumerate(self.influence, 1)}
        return choice, {
            "enabled": enabled.to(torch.int64),
            "full": torch.where(reuse, full, facts.step),
            "interval": interval - self.start_interval,
            "chosen": torch.where(reuse, cheapest, chosen),
            "judged": torch.where(reuse, full, judged) + 1,
        }


_MOST = 1e30
"""An error that is not known: more than any other, less than that of a site that is cold."""


def adapt_interval(
    interval: int, deviation: float, *, low: float, high: float, bounds: tuple[int, int]
) -> int:
    """Shorten an interval where the deviation is above `high`, lengthen it below `low`.

    NaN shortens.
    """
    if not deviation <= high:
        return max(bounds[0], interval - 1)
    return min(bounds[1], interval + 1) if deviation < low else interval


def traced_adapt(
    interval: Tensor, deviation: Tensor, *, low: float, high: float, bounds: tuple[int, int]
) -> Tensor:
    """`adapt_interval` of (rows,) values."""
    shorter, longer = (interval - 1).clamp(min=bounds[0]), (interval + 1).clamp(max=bounds[1])
    kept = torch.where(deviation < low, longer, interval)
    return torch.where(deviation <= high, kept, shorter)
