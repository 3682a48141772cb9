"""(d) Quality at equal cost: adaptive policies against blind schedules.

Cost is the share of block work that was computed. The videos of a policy are compared
with the uncached ones; so are those of uniform schedules of every granularity, and the
best of these at the policy's own cost is what the policy has to beat.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import cachepass
from benchmarks.baseline import GRANULARITIES, Blind, around, at_cost, envelope
from benchmarks.figures import Figure, Result
from benchmarks.sampling import Estimate, bootstrap
from benchmarks.testbed import ADAPTIVE, Progress, plain
from cachepass.runtime.policy import NamedPolicy
from examples.shapes.pipeline import GUIDANCE_SCALE, build_pipeline
from examples.shapes.quality import psnr, ssim

STEPS = 50

# The first four differ in motion. None served to tune a default.
PROMPTS = (
    "white cross still stripes",
    "magenta disc bounce gradient",
    "blue triangle orbit plain",
    "green square spin checker",
    "yellow disc drift stripes",
    "red cross bounce checker",
    "white triangle spin gradient",
    "magenta square orbit plain",
)

# Equal videos have no finite PSNR; compiled models differ by rounding alone above this.
PSNR_LIMIT = 100.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One cached video."""

    psnr: float
    ssim: float
    cost: float
    """Share of block work that was computed."""
    seconds: float


def requests_of(prompts: int, seeds: int) -> list[Request]:
    """So many prompts, and videos of each."""
    return [
        Request(prompt=prompt, seed=100 + seed)
        for prompt in PROMPTS[:prompts]
        for seed in range(seeds)
    ]


def generate(pipe: Any, request: Request, steps: int = STEPS) -> tuple[torch.Tensor, float]:
    """The video and the seconds it took."""
    started = time.perf_counter()
    frames = pipe(
        request.prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
    ).frames
    return frames[0], time.perf_counter() - started


def build(policy: NamedPolicy | cachepass.SRDiffusion | None, steps: int = 2) -> Any:
    """A pipeline, compiled by a first short request; plain without a policy."""
    pipe: Any = build_pipeline("large")
    pipe.set_progress_bar_config(disable=True)
    if policy is None:
        pipe.transformer = plain(pipe.transformer)
    else:
        pipe = cachepass.compile(pipe, policy=policy)
    with warnings.catch_warnings():
        # So few steps leave nothing to reuse, of which the library rightly warns.
        warnings.simplefilter("ignore")
        generate(pipe, Request(prompt=PROMPTS[0], seed=0), steps)
    return pipe


def score(pipe: Any, request: Request, reference: torch.Tensor) -> Score:
    """Make a video with a cache and compare it."""
    video, seconds = generate(pipe, request)
    report: dict[str, Any] = cachepass.report(pipe).to_dict()["requests"][-1]
    return Score(
        psnr=min(psnr(video, reference), PSNR_LIMIT),
        ssim=ssim(video, reference),
        cost=report["blocks_computed"] / report["blocks"],
        seconds=seconds,
    )


def measure(prompts: int, seeds: int, window: float, progress: Progress) -> Result:
    """Make all videos; `window` is how far from a policy's cost schedules are tried."""
    requests = requests_of(prompts, seeds)
    references, plain_seconds, adaptive = _adaptive(requests, progress)
    costs = [statistics.fmean(s.cost for s in scores) for scores in adaptive.values()]
    blind = _blind(around(costs, window, STEPS), requests, references, progress)

    figures = []
    for name, scores in adaptive.items():
        figures += _figures(name, scores, plain_seconds, blind)
    return Result(
        figures=figures,
        details={
            "steps": STEPS,
            "requests": [asdict(request) for request in requests],
            "plain_seconds": plain_seconds,
            "policies": {name: [asdict(s) for s in scores] for name, scores in adaptive.items()},
            "uniform": {b.name: [asdict(s) for s in scores] for b, scores in blind.items()},
        },
    )


