"""What running routed experts as one operation is worth: `make bench-moe`.

(cpu) The user's own loop, HiDream's layer of routed experts, against the same layer as cachepass
captures it, both without a compiler. (compiled) The same, ours through Inductor, which the loop
can go through in pieces only, with what is between them in Python. (nucleus) The
layer of NucleusMoE: its loop, its own grouped path, and our operation on its weights.
(gpu) Where there is one: a dense product of the same work, `grouped_mm` and the Triton kernel.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts
from torch import Tensor, nn

from benchmarks.figures import Figure, Result, keep, parts_of, table
from benchmarks.sampling import interleave, median, ratio
from benchmarks.testbed import Progress
from cachepass.moe.grouped import grouped_linear
from cachepass.moe.shadow import Shadow
from cachepass.moe.tiles import Tiles, fitting
from examples.shapes.progress import StatusLine

TOKENS, K, HIDDEN = 1024, 2, 256
EXPERTS = (8, 16, 32, 64)
WIDTHS = (128, 256, 512)
TITLES = {
    "cpu": "(cpu) HiDream's loop / one operation, without a compiler",
    "compiled": "(compiled) HiDream's loop / one operation, through Inductor",
    "nucleus": "(nucleus) NucleusMoE's grouped path against its loop and our operation",
    "gpu": "(gpu) the Triton kernel against a dense product and grouped_mm",
}


class Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _layer(width: int, experts: int, dtype: torch.dtype) -> nn.Module:
    # It makes two thirds of what it is given, as a multiple of 256.
    layer: nn.Module = MOEFeedForwardSwiGLU(width, HIDDEN * 3 // 2, experts, K)
    layer.shared_experts = Nothing()  # would be the same on both sides
    return layer.eval().to(dtype)


def _loads(layer: Any, width: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Inputs for which the gate spreads tokens, or sends them all to one expert."""
    spread = torch.randn(1, TOKENS, width, dtype=dtype)
    return {"spread": spread, "one heavy": spread + 4 * layer.gate.weight[0] * width**0.5}


