"""One full step, then a run of cached ones, each at the site that promises the least error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cachepass.ir.boundary import CacheChange, Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check


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


def adapt_interval(
    interval: int, deviation: float, *, low: float, high: float, bounds: tuple[int, int]
) -> int:
    """Shorten an interval where the deviation is above `high`, lengthen it below `low`.

    NaN shortens.
    """
    if not deviation <= high:
        return max(bounds[0], interval - 1)
    return min(bounds[1], interval + 1) if deviation < low else interval
