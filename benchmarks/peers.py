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
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import (
    set_compilation_metrics_limit,
)

import cachepass
from benchmarks import rivals
from benchmarks.baseline import at_cost, envelope
from benchmarks.course import SLOWEST, Arm, Course, best, reason, tune
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
            failures[name] = f"looking into it: {reason(error)}"
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
