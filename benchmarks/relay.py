"""(e) SRDiffusion: a large model that hands over to a small one, at equal time.

Against the large model alone under uniform schedules, whose envelope of quality over time is
what handing over has to beat; then with a cache on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cachepass
from benchmarks.baseline import PERIODS, Blind, at_cost, envelope
from benchmarks.figures import Figure, Result
from benchmarks.quality import PSNR_LIMIT, STEPS, build, generate, requests_of
from benchmarks.sampling import bootstrap
from benchmarks.testbed import Progress
from examples.shapes.model import load
from examples.shapes.quality import psnr

# The first steps are where the two models part: so many of the large one.
MIN_STEPS = (5, 10, 15, 20, 25, 30)
STARTS = (5, 10, 15)


@dataclass(frozen=True, kw_only=True)
class Made:
    """One video, beside the large model's own."""

    psnr: float
    share: float
    """Of the seconds that the large model takes under plain torch.compile."""
    switched: int | None = None


def measure(prompts: int, seeds: int, progress: Progress) -> Result:
    """Make all videos, those that are compared in turns with uncached ones."""
    requests = requests_of(prompts, seeds)
    progress("compiling: plain")
    plain = build(None)
    uniform = [
        Blind(granularity="step", period=period, start=start)
        for start in STARTS
        for period in PERIODS
    ]
    progress("compiling: uniform schedules")
    scheduled = build(uniform[0].schedule(STEPS))
    relays: dict[str, Any] = {}
    for name, policy in (("alone", "compute"), ("both cached", "mixcache")):
        progress(f"compiling: relay, {name}")
        relays[name] = build(
            cachepass.SRDiffusion(
                render=load("small"), sketch_policy=policy, render_policy=policy, min_steps=1
            ),
            steps=4,  # so that both models are compiled
        )
    made: dict[str, list[Made]] = {}
    for i, request in enumerate(requests):
        reference, seconds = generate(plain, request)
        where = f"video {i + 1}/{len(requests)}"
        for blind in uniform:
            progress(f"{where}: {blind.name}")
            scheduled.transformer.denoiser.policy = blind.schedule(STEPS).combine()
            video, taken = generate(scheduled, request)
            made.setdefault(blind.name, []).append(
                Made(psnr=min(psnr(video, reference), PSNR_LIMIT), share=taken / seconds)
            )
        for name, pipe in relays.items():
            for least in MIN_STEPS:
                progress(f"{where}: relay, {name}, from step {least}")
                switch = pipe.transformer.switch
                switch.policy = replace(switch.policy, min_steps=least)
                video, taken = generate(pipe, request)
                made.setdefault(f"{name}, {least} steps", []).append(
                    Made(
                        psnr=min(psnr(video, reference), PSNR_LIMIT),
                        share=taken / seconds,
                        switched=switch.switched_at[-1],
                    )
                )
    names = [blind.name for blind in uniform]
    rivals = {name: made[name] for name in names}
    return Result(
        figures=[f for n, of in made.items() if n not in names for f in _figures(n, of, rivals)],
        details={
            "steps": STEPS,
            "requests": [asdict(request) for request in requests],
            "videos": {name: [asdict(m) for m in of] for name, of in made.items()},
        },
    )


def _figures(name: str, of: Sequence[Made], rivals: Mapping[str, Sequence[Made]]) -> list[Figure]:
    videos = range(len(of))

    def mean(key: str, made: Sequence[Made], chosen: Sequence[int]) -> float:
        return statistics.fmean([getattr(made[i], key) for i in chosen])

    def over(chosen: Sequence[int]) -> float:
        curve = envelope(
            (mean("share", made, chosen), mean("psnr", made, chosen)) for made in rivals.values()
        )
        return mean("psnr", of, chosen) - at_cost(curve, mean("share", of, chosen))

    switched = sorted({m.switched for m in of}, key=str)
    return [
        Figure(
            name=f"{name}: speedup",
            estimate=bootstrap(videos, lambda chosen: 1 / mean("share", of, chosen)),
            unit="x",
            note=f"switched at {', '.join(map(str, switched))}",
        ),
        Figure(
            name=f"{name}: PSNR",
            estimate=bootstrap(videos, lambda chosen: mean("psnr", of, chosen)),
            unit="dB",
        ),
        Figure(
            name=f"{name}: PSNR over the best uniform schedule of equal time",
            estimate=bootstrap(videos, over),
            unit="dB",
            at_least=0.0,
        ),
    ]
