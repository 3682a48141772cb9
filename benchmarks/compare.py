"""What is made of the runs of contenders: quality at a speed, and who is ahead."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.baseline import at_cost, envelope
from benchmarks.contender import Entry
from benchmarks.course import SLOWEST, Arm
from benchmarks.figures import Figure
from benchmarks.plot import SPEEDS
from benchmarks.quality import Request
from benchmarks.sampling import Estimate, bootstrap


class Curve:
    """Quality over speed of one contender: the envelope of its arms, for any videos."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        # Resamples are the same for all statistics of one set of videos.
        @functools.cache
        def points(requests: tuple[Request, ...]) -> list[tuple[float, float]]:
            made = [arm.point(requests) for arm in arms if not arm.failed]
            return envelope((-math.log(s), q) for s, q in made if s >= SLOWEST)

        self.points = points

    def at(self, speed: float, requests: Sequence[Request]) -> float:
        """PSNR, linear over the logarithm of speed; NaN where it was not reached."""
        return at_cost(self.points(tuple(requests)), -math.log(speed))

    def speed(self, quality: float, requests: Sequence[Request]) -> float:
        """The highest speed with at least a PSNR; NaN outside of what was measured."""
        points = self.points(tuple(requests))
        for (left, low), (right, high) in itertools.pairwise(points):
            if low <= quality <= high:
                share = (quality - low) / (high - low) if high > low else 0.0
                return math.exp(-(left + share * (right - left)))
        return math.nan


def _estimate(requests: Sequence[Request], of: Callable[[Sequence[Request]], float]) -> Estimate:
    """Over the videos; without a value there is no interval, either."""
    estimate = bootstrap(requests, of)
    nothing = Estimate(value=math.nan, low=math.nan, high=math.nan)
    return nothing if math.isnan(estimate.value) else estimate


def _ahead(ours: Curve, theirs: Curve, speed: float, requests: Sequence[Request]) -> float:
    """How many dB ours is better at a speed."""
    return ours.at(speed, requests) - theirs.at(speed, requests)


def _faster(ours: Curve, theirs: Curve, speed: float, requests: Sequence[Request]) -> float:
    """How many times as fast ours is at the quality that theirs has at a speed."""
    return ours.speed(theirs.at(speed, requests), requests) / speed


def compare(
    arms: Sequence[Arm],
    entries: Mapping[str, Entry],
    tuning: Sequence[Request],
    test: Sequence[Request],
) -> list[Figure]:
    """All figures of speed and quality, on the videos that nothing was tuned with."""
    of = {name: [arm for arm in arms if arm.name == name and not arm.failed] for name in entries}
    curves = {n: Curve(of[n]) for n, e in entries.items() if e.side != "baseline" and of[n]}
    figures = [
        Figure(name=f"{name}: speedup", estimate=_estimate(test, arm.speedup))
        for name, entry in entries.items()
        if entry.side == "baseline"
        for arm in of[name]
    ]
    for name, curve in curves.items():
        speeds = [arm.point(test)[0] for arm in of[name]]
        figures += [
            Figure(
                name=f"{name}: PSNR at {speed:g}x",
                estimate=_estimate(test, functools.partial(curve.at, speed)),
                unit="dB",
                note=f"measured from {min(speeds):.2f}x to {max(speeds):.2f}x",
            )
            for speed in SPEEDS
        ]

    def leader(side: str, speed: float) -> str | None:
        """Chosen where they were tuned: picked on the test videos, it would be flattered."""
        there = {n: c.at(speed, tuning) for n, c in curves.items() if entries[n].side == side}
        reached = {name: value for name, value in there.items() if not math.isnan(value)}
        return max(reached, key=lambda name: reached[name]) if reached else None

    for speed in SPEEDS:
        us, them = leader("ours", speed), leader("peer", speed)
        if us and them:
            figures.append(
                Figure(
                    name=f"best of ours over best peer at {speed:g}x",
                    estimate=_estimate(
                        test, functools.partial(_ahead, curves[us], curves[them], speed)
                    ),
                    unit="dB",
                    note=f"{us}; {them}",
                )
            )
    them = leader("peer", 2.0)
    for name, curve in curves.items():
        if them and entries[name].side == "ours":
            figures.append(
                Figure(
                    name=f"{name}: speed at the PSNR of the best peer at 2x, over 2",
                    estimate=_estimate(test, functools.partial(_faster, curve, curves[them], 2.0)),
                    unit="x",
                    note=them,
                )
            )
    return figures
