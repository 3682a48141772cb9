"""The blind baseline: what the best uniform schedule of equal cost would give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachepass.runtime.policies import Schedule

GRANULARITIES = ("step", "stack", "cfg", "block")
PERIODS = (2, 3, 4, 5, 6)
STARTS = (1, 2, 3, 4, 5)
# A further, harder baseline: whoever knows that early steps matter most starts late.
LATE_STARTS = (10, 15, 20)
LATE_GRANULARITIES = ("step", "stack")


@dataclass(frozen=True, kw_only=True)
class Blind:
    """A uniform schedule of one granularity."""

    granularity: str
    period: int
    start: int

    @property
    def late(self) -> bool:
        """Whether it belongs to the further baseline."""
        return self.start in LATE_STARTS

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.granularity}, period {self.period} from step {self.start}"

    def schedule(self, steps: int) -> Schedule:
        """The policy of it."""
        return Schedule.every(
            self.period, steps=steps, granularity=self.granularity, start=self.start
        )

    def cost(self, steps: int) -> float:
        """Share of block work that is computed."""
        # The conditional call, or the blocks outside of the middle half, go on.
        left = 0.5 if self.granularity in ("cfg", "block") else 0.0
        return 1 - (1 - left) * len(self.schedule(steps).reuse) / steps


def around(costs: Iterable[float], window: float, steps: int) -> list[Blind]:
    """The schedules that cost up to `window` less, or half of it more, than a policy.

    The envelope at a cost depends on the best of what is cheaper and on what comes next
    above; trying all takes hours. Of those that start early, the nearest on either side of
    each cost are always there.
    """
    every = [
        Blind(granularity=granularity, period=period, start=start)
        for granularity in GRANULARITIES
        for period, start in itertools.product(
            PERIODS, STARTS + (LATE_STARTS if granularity in LATE_GRANULARITIES else ())
        )
    ]
    chosen = set()
    for cost in costs:
        away = {blind: blind.cost(steps) - cost for blind in every}
        chosen |= {b for b, d in away.items() if -window <= d <= window / 2}
        early = {b: d for b, d in away.items() if not b.late}
        below = max((d for d in early.values() if d <= 0), default=None)
        above = min((d for d in early.values() if d >= 0), default=None)
        chosen |= {b for b, d in early.items() if d in (below, above)}
    return [blind for blind in every if blind in chosen]


def envelope(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The best quality to be had for at most each cost: (cost, quality), ascending."""
    best: dict[float, float] = {}
    reached = -math.inf
    for cost, quality in sorted(points):
        reached = max(reached, quality)
        best[round(cost, 6)] = reached  # equal costs, summed in another order, are one
    return list(best.items())


def at_cost(curve: Sequence[tuple[float, float]], cost: float) -> float:
    """Linear between neighbours on an envelope; NaN outside of it, never extrapolated."""
    cost = round(cost, 6)
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= cost <= right:
            return low + (high - low) * (cost - left) / (right - left)
    return math.nan