def _adaptive(
    requests: Sequence[Request], progress: Progress
) -> tuple[list[torch.Tensor], list[float], dict[str, list[Score]]]:
    """Uncached videos, their seconds, and the scores of all policies, made in turns."""
    progress("compiling: plain")
    uncached = build(None)
    pipes = {}
    for name, policy in ADAPTIVE.items():
        progress(f"compiling: {name}")
        pipes[name] = build(policy)
    references, seconds = [], []
    scores: dict[str, list[Score]] = {name: [] for name in pipes}
    for i, request in enumerate(requests):
        progress(f"video {i + 1}/{len(requests)}: {request.prompt}, seed {request.seed}")
        video, taken = generate(uncached, request)
        references.append(video)
        seconds.append(taken)
        # Each policy is next to the uncached run once in a while.
        names = list(pipes)[i % len(pipes) :] + list(pipes)[: i % len(pipes)]
        for name in names:
            scores[name].append(score(pipes[name], request, video))
    return references, seconds, scores


def _blind(
    schedules: Sequence[Blind],
    requests: Sequence[Request],
    references: Sequence[torch.Tensor],
    progress: Progress,
) -> dict[Blind, list[Score]]:
    """The scores of uniform schedules."""
    scores: dict[Blind, list[Score]] = {}
    for granularity in GRANULARITIES:
        family = [blind for blind in schedules if blind.granularity == granularity]
        pipe = build(family[0].schedule(STEPS)) if family else None
        for blind in family:
            progress(f"uniform schedules, {len(scores) + 1}/{len(schedules)}: {blind.name}")
            # All of a granularity have the same sites, hence the same graph, and a
            # policy is nothing but a rule: no need to compile anew for each.
            assert pipe is not None
            pipe.transformer.denoiser.policy = blind.schedule(STEPS).combine()
            scores[blind] = [
                score(pipe, request, reference)
                for request, reference in zip(requests, references, strict=True)
            ]
    return scores


def _figures(
    name: str,
    scores: Sequence[Score],
    plain_seconds: Sequence[float],
    blind: Mapping[Blind, Sequence[Score]],
) -> list[Figure]:
    """Speed, quality and the verdict of one policy; intervals are over the videos."""
    videos = range(len(scores))

    def mean(key: str, of: Sequence[Score], chosen: Sequence[int]) -> float:
        return statistics.fmean([getattr(of[i], key) for i in chosen])

    def speedup(chosen: Sequence[int]) -> float:
        return sum(plain_seconds[i] for i in chosen) / sum(scores[i].seconds for i in chosen)

    def over(rivals: Sequence[Sequence[Score]]) -> Callable[[Sequence[int]], float]:
        def difference(chosen: Sequence[int]) -> float:
            curve = envelope((mean("cost", r, chosen), mean("psnr", r, chosen)) for r in rivals)
            return mean("psnr", scores, chosen) - at_cost(curve, mean("cost", scores, chosen))

        return difference

    def over_videos(key: str) -> Estimate:
        return bootstrap(videos, lambda chosen: mean(key, scores, chosen))

    usual = bootstrap(videos, over([s for b, s in blind.items() if not b.late]))
    harder = bootstrap(videos, over(list(blind.values())))
    outside = "no uniform schedules on both sides of this cost: no verdict"
    return [
        Figure(
            name=f"{name}: speedup",
            estimate=bootstrap(videos, speedup),
            unit="x",
            at_least=1.9 if name == "mixcache" else None,
        ),
        Figure(name=f"{name}: cost", estimate=over_videos("cost"), unit="of block work"),
        Figure(name=f"{name}: PSNR", estimate=over_videos("psnr"), unit="dB"),
        Figure(name=f"{name}: SSIM", estimate=over_videos("ssim")),
        Figure(
            name=f"{name}: PSNR over the best uniform schedule",
            estimate=usual,
            unit="dB",
            at_least=None if math.isnan(usual.value) else 0.0,
            note=outside if math.isnan(usual.value) else "",
        ),
        Figure(
            name=f"{name}: PSNR over those that may start late",
            estimate=harder,
            unit="dB",
            note=outside if math.isnan(harder.value) else "",
        ),
    ]
