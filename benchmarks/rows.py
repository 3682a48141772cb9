"""Rows: a decision for each against one for the batch, and requests that come and go.

    python -m benchmarks.rows                 both parts, about half an hour on one core
    python -m benchmarks.rows --only b        one of them

(a) Four videos of different motion in a batch, under AdaCache over a range of its codebook: the
time of a batch against the PSNR of its worst video, where each row decides for itself, and where
one decision is made for all of them: from their summed signals, as everybody else does, or from
those of the row that changes most.

(b) Sixteen requests that come at random, through `cachepass.serve.Batcher`, against the same
sixteen in full batches of four.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import random
import threading
import time
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cachepass
from benchmarks.dials import adacache_fields
from benchmarks.figures import Figure, Result, keep, parts_of, table
from benchmarks.quality import PROMPTS, PSNR_LIMIT
from benchmarks.sampling import Estimate, interleave, median, ratio
from benchmarks.testbed import LATENT, Progress
from cachepass.runtime import denoiser
from cachepass.runtime.frame import Frame
from cachepass.runtime.policy import Measure
from cachepass.runtime.row import Row
from cachepass.serve import Batcher, Request
from examples.shapes.codec import PatchCodec
from examples.shapes.model import load
from examples.shapes.pipeline import GUIDANCE_SCALE, build_scheduler, embed_prompts
from examples.shapes.progress import StatusLine
from examples.shapes.quality import psnr

TITLES = {"a": "(a) a decision for each row", "b": "(b) continuous batching"}
STEPS = 50
ROWS = 4
SCALES = (0.6, 0.8, 1.0, 1.4, 2.0, 2.8)
REQUESTS = 16
BUSY = 0.7
"""The last request comes when this share of the time of full batches has passed."""


Point = tuple[float, float, float]
"""Seconds of a batch, PSNR of its worst video, share of block work that was computed."""


class Summed(Frame):
    """One decision for the batch: every row is told the sum of all rows' signals."""

    def _measures(self, row: Row) -> dict[str, Measure]:
        each = [super(Summed, self)._measures(other) for other in self.rows]
        found = {}
        for name in each[0]:
            of_rows = [measures[name] for measures in each]
            moves = [m.second for m in of_rows if m.second is not None]
            found[name] = dataclasses.replace(
                of_rows[0],
                diff=sum(m.diff for m in of_rows),
                ref=sum(m.ref for m in of_rows),
                second=sum(moves) / len(moves) if moves else None,
            )
        return found


class Largest(Frame):
    """One decision for the batch: every row is told the signals of the row that changes most."""

    def _measures(self, row: Row) -> dict[str, Measure]:
        each = [super(Largest, self)._measures(other) for other in self.rows]
        names = each[0]
        return {name: max((m[name] for m in each), key=lambda m: m.rel) for name in names}


KINDS: Mapping[str, type[Frame]] = {
    "each row": Frame, "summed": Summed, "largest": Largest,
}  # fmt: skip


