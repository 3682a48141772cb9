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
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import (
    set_compilation_metrics_limit,
)

import cachepass
from benchmarks import dials, rivals
from benchmarks.compare import compare
from benchmarks.contender import FULL_STEPS, Entry, Setting, bytes_held, compiled, uncached
from benchmarks.course import SLOWEST, Arm, Course, best, reason, tune
from benchmarks.figures import Figure, Result, keep, table
from benchmarks.plot import SPEEDS, draw
from benchmarks.quality import PROMPTS, PSNR_LIMIT, Request, generate
from benchmarks.sampling import Estimate, interleave, ratio
from benchmarks.testbed import Progress
from examples.shapes.demo import PROMPTS as TUNING_PROMPTS
from examples.shapes.model import SIZES, load
from examples.shapes.pipeline import GUIDANCE_SCALE
from examples.shapes.progress import StatusLine
from examples.shapes.quality import psnr


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
        held = max(held, bytes_held(arm.contender.held()))
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
    ours = Arm(name="ours", value=None, contender=dials.cached(course.setting, policy))
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


# The same method, ours first: what is kept for it is compared.
METHODS = (
    ("cachepass firstblock", "diffusers First-Block"),
    ("cachepass firstblock", "ParaAttention First-Block"),
    ("cachepass dbcache", "cache-dit DBCache whole"),
    ("cachepass taylorseer", "diffusers TaylorSeer"),
    ("cachepass magcache", "diffusers MagCache"),
    ("cachepass pab", "diffusers PAB"),
    ("cachepass fastercache", "diffusers FasterCache"),
)


def memory(held: Mapping[str, int]) -> list[Figure]:
    """Bytes that a peer keeps over ours."""
    figures = []
    for ours, peer in METHODS:
        if held.get(ours) and held.get(peer):
            times = held[peer] / held[ours]
            figures.append(
                Figure(
                    name=f"bytes held: {peer} / {ours}",
                    estimate=Estimate(value=times, low=times, high=times),
                    at_least=1.0,
                )
            )
    return figures


def nearest(arms: Sequence[Arm], requests: Sequence[Request], speed: float = 2.0) -> Arm:
    """The arm whose speed is nearest."""
    return min(arms, key=lambda arm: abs(math.log(arm.point(requests)[0] / speed)))


def measure(
    setting: Setting,
    entries: Mapping[str, Entry],
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
    figures += memory(held)
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
    for name in [] if options.only else dials.without_dial():
        failures.setdefault(f"cachepass {name}", "no knob in benchmarks/dials.py")
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


def contenders() -> dict[str, Entry]:
    """All by name."""
    baselines = {
        "eager": Entry("baseline", uncached),
        "plain again": Entry("baseline", compiled, note="the null"),
    }
    return baselines | rivals.entries() | dials.entries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    every = contenders()
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
    setting = Setting(
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
    add("--steps", type=int, default=FULL_STEPS)
    add("--size", choices=tuple(SIZES), default="large")
    add("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    return parser


if __name__ == "__main__":
    main()
