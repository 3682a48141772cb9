"""Times taken in turns, and what they say: medians with bootstrap intervals.

A machine drifts: its clock, its neighbours, its memory. So what is compared is run in
turns, one round after another, and compared within each round; the figure is the median
over the rounds.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    items: Sequence[T], statistic: Callable[[Sequence[T]], float], seed: int = 0
) -> Estimate:
    """A statistic of `items` with its percentile bootstrap interval.

    Resamples in which the statistic has no value (NaN) are left out.
    """
    rng = random.Random(seed)
    values = (statistic(rng.choices(items, k=len(items))) for _ in range(RESAMPLES))
    drawn = sorted(value for value in values if not math.isnan(value)) or [math.nan]
    tail = round(0.025 * len(drawn))
    return Estimate(value=statistic(items), low=drawn[tail], high=drawn[-1 - tail])


def median(values: Sequence[float]) -> Estimate:
    """The median with its interval."""
    return bootstrap(values, statistics.median)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The median of the ratios within each round."""
    return median([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of every subject in every round.

    Each round starts with another subject and every other round runs backwards: what
    the one before leaves behind (caches, heat) then falls on all alike.
    """
    names = list(subjects)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = (i // 2) % len(names)
        order = names[shift:] + names[:shift]
        if i % 2:
            order.reverse()
        for name in order:
            started = time.perf_counter()
            subjects[name]()
            seconds[name].append(time.perf_counter() - started)
        progress(f"round {i + 1}/{rounds}")
    return seconds
