"""The frontier: every policy over a range of its main knob, speed against quality.

    python -m benchmarks.frontier                       everything, about an hour
    python -m benchmarks.frontier --only mixcache,pab   some policies

Videos of several prompts, from still to fast, and seeds; a policy is compiled once and its
knob turned at run time, since a knob is nothing but a number in a rule. Nothing is tuned
here: the points are spread over each knob's range, and the plot shows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cachepass
from benchmarks.dials import adacache_fields, mixcache_fields
from benchmarks.figures import Figure, Result, keep, table
from benchmarks.lpips import Lpips
from benchmarks.plot import draw
from benchmarks.quality import PROMPTS, PSNR_LIMIT, Request, build, generate, requests_of
from benchmarks.sampling import Estimate, bootstrap
from benchmarks.testbed import Progress
from cachepass.runtime.policies import for_model
from cachepass.runtime.policy import NamedPolicy
from examples.shapes.progress import StatusLine
from examples.shapes.quality import psnr, ssim

STEPS = 50
STILL = ("still", "drift")
"""Motions of a caption that count as slow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """A policy's main knob: its name, and a policy for each of its positions."""

    name: str
    positions: Sequence[float]
    policy: Callable[[float], NamedPolicy]


def _every(granularity: str, predictor: str | None = None) -> Callable[[float], NamedPolicy]:
    return lambda period: cachepass.Schedule.every(
        round(period), steps=STEPS, granularity=granularity, start=10, predictor=predictor
    )


def _threshold(kind: Callable[..., NamedPolicy], *positions: float, **fixed: Any) -> Knob:
    return Knob(name="threshold", positions=positions, policy=lambda v: kind(threshold=v, **fixed))


