"""Runs contenders in turns with plain torch.compile, and spends their tries.

What they are is in benchmarks/contender.py, what is made of their runs in benchmarks/peers.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import (
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
)

from benchmarks.contender import Contender, Entry, Setting, compiled
from benchmarks.quality import PSNR_LIMIT, Request, generate
from benchmarks.testbed import Progress
from examples.shapes.quality import psnr

# Where tries are spent; what is slower is on no curve: near the uncached video, PSNR has
# no bound, and a line to there would promise anything.
SLOWEST, FASTEST = 1.15, 4.4
# A run is compared with the plain runs before and after so many runs.
BETWEEN_PLAIN = 8
TRIES = 3


@dataclasses.dataclass(kw_only=True)
class Compiles:
    """What dynamo did in a generation."""

    frames: int = 0
    graphs: int = 0
    breaks: int = 0
    recompiles: int = 0
    limits: int = 0
    """How often so many recompilations that dynamo gave a function up."""
    regions: int = 0
    """Of cachepass, which compiles them outside of dynamo."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One video."""

    psnr: float
    seconds: float
    plain: float
    """Seconds of plain torch.compile at about the same time."""


@dataclasses.dataclass(kw_only=True)
class Arm:
    """A contender at one value of its knob, and what came of it."""

    name: str
    value: Any
    contender: Contender
    runs: dict[Request, Run] = dataclasses.field(default_factory=dict)
    compiles: list[Compiles] = dataclasses.field(default_factory=list)
    failed: str = ""

    def speedup(self, requests: Sequence[Request]) -> float:
        """Over plain torch.compile, on some videos."""
        runs = [self.runs[request] for request in requests]
        return sum(run.plain for run in runs) / sum(run.seconds for run in runs)

    def point(self, requests: Sequence[Request]) -> tuple[float, float]:
        """(speedup, PSNR) on some videos."""
        quality = statistics.fmean(self.runs[request].psnr for request in requests)
        return self.speedup(requests), quality

    def late(self) -> int:
        """Graphs and regions compiled after the first generation."""
        return sum(c.graphs + c.regions for c in self.compiles[1:])


class Course:
    """Runs what is given to it in turns with plain torch.compile."""

    def __init__(self, setting: Setting, progress: Progress) -> None:
        self.setting = setting
        self.progress = progress
        self.plain = Arm(name="plain", value=None, contender=compiled(setting))
        self.references: dict[Request, torch.Tensor] = {}
        progress("compiling the plain model")
        _, self.last = self.generate(self.plain, setting.tuning)

    def reference(self, request: Request) -> torch.Tensor:
        """The uncached video."""
        if request not in self.references:
            self.references[request], _ = self.generate(self.plain, request)
        return self.references[request]

    def generate(self, arm: Arm, request: Request) -> tuple[torch.Tensor, float]:
        """A video and its seconds, free of compilation if that comes to an end."""
        for _ in range(TRIES):
            before, regions = _counts(), arm.contender.regions()
            clear_compilation_metrics()
            video, seconds = generate(arm.contender.pipe, request, self.setting.steps)
            after, metrics = _counts(), get_compilation_metrics()
            done = Compiles(
                **{name: after[name] - before[name] for name in after},
                recompiles=sum(bool(m.recompile_reason) for m in metrics),
                limits=sum("recompile limit" in (m.fail_reason or "") for m in metrics),
                regions=arm.contender.regions() - regions,
            )
            arm.compiles.append(done)
            if not (done.frames or done.graphs or done.regions):
                break
        return video, seconds

    def run(self, jobs: Sequence[tuple[Arm, Request]], what: str) -> None:
        """Make videos; an arm that fails says why and is left out from then on."""
        for start in range(0, len(jobs), BETWEEN_PLAIN):
            chunk = jobs[start : start + BETWEEN_PLAIN]
            references = {request: self.reference(request) for _, request in chunk}
            made = []
            for i, (arm, request) in enumerate(chunk, start + 1):
                if arm.failed:
                    continue
                self.progress(f"{what}, video {i}/{len(jobs)}: {arm.name}, {arm.value}")
                try:
                    video, seconds = self.generate(arm, request)
                except Exception as error:  # whatever a peer raises is a finding
                    arm.failed = reason(error)
                    continue
                quality = min(psnr(video, references[request]), PSNR_LIMIT)
                made.append((arm, request, quality, seconds))
            before, (_, self.last) = self.last, self.generate(self.plain, chunk[0][1])
            for arm, request, quality, seconds in made:
                plain = (before + self.last) / 2
                arm.runs[request] = Run(psnr=quality, seconds=seconds, plain=plain)


def _counts() -> dict[str, int]:
    return {
        "frames": counters["frames"]["total"],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def reason(error: Exception) -> str:
    """Why something failed, on a line."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def choose(count: int, tried: Mapping[int, float]) -> int | None:
    """Which of `count` values to try next: within the widest gap of speed between neighbours.

    Args:
        count: Number of values, in order of speed.
        tried: Speedups of those that were tried; NaN where there is none.
    """
    known = {-1: 1.0, **{i: s for i, s in tried.items() if not math.isnan(s)}, count: math.inf}
    gaps = []
    for left, right in itertools.pairwise(sorted(known)):
        room = [i for i in range(left + 1, right) if i not in tried]
        width = math.log(min(known[right], FASTEST)) - math.log(max(known[left], SLOWEST))
        # Between two tries a curve can be read off, beyond the last it ends.
        width *= 1 if left >= 0 and right < count else 2
        if room and width > 0:
            gaps.append((width, room[len(room) // 2]))
    return max(gaps)[1] if gaps else None


def tune(
    course: Course,
    entries: Mapping[str, Entry],
    requests: Sequence[Request],
    points: int,
) -> tuple[list[Arm], dict[str, str]]:
    """Spend every contender's tries; also says what failed and why."""
    arms: list[Arm] = []
    failures: dict[str, str] = {}
    tried: dict[str, dict[int, float]] = {name: {} for name in entries}
    for turn in range(points):
        entered: dict[tuple[str, int], Arm] = {}
        course.progress(f"try {turn + 1}/{points}: setting up")
        for name, entry in entries.items():
            try:
                values = entry.grid(course.setting)
                index = choose(len(values), tried[name])
                if index is None:
                    continue
                tried[name][index] = math.nan
                contender = entry.build(course.setting, values[index])
            except Exception as error:  # whatever a peer raises is a finding
                failures[name] = reason(error)
                continue
            entered[name, index] = Arm(name=name, value=values[index], contender=contender)
        jobs = [(arm, request) for request in requests for arm in entered.values()]
        course.run(jobs, f"try {turn + 1}/{points}")
        for (name, index), arm in entered.items():
            if arm.failed:
                failures[name] = f"at {arm.value}: {arm.failed}"
            else:
                tried[name][index] = arm.speedup(requests)
                arms.append(arm)
    return arms, failures


def best(arms: Sequence[Arm], requests: Sequence[Request]) -> list[Arm]:
    """Those that no other arm of the same contender beats in both speed and quality."""
    points = [(arm.name, arm.point(requests)) for arm in arms]
    return [
        arm
        for arm, (name, (speed, quality)) in zip(arms, points, strict=True)
        if not any(
            name == other and s >= speed and q >= quality and (s, q) != (speed, quality)
            for other, (s, q) in points
        )
    ]
