"""Beside the peers: cachepass and the libraries that cache, on one model in one process.

    python -m benchmarks.peers                        everything, some hours
    python -m benchmarks.peers --only First-Block     contenders whose name holds a text

Each contender has one knob and the same number of tries on tuning videos to spread over
the speeds of interest; what no other of its points beats there is measured on other
videos. What is compared, and how, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import (
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
    set_compilation_metrics_limit,
)

import cachepass
from benchmarks import rivals
from benchmarks.baseline import at_cost, envelope
from benchmarks.figures import Figure, Result, keep, table
from benchmarks.plot import SPEEDS, draw
from benchmarks.quality import PROMPTS, PSNR_LIMIT, Request, generate
from benchmarks.sampling import Estimate, bootstrap, interleave, ratio
from benchmarks.testbed import Progress
from examples.shapes.demo import PROMPTS as TUNING_PROMPTS
from examples.shapes.model import SIZES, load
from examples.shapes.pipeline import GUIDANCE_SCALE
from examples.shapes.progress import StatusLine
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
    contender: rivals.Contender
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

    def __init__(self, setting: rivals.Setting, progress: Progress) -> None:
        self.setting = setting
        self.progress = progress
        self.plain = Arm(name="plain", value=None, contender=rivals.compiled(setting))
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
                    arm.failed = _reason(error)
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


def _reason(error: Exception) -> str:
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
    entries: Mapping[str, rivals.Entry],
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
                failures[name] = _reason(error)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(cachepass.Trigger):
    """The decisions of another run: the first block is measured as ever, nothing is judged."""

    calls: frozenset[tuple[int, str]]
    """(step, branch) of the calls that are reused."""

    def signals(self) -> tuple[cachepass.BlockChange, ...]:
        return (cachepass.BlockChange(name="probe"),)

    def decide(self, facts: cachepass.Facts, state: Any) -> tuple[frozenset[str], Any]:
        reuse = (facts.step, facts.branch) in self.calls
        return (facts.warm if reuse else cachepass.COMPUTE), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen at the ends of the steps of a generation."""

    held: int
    calls: frozenset[tuple[int, str]]