SCALES = (0.6, 0.8, 1, 1.4, 2)
PACES = (2, 3, 4, 5, 6)
RANGES = (2, 3, 4, 6, 8)
KNOBS: Mapping[str, Knob] = {
    "mixcache": Knob(
        name="tolerance",
        positions=(0.5, 0.8, 1, 1.5, 2.5),
        policy=lambda v: cachepass.MixCache(**mixcache_fields(v)),
    ),
    "adacache": Knob(
        name="scale",
        positions=SCALES,
        policy=lambda v: cachepass.AdaCache(**adacache_fields(v)),
    ),
    "adacache, no motion": Knob(
        name="scale",
        positions=SCALES,
        policy=lambda v: cachepass.AdaCache(**adacache_fields(v), motion=False),
    ),
    "firstblock": _threshold(cachepass.FirstBlock, 0.03, 0.06, 0.1, 0.15, 0.25),
    "teacache": _threshold(cachepass.TeaCache, 0.04, 0.08, 0.12, 0.2, 0.3),
    "dbcache": _threshold(cachepass.DBCache, 0.04, 0.08, 0.12, 0.2, 0.3, front=2),
    "easycache": _threshold(cachepass.EasyCache, 0.02, 0.035, 0.05, 0.08, 0.12),
    "dicache": _threshold(cachepass.DiCache, 0.08, 0.15, 0.25, 0.4, 0.6),
    "taylorseer": Knob(
        name="interval",
        positions=PACES,
        policy=lambda v: cachepass.TaylorSeer(interval=round(v)),
    ),
    "pab": Knob(
        name="range",
        positions=RANGES,
        policy=lambda v: cachepass.PAB(self_attention=round(v), cross=round(v)),
    ),
    "fastercache": Knob(
        name="range",
        positions=RANGES,
        policy=lambda v: cachepass.FasterCache(cfg_period=round(v)),
    ),
    "uniform, last output": Knob(name="period", positions=PACES, policy=_every("step")),
    "uniform, residual": Knob(name="period", positions=PACES, policy=_every("stack")),
    "uniform, taylor": Knob(name="period", positions=PACES, policy=_every("step", "taylor")),
}
"""Everything but magcache, whose numbers have to be calibrated first (benchmarks.peers does)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """One cached video."""

    motion: str
    psnr: float
    ssim: float
    lpips: float | None
    """Without weights for it there is none."""
    cost: float
    """Share of block work that was computed."""
    seconds: float
    plain_seconds: float
    """Of the uncached video, made just before or after."""


def measure(
    names: Sequence[str], requests: Sequence[Request], lpips: Lpips | None, progress: Progress
) -> Result:
    """Make all videos."""
    progress("compiling: plain")
    plain = build(None)
    references = [generate(plain, request)[0] for request in requests]
    videos: dict[str, dict[float, list[Video]]] = {}
    for name in names:
        knob = KNOBS[name]
        progress(f"compiling: {name}")
        pipe = build(knob.policy(knob.positions[0]))
        videos[name] = {position: [] for position in knob.positions}
        for i, request in enumerate(requests):
            _, plain_seconds = generate(plain, request)
            for position in knob.positions:
                progress(f"{name}, {knob.name} {position:g}, video {i + 1}/{len(requests)}")
                pipe.transformer.denoiser.policy = for_model(
                    knob.policy(position), pipe.transformer
                )
                video, seconds = generate(pipe, request)
                report: dict[str, Any] = cachepass.report(pipe).to_dict()["requests"][-1]
                videos[name][position].append(
                    Video(
                        motion=request.prompt.split()[2],
                        psnr=min(psnr(video, references[i]), PSNR_LIMIT),
                        ssim=ssim(video, references[i]),
                        lpips=lpips(video, references[i]) if lpips else None,
                        cost=report["blocks_computed"] / report["blocks"],
                        seconds=seconds,
                        plain_seconds=plain_seconds,
                    )
                )
    return Result(
        figures=[
            figure
            for name, of in videos.items()
            for position, made in of.items()
            for figure in _figures(f"{name}, {KNOBS[name].name} {position:g}", made)
        ],
        details={
            "steps": STEPS,
            "requests": [dataclasses.asdict(request) for request in requests],
            "videos": {
                name: {str(p): [dataclasses.asdict(v) for v in made] for p, made in of.items()}
                for name, of in videos.items()
            },
        },
    )


def _figures(name: str, made: Sequence[Video]) -> list[Figure]:
    def mean(key: str, of: Sequence[Video] = made) -> Estimate:
        return bootstrap(of, lambda some: statistics.fmean([getattr(v, key) for v in some]))

    figures = [
        Figure(name=f"{name}: speedup", estimate=bootstrap(made, speedup), unit="x"),
        Figure(name=f"{name}: PSNR", estimate=mean("psnr"), unit="dB"),
        Figure(name=f"{name}: SSIM", estimate=mean("ssim")),
        Figure(name=f"{name}: cost", estimate=mean("cost"), unit="of block work"),
    ]
    if made[0].lpips is not None:
        figures.append(Figure(name=f"{name}: LPIPS", estimate=mean("lpips")))
    for kind, slow in (("slow", True), ("fast", False)):
        some = [v for v in made if (v.motion in STILL) is slow]
        if some:
            figures.append(
                Figure(name=f"{name}: PSNR, {kind}", estimate=mean("psnr", some), unit="dB")
            )
    return figures


def speedup(made: Sequence[Video]) -> float:
    """Of the whole pipeline."""
    return sum(v.plain_seconds for v in made) / sum(v.seconds for v in made)


def picture(result: Result, path: Path) -> None:
    """Quality over speed, a curve for each policy; uniform schedules in thin lines."""
    curves = {
        name: [
            (
                speedup([Video(**v) for v in made]),
                statistics.fmean(v["psnr"] for v in made),
            )
            for made in of.values()
        ]
        for name, of in result.details["videos"].items()
    }
    draw(curves, path, thick={name for name in curves if not name.startswith("uniform")})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    status = StatusLine()
    started = time.perf_counter()
    requests = requests_of(options.prompts, options.seeds)
    lpips = Lpips(options.lpips) if options.lpips else None
    result = measure(options.only, requests, lpips, status.update)
    status.clear()
    keep(options.out, "frontier", result, time.perf_counter() - started)
    image = options.out.with_suffix(".png")
    picture(result, image)
    print(table("speed and quality of every policy", result.figures))
    print(f"\nmeans with 95 % intervals over the videos; details in {options.out}, plot {image}")


def _names(text: str) -> list[str]:
    names = text.split(",") if text not in KNOBS else [text]
    if unknown := [name for name in names if name not in KNOBS]:
        raise argparse.ArgumentTypeError(
            f"no policy {', '.join(unknown)}: choose from {'; '.join(KNOBS)}"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description="Measure every policy over a range of its main knob.",
    )
    add = parser.add_argument
    add("--only", type=_names, default=list(KNOBS), metavar="A,B", help="policies")
    add("--prompts", type=int, default=4, help=f"at most {len(PROMPTS)}")
    add("--seeds", type=int, default=1, help="videos for each prompt")
    add("--lpips", type=Path, metavar="FILE", help="weights, for LPIPS (benchmarks/lpips.py)")
    add("--out", type=Path, default=Path("benchmarks/results/frontier.json"))
    return parser


if __name__ == "__main__":
    main()