class Batch:
    """Videos that are made together, and what they are without a cache."""

    def __init__(self, prompts: Sequence[str], steps: int) -> None:
        scheduler: Any = build_scheduler("euler")
        scheduler.set_timesteps(steps)
        self.times, self.sigmas = scheduler.timesteps, scheduler.sigmas.tolist()
        shape = (len(prompts), *LATENT[1:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        self.texts = {
            "cond": embed_prompts(list(prompts)),
            "uncond": embed_prompts([""] * len(prompts)),
        }

    def request(self) -> Request:
        """All of it as one request."""
        return self.request_of(slice(None))

    def request_of(self, which: slice) -> Request:
        """Some of its videos as one request."""
        latent, texts = self.noise[which], {b: t[which] for b, t in self.texts.items()}
        for i, moment in enumerate(self.times):
            given = {
                "hidden_states": latent,
                "timestep": moment.expand(len(latent)),
                "return_dict": False,
            }
            v = yield {b: given | {"encoder_hidden_states": text} for b, text in texts.items()}
            guided = v["uncond"] + GUIDANCE_SCALE * (v["cond"] - v["uncond"])
            latent = latent + (self.sigmas[i + 1] - self.sigmas[i]) * guided
        return latent


@torch.no_grad()
def run(model: Any, request: Request, steps: int) -> tuple[Tensor, float]:
    """A request in a session of its own: its latent, and the share of block work computed."""
    session = cachepass.session(model, num_inference_steps=steps)
    step, outputs = 0, None
    while True:
        try:
            calls = next(request) if outputs is None else request.send(outputs)
        except StopIteration as end:
            (told,) = cachepass.report(session).to_dict()["requests"]
            return end.value, told["blocks_computed"] / told["blocks"]
        outputs = {}
        for branch, given in calls.items():
            with session.at(step=step, branch=branch):
                outputs[branch] = model(**given)[0]
        step += 1


def frames(latent: Tensor) -> Tensor:
    """(rows, frames, 3, height, width) in [0, 1]."""
    decoded: Tensor = PatchCodec.load().decode(latent).sample
    return (decoded.transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def worst(latent: Tensor, reference: Tensor) -> float:
    """The PSNR of the worst row."""
    pairs = zip(frames(latent), frames(reference), strict=True)
    return min(min(psnr(a, b), PSNR_LIMIT) for a, b in pairs)


def apart_and_as_one(model: nn.Module, batches: int, progress: Progress) -> Result:
    """Part (a)."""
    sets = [PROMPTS[i * ROWS : (i + 1) * ROWS] for i in range(batches)]
    work = [Batch(prompts, STEPS) for prompts in sets]
    progress("without a cache")
    full = cachepass.compile(model, policy="compute")
    references = [run(full, batch.request(), STEPS)[0] for batch in work]
    started = time.perf_counter()
    run(full, work[0].request(), STEPS)
    uncached = time.perf_counter() - started
    # A knob is a number in a rule: what is compiled serves all of its positions.
    cached: Any = cachepass.compile(model, policy="adacache")
    run(cached, work[0].request(), STEPS)
    points: dict[str, list[list[Point]]] = {name: [[] for _ in work] for name in KINDS}
    for scale in SCALES:
        progress(f"codebook x {scale:g}")
        policy = cachepass.AdaCache(**adacache_fields(scale)).combine()
        cached.denoiser.policy = policy
        for i, batch in enumerate(work):
            made: dict[str, tuple[Tensor, float]] = {}

            def one(name: str, batch: Batch = batch, made: Any = made) -> None:
                with unittest.mock.patch.object(denoiser, "Frame", KINDS[name]):
                    made[name] = run(cached, batch.request(), STEPS)

            seconds = interleave({name: functools.partial(one, name) for name in KINDS}, 1)
            for name in KINDS:
                latent, cost = made[name]
                points[name][i].append((seconds[name][0], worst(latent, references[i]), cost))
    figures = []
    for name, target in (("summed", 1.3), ("largest", None)):
        pairs = zip(points["each row"], points[name], strict=True)
        gains = [gain for apart, together in pairs for gain in _gains(apart, together)]
        nothing = Estimate(value=math.nan, low=math.nan, high=math.nan)
        figures.append(
            Figure(
                name=f"AdaCache, batch of 4: a decision for each row / one from the {name} signals",
                estimate=median(gains) if gains else nothing,
                unit="x throughput",
                at_least=target,
                note="at equal PSNR of the worst row",
            )
        )
    pace = {
        name: [seconds / cost for batch in points[name] for seconds, _, cost in batch]
        for name in KINDS
    }
    figures.append(
        Figure(
            name="seconds for equal block work, each row / one decision",
            estimate=ratio(pace["each row"], pace["summed"]),
            note="what it costs to gather rows and put them back",
        )
    )
    return Result(figures=figures, details={"uncached_seconds": uncached, "points": points})


def _gains(each: Sequence[Point], one_for_all: Sequence[Point]) -> list[float]:
    """At each point of the second curve: its time over that of the first at the same PSNR."""
    curve = sorted((quality, seconds) for seconds, quality, _ in each)
    found = []
    for seconds, quality, _ in one_for_all:
        for (low, fast), (high, slow) in itertools.pairwise(curve):
            if low <= quality <= high and high > low:
                share = (quality - low) / (high - low)
                found.append(
                    seconds / math.exp((1 - share) * math.log(fast) + share * math.log(slow))
                )
                break
    return found


def continuous(model: nn.Module, rounds: int, steps: int, progress: Progress) -> Result:
    """Part (b)."""
    cached: Any = cachepass.compile(model, policy="adacache")
    work = Batch([PROMPTS[i % len(PROMPTS)] for i in range(REQUESTS)], steps)

    def full_batches() -> None:
        for i in range(0, REQUESTS, ROWS):
            run(cached, work.request_of(slice(i, i + ROWS)), steps)

    def come_and_go(last: float) -> None:
        moments = sorted(random.Random(3).uniform(0, last) for _ in range(REQUESTS - ROWS))
        moments = [0.0] * ROWS + moments
        with Batcher(cached, max_rows=ROWS) as batcher:
            futures = []
            started = time.perf_counter()
            for i, moment in enumerate(moments):
                threading.Event().wait(max(0.0, started + moment - time.perf_counter()))
                one = work.request_of(slice(i, i + 1))
                futures.append(batcher.submit(one, num_inference_steps=steps))
            for future in futures:
                future.result()

    progress("compiling")
    full_batches()
    run(cached, work.request_of(slice(0, 1)), steps)  # a row alone is compiled for itself
    started = time.perf_counter()
    full_batches()
    last = BUSY * (time.perf_counter() - started)
    subjects: dict[str, Callable[[], object]] = {
        "full batches": functools.partial(_in_a_thread, full_batches),
        "continuous": functools.partial(come_and_go, last),
    }
    seconds = interleave(subjects, rounds, progress)
    figure = Figure(
        name="16 requests that come at random / the same in full batches",
        estimate=ratio(seconds["full batches"], seconds["continuous"]),
        unit="x throughput",
        at_least=0.95,
    )
    return Result(figures=[figure], details={"seconds": seconds, "last_comes_after": last})


def _in_a_thread(call: Callable[[], None]) -> None:
    """Not in the main one, as a batcher does not either.

    Each thread that computes has threads of OpenMP of its own. Once there are more of them than
    cores, they sleep where they would have waited awake: a fifth slower on two cores.
    """
    with ThreadPoolExecutor(max_workers=1) as one:
        one.submit(call).result()


def _show(status: StatusLine, part: str, text: str) -> None:
    status.update(f"({part}) {text}")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Measure rows that decide on their own.")
    parser.add_argument(
        "--only", type=parts_of(TITLES), default=list(TITLES), metavar="A,B", help="parts: a,b"
    )
    parser.add_argument("--batches", type=int, default=2, help="(a) of four videos, at most 2")
    parser.add_argument("--rounds", type=int, default=3, help="(b)")
    parser.add_argument("--steps", type=int, default=30, help="(b) of a request")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rows.json"))
    options = parser.parse_args()
    model = load("large")
    parts: dict[str, Callable[[Progress], Result]] = {
        "a": lambda p: apart_and_as_one(model, options.batches, p),
        "b": lambda p: continuous(model, options.rounds, options.steps, p),
    }
    status = StatusLine()
    for name in options.only:
        started = time.perf_counter()
        result = parts[name](functools.partial(_show, status, name))
        status.clear()
        print(table(TITLES[name], result.figures), flush=True)
        keep(options.out, name, result, time.perf_counter() - started)


if __name__ == "__main__":
    main()
