"""(f) One graph: what it costs as a whole, and what its skips are worth in onnxruntime."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import cachepass
from benchmarks.figures import Figure, Result
from benchmarks.overhead import against_plain
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import CachedLoop, Call, Loop, Progress, plain, plain_call
from cachepass.onnx import Denoiser
from cachepass.runtime.policy import NamedPolicy
from examples.shapes.model import load

SHORT, LONG = 2, 50
ROUNDS_PER_PAIR = 4
VIDEO = cachepass.MixCache()
SITES = ("step", "stack")
"""Reused as a whole: the call, or all of its blocks."""


def file_of(policy: NamedPolicy, loop: Loop, folder: Path) -> Denoiser:
    """The large model under a policy, in onnxruntime."""
    example = {
        "hidden_states": loop.noise,
        "timestep": loop.times[0],
        "encoder_hidden_states": loop.cond,
        "return_dict": False,
    }
    path = folder / "model.onnx"
    cachepass.export_onnx(load("large"), example, path, policy=policy)
    return Denoiser(path)


def denoiser_call(denoiser: Denoiser) -> Call:
    """Calls of a file; steps and branches are told."""
    inner = plain_call(denoiser)

    def call(x: Tensor, time: Tensor, text: Tensor, step: int, branch: str) -> Tensor:
        if step != denoiser.step:
            denoiser.end_step()
        with denoiser.cache_context(branch):
            return inner(x, time, text, step, branch)

    return call


def video_of(denoiser: Denoiser, loop: Loop) -> Callable[[], Tensor]:
    """A loop as a request of a file."""

    def run() -> Tensor:
        denoiser.begin_request(loop.steps)
        return loop.run(denoiser_call(denoiser))

    return run


def measure(pairs: int, videos: int, progress: Progress) -> Result:
    """Time the whole graph, calls that reuse, and videos."""
    model, short, long = load("large"), Loop.build(SHORT), Loop.build(LONG)
    graph = CachedLoop(
        model=cachepass.compile(model, policy="compute", lowering="graph"), loop=short
    )
    rounds = ROUNDS_PER_PAIR * pairs
    figures, seconds = against_plain("graph, compute", graph, model, rounds, progress)

    with tempfile.TemporaryDirectory() as folder:
        for site in SITES:
            progress(f"exporting: {site}")
            file = file_of(cachepass.Schedule(reuse={1: site}), short, Path(folder))
            progress(f"calls that reuse: {site}")
            figures.append(_skip(file, short, site, rounds))
        progress("exporting: a video")
        files = {
            name: video_of(file_of(policy, long, Path(folder)), long)
            for name, policy in (("onnx", cachepass.Compute()), ("onnx, cached", VIDEO))
        }
    subjects: dict[str, Callable[[], object]] = {
        "compiled": functools.partial(long.run, plain_call(plain(model))),
        "compiled, cached": CachedLoop.build(VIDEO, long, model),
        **files,
    }
    progress("compiling for videos")
    interleave(subjects, 1)
    made = interleave(subjects, videos, lambda done: progress(f"videos: {done}"))
    return Result(figures=[*figures, *_videos(made)], details={"seconds": seconds | made})


def _skip(denoiser: Denoiser, loop: Loop, site: str, rounds: int) -> Figure:
    """A call that reuses a site over one that computes."""
    call = functools.partial(denoiser_call(denoiser), loop.noise, loop.times[0], loop.cond)

    def computed() -> None:
        denoiser.begin_request(SHORT)
        call(0, "cond")

    def reused() -> None:
        call(1, "cond")

    computed()
    reused()
    assert denoiser.reused[-1][2] == [site]

    # Always in this order: the one that computes starts a request.
    subjects: dict[str, Callable[[], object]] = {"computed": computed, "reused": reused}
    made = [interleave(subjects, 1) for _ in range(rounds)]
    seconds = {name: [each[name][0] for each in made] for name in subjects}
    return Figure(
        name=f"onnxruntime: a call that reuses {site} / one that computes",
        estimate=ratio(seconds["reused"], seconds["computed"]),
        at_most=0.05,
        note=f"computes no block; one that computes takes "
        f"{1e3 * median(seconds['computed']).value:.0f} ms",
    )


def _videos(seconds: dict[str, list[float]]) -> list[Figure]:
    factor = {
        name: [a / b for a, b in zip(seconds[name], seconds[f"{name}, cached"], strict=True)]
        for name in ("compiled", "onnx")
    }
    return [
        Figure(
            name="mixcache, a video: regions",
            estimate=median(factor["compiled"]),
            unit="x plain torch.compile",
        ),
        Figure(
            name="mixcache, a video: onnxruntime",
            estimate=median(factor["onnx"]),
            unit="x the uncached file",
        ),
        Figure(
            name="factor in onnxruntime / factor of regions",
            estimate=ratio(factor["onnx"], factor["compiled"]),
            at_least=0.9,
        ),
        Figure(
            name="onnxruntime / torch.compile, uncached",
            estimate=ratio(seconds["onnx"], seconds["compiled"]),
        ),
    ]