def look(course: Course, arm: Arm, request: Request) -> Look:
    """Make one video more, and look into the contender after every step."""
    held = 0
    calls: set[tuple[int, str]] = set()

    def after_step(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal held
        held = max(held, rivals.bytes_held(arm.contender.held()))
        calls.update((step, b) for b, reused in arm.contender.reused().items() if reused)
        return tensors

    arm.contender.pipe(
        request.prompt,
        num_inference_steps=course.setting.steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
        callback_on_step_end=after_step,
    )
    if arm.name.startswith("cachepass"):
        report = cachepass.report(arm.contender.pipe).to_dict()
        held = report["requests"][-1]["peak_cache_bytes"]
    return Look(held=held, calls=frozenset(calls))


def same_decisions(course: Course, arm: Arm, seen: Look, request: Request, rounds: int) -> Figure:
    """A peer's time over ours, where ours computes and reuses what the peer did."""
    # Both run the first block, and what stands in is the residual of all others.
    policy: Any = cachepass.Policy(
        trigger=Replay(calls=seen.calls), sites=cachepass.Blocks(name="tail", start=1)
    )
    if "mask" in arm.name:
        reuse = dict.fromkeys(sorted({step for step, _ in seen.calls}), "block")
        policy = cachepass.Schedule(reuse=reuse, blocks=(1, SIZES[course.setting.size].layers))
    ours = Arm(name="ours", value=None, contender=rivals.cached(course.setting, policy))
    videos = [course.generate(each, request)[0] for each in (arm, ours)]
    seconds = interleave(
        {
            name: functools.partial(generate, each.contender.pipe, request, course.setting.steps)
            for name, each in (("peer", arm), ("ours", ours))
        },
        rounds,
        lambda done: course.progress(f"same decisions, {arm.name}: {done}"),
    )
    report = cachepass.report(ours.contender.pipe).to_dict()["requests"][-1]
    reused = sum(any(rows) for rows in (step["reused"] for step in report["steps"]))
    return Figure(
        name=f"same decisions: {arm.name} / cachepass, time",
        estimate=ratio(seconds["peer"], seconds["ours"]),
        note=f"{len(seen.calls)} calls reused by the peer, {reused} by ours; "
        f"PSNR of one to the other {min(psnr(*videos), PSNR_LIMIT):.0f} dB",
    )


SAME = (
    "diffusers First-Block",
    "ParaAttention First-Block",
    "cache-dit mask regional",
    "cache-dit mask whole",
)


def nearest(arms: Sequence[Arm], requests: Sequence[Request], speed: float = 2.0) -> Arm:
    """The arm whose speed is nearest."""
    return min(arms, key=lambda arm: abs(math.log(arm.point(requests)[0] / speed)))


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
    entries: Mapping[str, rivals.Entry],
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


def measure(
    setting: rivals.Setting,
    entries: Mapping[str, rivals.Entry],
    tuning: Sequence[Request],
    test: Sequence[Request],
    options: argparse.Namespace,
    progress: Progress,
) -> Result:
    """Tune, measure, compare."""
    course = Course(setting, progress)
    arms, failures = tune(course, entries, tuning, options.points)
    # What they hold is seen, and their decisions are replayed, near twice the speed.
    there = {name: [arm for arm in arms if arm.name == name] for name in entries}
    middle = {name: nearest(of, tuning) for name, of in there.items() if of}
    kept = best(arms, tuning)
    for i, request in enumerate(test):
        first = i % max(1, len(kept))
        turned = kept[first:] + kept[:first]
        course.run([(arm, request) for arm in turned], f"request {i + 1}/{len(test)}")
    failures |= {arm.name: f"at {arm.value}: {arm.failed}" for arm in kept if arm.failed}
    figures = compare(kept, entries, tuning, test)
    held: dict[str, int] = {}
    for name, arm in middle.items():
        progress(f"looking into {name}")
        held[name] = 0
        try:
            seen = look(course, arm, tuning[0])
            held[name] = seen.held
            if name in SAME and seen.calls:
                figures.append(same_decisions(course, arm, seen, tuning[0], options.rounds))
        except Exception as error:  # hours of other figures are not to be lost for it
            failures[name] = f"looking into it: {_reason(error)}"
    counts = {
        name: {
            "graph breaks": max(arm.compiles[0].breaks for arm in there[name]),
            "recompiles": max(arm.compiles[0].recompiles for arm in there[name]),
            "functions given up": max(arm.compiles[0].limits for arm in there[name]),
            "compiles after the first generation": max(arm.late() for arm in there[name]),
            "bytes held": held[name],
        }
        for name in middle
    }
    for name in [] if options.only else rivals.without_dial():
        failures.setdefault(f"cachepass {name}", "no knob in benchmarks/rivals.py")
    return Result(
        figures=figures,
        details={
            "setting": {"size": setting.size, "steps": setting.steps},
            "versions": {name: _version(name) for name in ("diffusers", "cache-dit", "para-attn")},
            "contenders": {
                name: {"side": entry.side, "knob": entry.knob, "note": entry.note}
                for name, entry in entries.items()
            },
            "counts": counts,
            "failures": failures,
            "points": [
                {
                    "name": arm.name,
                    "value": arm.value,
                    "kept": arm in kept,
                    "tuning": arm.point(tuning),
                    "test": arm.point(test) if arm in kept and not arm.failed else None,
                    "runs": [dataclasses.asdict(r) | dataclasses.asdict(run)
                             for r, run in arm.runs.items()],
                    "compiles": [dataclasses.asdict(c) for c in arm.compiles],
                }
                for arm in arms
            ],
        },
    )  # fmt: skip


def overview(result: Result) -> str:
    """A line for each contender: PSNR by speed, then what dynamo did and what is held."""
    values = {f.name: f.estimate.value for f in result.figures}
    details = result.details
    names = [*details["contenders"], *(n for n in details["failures"] if n.startswith("cachepass"))]
    width = max(len(name) for name in names)
    lines = [
        f"PSNR in dB by speedup over plain torch.compile\n  {'':{width}}"
        + "".join(f"{speed:>7g}x" for speed in SPEEDS)
        + "     measured  breaks  recompiles  given up  late compiles    held  note"
    ]
    for name in dict.fromkeys(names):
        shown = [values.get(f"{name}: PSNR at {speed:g}x", math.nan) for speed in SPEEDS]
        line = f"  {name:{width}}" + "".join(
            f"{'-' if math.isnan(value) else format(value, '.1f'):>8}" for value in shown
        )
        speeds = [p["test"][0] for p in details["points"] if p["name"] == name and p["test"]]
        ends = sorted({f"{speed:.2f}x" for speed in (min(speeds), max(speeds))}) if speeds else []
        reach = "-".join(ends)
        line += f"  {reach:>11}"
        if name in details["counts"]:
            breaks, recompiles, given_up, late, held = details["counts"][name].values()
            line += f"  {breaks:6}  {recompiles:10}  {given_up:8}  {late:13}  {held / 1e6:4.1f} MB"
        else:
            line += " " * 54
        notes = [details["contenders"].get(name, {}).get("note"), details["failures"].get(name)]
        lines.append(f"{line}  {'; '.join(filter(None, notes))}".rstrip())
    return "\n".join(lines)


def picture(result: Result, path: Path) -> None:
    """Quality over speed: ours in thick lines."""
    sides = {name: c["side"] for name, c in result.details["contenders"].items()}
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in result.details["points"]:
        if point["test"] and point["test"][0] >= SLOWEST and sides[point["name"]] != "baseline":
            curves.setdefault(point["name"], []).append(tuple(point["test"]))
    draw(curves, path, thick={name for name, side in sides.items() if side == "ours"})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    every = rivals.entries()
    entries = {
        name: entry
        for name, entry in every.items()
        if not options.only or any(text.lower() in name.lower() for text in options.only)
    }
    if not entries:
        raise SystemExit(f"--only matches none of: {', '.join(every)}")
    # What libraries tell as they go would tear the status line, and go unread.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    set_compilation_metrics_limit(10_000)

    tuning = [Request(prompt=prompt, seed=0) for prompt in TUNING_PROMPTS[: options.prompts]]
    test = [
        Request(prompt=prompt, seed=100 + seed)
        for prompt in PROMPTS[: options.prompts]
        for seed in range(options.seeds)
    ]
    setting = rivals.Setting(
        size=options.size,
        steps=options.steps,
        tuning=tuning[0],
        weights=load(options.size).state_dict(),
    )
    status = StatusLine()
    started = time.perf_counter()
    # Every point has compiled code of its own; together they may pass the limit that all
    # regions of a function share, each alone keeps to its own.
    with torch._dynamo.config.patch(accumulated_recompile_limit=1_000_000):
        result = measure(setting, entries, tuning, test, options, status.update)
    status.clear()
    keep(options.out, "peers", result, time.perf_counter() - started)
    picture(result, options.out.with_suffix(".png"))
    others = [figure for figure in result.figures if ": PSNR at" not in figure.name]
    print(overview(result))
    if others:
        print("\n" + table("With 95 % intervals over videos, or rounds", others))
    print(f"\ndetails in {options.out}, curves in {options.out.with_suffix('.png')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Compare cachepass with the libraries that cache.",
    )
    add = parser.add_argument
    add(
        "--prompts",
        type=int,
        default=4,
        help=f"to tune, and others to test; at most {len(TUNING_PROMPTS)}",
    )
    add("--seeds", type=int, default=2, help="test videos for each prompt")
    add("--points", type=int, default=6, help="tries of each contender")
    add("--rounds", type=int, default=10, help="of the same decisions on both sides")
    add("--only", nargs="+", metavar="NAME", help="contenders whose names hold a text")
    add("--steps", type=int, default=rivals.FULL_STEPS)
    add("--size", choices=tuple(SIZES), default="large")
    add("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    return parser


if __name__ == "__main__":
    main()
