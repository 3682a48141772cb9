"""What a cache costs and saves on a GPU, at the size of a real model: `make bench-gpu`.

Wan 2.1 1.3B in bfloat16 with random weights, which take as long as trained ones. A fixed schedule
says what is reused: no policy is measured. (call) One call of a video of 81 frames
at 480 x 832, cachepass without a cache against plain torch.compile. (reuse) The calls of a
schedule, with values on the GPU and on the host, against one that computes everything; what slots
take, against the plan. (rows) Four videos of 17 frames in one call, of which one computes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import cachepass
from benchmarks.figures import Figure, Result, keep, parts_of, table
from benchmarks.sampling import Estimate, interleave, median, ratio
from benchmarks.testbed import Progress, plain
from examples.shapes.progress import StatusLine

TEXT = (512, 4096)  # tokens and width of UMT5's embeddings
LONG = (21, 60, 104)  # of a latent: frames, height and width
SHORT = (5, 60, 104)
ROWS = 4
WARM = 4  # rounds until nothing is compiled and all of the host's memory is pinned
TITLES = {
    "call": "(call) one call: cachepass without a cache against plain torch.compile",
    "reuse": "(reuse) calls that reuse, against one that computes everything",
    "rows": "(rows) four videos in one call, of which one computes",
}


def wan(device: str = "cuda") -> Any:
    """Wan 2.1 1.3B, in the dtypes that `from_pretrained(torch_dtype=torch.bfloat16)` gives it."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
        )
    for name, parameter in model.named_parameters():
        if not any(kept in name for kept in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def inputs(size: Sequence[int], rows: int = 1) -> dict[str, Tensor]:
    """Of one call."""
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return {
        "hidden_states": make(rows, 16, *size),
        "timestep": torch.full((rows,), 500, device="cuda"),
        "encoder_hidden_states": make(rows, *TEXT),
    }


def timed(call: Callable[[], object]) -> float:
    """Seconds until it has run on the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_call(model: Any, rounds: int, progress: Progress) -> Result:
    """Part (call)."""
    given = inputs(LONG)
    subjects: dict[str, Callable[[], object]] = {}
    first = {}
    for name, compiled in (
        ("compute", cachepass.compile(model, policy="compute")),
        ("plain", plain(model)),
    ):
        progress(f"compiling {name}")
        subjects[name] = functools.partial(compiled, **given, return_dict=False)
        first[name] = timed(subjects[name])
    subjects["plain again"] = subjects["plain"]
    waited = {name: functools.partial(timed, call) for name, call in subjects.items()}
    interleave(waited, 2)
    seconds = interleave(waited, rounds, progress)
    figures = [
        Figure(
            name="compute / plain",
            estimate=ratio(seconds["compute"], seconds["plain"]),
            at_most=1.02,
        ),
        Figure(
            name="plain again / plain (null)",
            estimate=ratio(seconds["plain again"], seconds["plain"]),
        ),
        Figure(
            name="one plain call",
            estimate=median([1e3 * s for s in seconds["plain"]]),
            unit="ms",
            note=f"first calls: plain {first['plain']:.0f} s, compute {first['compute']:.0f} s",
        ),
    ]
    return Result(figures=figures, details={"first_call": first, "seconds": seconds})


def measure_reuse(model: Any, rounds: int, progress: Progress) -> Result:
    """Part (reuse)."""
    given = inputs(LONG)
    kinds = ("step", "stack", "attention", "mlp")
    period = len(kinds) + 1
    rounds += WARM
    schedule = cachepass.Schedule(
        reuse={period * i + at: kind for i in range(rounds) for at, kind in enumerate(kinds, 1)}
    )
    shapes = {name: torch.empty_like(value, device="meta") for name, value in given.items()}
    planned = cachepass.plan(wan("meta"), shapes, policy=schedule).bytes(branches=1)
    figures, details = [], {}
    for where, on_host in (("on the GPU", False), ("on the host", True)):
        cached: Any = cachepass.compile(model, policy=schedule, cache_on_host=on_host)
        session = cachepass.session(cached, num_inference_steps=period * rounds)
        call = functools.partial(cached, **given, return_dict=False)
        seconds = []
        for step in range(period * rounds):
            progress(f"values {where}, step {step + 1}")
            with session.at(step=step, branch="cond"):
                seconds.append(timed(call))
        taken = session.cache_bytes
        warm = seconds[WARM * period :]
        details[where] = {"seconds": seconds, "bytes": taken, "planned": planned}
        for at, kind in enumerate(kinds, start=1):
            figures.append(
                Figure(
                    name=f"{kind} reused, values {where} / computed",
                    estimate=ratio(warm[at::period], warm[::period]),
                    note=f"{1e3 * median(warm[at::period]).value:.1f} ms",
                )
            )
        share = taken / planned  # the same in each run
        figures.append(
            Figure(
                name=f"bytes of slots {where} / of the plan",
                estimate=Estimate(value=share, low=share, high=share),
                at_most=1.0,
                note=f"{taken / 1e9:.2f} GB",
            )
        )
    return Result(figures=figures, details=details)


def _in_turn(
    cached: Any, given: Mapping[str, Tensor], videos: Sequence[cachepass.Session], computes: int
) -> Iterator[None]:
    """Calls of several videos: in the first all compute, in the next ones the first few do."""
    for step in itertools.count(0, 2):
        listed = [
            video.row(branch="cond", step=step + (step > 0 and row >= computes))
            for row, video in enumerate(videos)
        ]
        with cachepass.rows(cached, listed):
            cached(**given, return_dict=False)
        torch.cuda.synchronize()
        yield


def measure_rows(model: Any, rounds: int, progress: Progress) -> Result:
    """Part (rows)."""
    given = inputs(SHORT, ROWS)
    steps = 2 * (rounds + 3)
    schedule = cachepass.Schedule(reuse=dict.fromkeys(range(1, steps, 2), "stack"))
    cached: Any = cachepass.compile(model, policy=schedule)
    subjects: dict[str, Callable[[], object]] = {}
    for name, computes in (("all", ROWS), ("one", 1), ("none", 0)):
        progress(f"{name} of {ROWS} computes")
        videos = [cachepass.session(cached, num_inference_steps=steps) for _ in range(ROWS)]
        subjects[name] = functools.partial(next, _in_turn(cached, given, videos, computes))
        subjects[name]()
    interleave(subjects, 2)
    seconds = interleave(subjects, rounds, progress)
    figures = [
        Figure(
            name="one of four computes / all",
            estimate=ratio(seconds["one"], seconds["all"]),
            note=f"all: {1e3 * median(seconds['all']).value:.0f} ms",
        ),
        Figure(
            name="none computes / all",
            estimate=ratio(seconds["none"], seconds["all"]),
        ),
    ]
    return Result(figures=figures, details={"seconds": seconds})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--only", type=parts_of(TITLES), default=list(TITLES), metavar="A,B", help="parts"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "there is no GPU that torch can see: these figures are of one\n")
    parts = {"call": measure_call, "reuse": measure_reuse, "rows": measure_rows}
    model = wan()
    status = StatusLine()
    for part in options.only:
        started = time.perf_counter()
        with torch.no_grad():
            result = parts[part](model, options.rounds, functools.partial(_show, status, part))
        status.clear()
        keep(options.out, part, result, time.perf_counter() - started)
        print(table(TITLES[part], result.figures) + "\n", flush=True)


def _show(status: StatusLine, part: str, what: str) -> None:
    status.update(f"({part}) {what}")


if __name__ == "__main__":
    main()