def measure_layers(rounds: int, progress: Progress, *, compiled: bool) -> Result:
    """HiDream's loop against the same layer with its experts run as one."""
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    cases = [(width, experts, torch.float32) for width in WIDTHS for experts in EXPERTS]
    cases += [(256, experts, torch.bfloat16) for experts in EXPERTS]
    if compiled:
        cases = [case for case in cases if case[1] == EXPERTS[-1]]
    for width, experts, dtype in cases:
        torch.compiler.reset()  # the loop's pieces are compiled anew for each number of rows
        layer = _layer(width, experts, dtype)
        shadow = Shadow(layer)
        assert shadow.batched, list(shadow.explain())
        ours: Any = torch.compile(shadow.module, fullgraph=True) if compiled else shadow.module
        broken = torch.compile(layer)  # in pieces: the loop cannot be captured
        for load, x in _loads(layer, width, dtype).items():
            what = f"{experts} experts, {width} wide, {str(dtype)[6:]}, {load}"
            subjects = {
                "loop": functools.partial(layer, x),
                "one": functools.partial(ours, x),
            }
            if compiled:
                subjects["compiled loop"] = functools.partial(broken, x)
            progress(what)
            error = _error(subjects["one"](), subjects["loop"]())
            seconds = interleave(subjects, rounds)
            samples[what] = seconds
            figures.append(
                Figure(
                    name=what,
                    estimate=ratio(seconds["loop"], seconds["one"]),
                    unit="x",
                    at_least=1.5 if compiled and load == "spread" else None,
                    note=f"loop {median(seconds['loop']).value * 1e3:.1f} ms; error {error:.0e}",
                )
            )
            if compiled:
                figures.append(
                    Figure(
                        name=f"{what}: loop in pieces",
                        estimate=ratio(seconds["compiled loop"], seconds["one"]),
                        unit="x",
                    )
                )
    return Result(figures=figures, details={"tokens": TOKENS, "k": K, "seconds": samples})


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def measure_nucleus(rounds: int, progress: Progress) -> Result:
    """The experts of NucleusMoE, whose weights are one tensor already."""
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    for width, experts in ((256, 64), (512, 64), (512, 128)):
        module = SwiGLUExperts(width, HIDDEN, experts)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=width**-0.5)
        x = torch.randn(TOKENS * K, width)
        counts = torch.full((experts,), TOKENS * K // experts)
        offsets = counts.cumsum(0).to(torch.int32)
        up, down = ([w.t() for w in p] for p in (module.gate_up_proj, module.down_proj))

        def ours(
            x: Tensor = x,
            offsets: Tensor = offsets,
            up: Sequence[Tensor] = up,
            down: Sequence[Tensor] = down,
        ) -> Tensor:
            gate, value = grouped_linear(x, None, offsets, up, []).chunk(2, dim=-1)
            out: Tensor = grouped_linear(F.silu(gate) * value, None, offsets, down, [])
            return out

        subjects: dict[str, Callable[[], Tensor]] = {
            "loop": functools.partial(module._run_experts_for_loop, x, counts),
            "grouped": functools.partial(module._run_experts_grouped_mm, x, counts),
            "ours": ours,
        }
        what = f"{experts} experts, {width} wide"
        progress(what)
        error = _error(subjects["ours"](), subjects["grouped"]())
        seconds = interleave(subjects, rounds)
        samples[what] = seconds
        for name in ("loop", "ours"):
            figures.append(
                Figure(
                    name=f"{what}: {name} / its grouped path",
                    estimate=ratio(seconds[name], seconds["grouped"]),
                    unit="x",
                    note=f"error {error:.0e}" if name == "ours" else "",
                )
            )
    return Result(figures=figures, details={"rows": TOKENS * K, "seconds": samples})


def measure_gpu(rounds: int, progress: Progress) -> Result:
    """One grouped linear layer in bfloat16, of the sizes of HiDream and of many small experts.

    The rows of a layer's first product are gathered on the way, those of its second are sorted.
    """
    from cachepass.moe.triton_kernel import triton_grouped_linear

    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    for experts, width, columns, choices in ((4, 2560, 6912, 8192), (64, 2048, 2048, 16384)):
        weights = [
            torch.randn(columns, width, device="cuda", dtype=torch.bfloat16) / width**0.5
            for _ in range(experts)
        ]
        stacked = torch.stack(weights).transpose(1, 2)
        x = torch.randn(choices, width, device="cuda", dtype=torch.bfloat16)
        even = torch.full((experts,), choices // experts)
        heavy = torch.ones(experts, dtype=torch.int64)
        heavy[0] = choices - experts + 1
        few = torch.zeros(experts, dtype=torch.int64)
        used = few[:: max(2, experts // 4)]
        used.fill_(choices // len(used))
        drawn = torch.randint(experts, (choices,)).bincount(minlength=experts)
        loads = {
            "balanced": (even, 0.9),
            "one heavy": (heavy, 0.75),
            "many empty": (few, None),
            "at random": (drawn, None),
        }
        for load, (sizes, target) in loads.items():
            offsets = sizes.cumsum(0).to(device="cuda", dtype=torch.int32)
            rows = torch.randperm(choices, device="cuda")
            gathered = x[rows]
            kernel = functools.partial(
                triton_grouped_linear, offsets=offsets, weights=weights, biases=[]
            )

            def gathers_first(
                x: Tensor = x,
                rows: Tensor = rows,
                stacked: Tensor = stacked,
                offsets: Any = offsets,
            ) -> Tensor:
                return F.grouped_mm(x.index_select(0, rows), stacked, offs=offsets)

            subjects: dict[str, Callable[[], Tensor]] = {
                "dense": functools.partial(F.linear, gathered, weights[0]),
                "grouped_mm": functools.partial(F.grouped_mm, gathered, stacked, offs=offsets),
                "gathered, grouped_mm": gathers_first,
                "sorted": functools.partial(kernel, gathered, None),
                "kernel": functools.partial(kernel, x, rows),
            }
            others = fitting(x, weights, aligned=True, gathers=True)[1:]
            for tiles in others:
                subjects[_named(tiles)] = functools.partial(kernel, x, rows, tiles=tiles)
            timed = {name: functools.partial(_waited, call) for name, call in subjects.items()}
            what = f"{experts} experts, {width} to {columns}, {load}"
            progress(what)
            exact = subjects["grouped_mm"]()
            error = max(_error(subjects[name](), exact) for name in ("kernel", "sorted"))
            interleave(timed, 1)  # compiles
            seconds = interleave(timed, rounds)
            samples[what] = seconds
            figures += [
                Figure(
                    name=f"{what}: dense / kernel",
                    estimate=ratio(seconds["dense"], seconds["kernel"]),
                    unit="x",
                    at_least=target,
                    note=f"error {error:.0e}",
                ),
                Figure(
                    name=f"{what}: dense / kernel, rows sorted",
                    estimate=ratio(seconds["dense"], seconds["sorted"]),
                    unit="x",
                    at_least=target,
                ),
                Figure(
                    name=f"{what}: gathered, then grouped_mm / kernel",
                    estimate=ratio(seconds["gathered, grouped_mm"], seconds["kernel"]),
                    unit="x",
                    at_least=1.0,
                ),
                Figure(
                    name=f"{what}: grouped_mm / kernel, rows sorted",
                    estimate=ratio(seconds["grouped_mm"], seconds["sorted"]),
                    unit="x",
                    at_least=1.0,
                ),
                *(
                    Figure(
                        name=f"{what}: {_named(tiles)} / as chosen",
                        estimate=ratio(seconds[_named(tiles)], seconds["kernel"]),
                        unit="x",
                    )
                    for tiles in others
                ),
            ]
    device = torch.cuda.get_device_name()
    return Result(figures=figures, details={"device": device, "seconds": samples})


def _named(tiles: Tiles) -> str:
    fetched = "blocks" if tiles.by_tma else "pointers"
    return f"{tiles.columns} columns, {fetched}, {tiles.stages} stages"


def _waited(call: Callable[[], Tensor], times: int = 10) -> None:
    for _ in range(times):
        call()
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument(
        "--only", type=parts_of(TITLES), default=list(TITLES), metavar="A,B", help="parts"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/moe.json"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    parts: dict[str, Callable[[int, Progress], Result]] = {
        "cpu": functools.partial(measure_layers, compiled=False),
        "compiled": functools.partial(measure_layers, compiled=True),
        "nucleus": measure_nucleus,
    }
    if torch.cuda.is_available():
        parts["gpu"] = measure_gpu
    status = StatusLine()
    for part, measure in parts.items():
        if part not in options.only:
            continue
        started = time.perf_counter()
        with torch.no_grad():
            result = measure(options.rounds, status.update)
        status.clear()
        keep(options.out, part, result, time.perf_counter() - started)
        print(table(TITLES[part], result.figures) + "\n", flush=True)
    print(f"medians with 95 % intervals; details in {options.out}")


if __name__ == "__main__":
    main()
