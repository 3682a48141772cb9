"""What a device could change. The same tests run on a CPU, so that they are known to hold there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import cachepass
from cachepass.moe.grouped import grouped_linear, route
from cachepass.moe.tiles import fitting
from tests.models import WAN, as_tensor, distance
from tests.requests import BOTH, decisions
from tests.zoo import ZOO

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
STEPS = 6
MIXED = cachepass.Schedule(reuse={1: "step", 2: "cfg", 3: "stack", 4: "attention"})
POLICIES: list[cachepass.NamedPolicy] = [
    MIXED,
    cachepass.AdaCache(codebook=((0.1, 4), (0.13, 3), (0.16, 2), (1.0, 1)), motion=False),
    cachepass.TaylorSeer(interval=2, warmup_steps=1),
]


@pytest.fixture(autouse=True)
def every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of cuDNN round their factors otherwise: 2e-4 apart from a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Requests:
    """Two videos of the tiny Wan: the second starts a step later, and both share calls."""

    def __init__(self, device: str, policy: cachepass.NamedPolicy | str, **options: Any) -> None:
        self.device = device
        options = {"inner": "eager", **options}
        self.model: Any = cachepass.compile(WAN.model().to(device), policy=policy, **options)
        generator = torch.Generator().manual_seed(3)
        self.noise = torch.randn(2, 4, 2, 8, 8, generator=generator).to(device)
        self.texts = {b: torch.randn(2, 5, 16, generator=generator).to(device) for b in BOTH}
        self.sessions = [cachepass.session(self.model, num_inference_steps=STEPS) for _ in range(2)]

    def inputs(self, row: int, step: int, branch: str) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.noise[row : row + 1] * (1 + 0.05 * step * (row + 1))
        time = torch.tensor([1000.0 * (1 - step / STEPS)], device=self.device)
        return latent, time, self.texts[branch][row : row + 1]

    def run(self) -> list[Tensor]:
        """The outputs of all calls, row by row, on the CPU."""
        found = []
        for moment in range(STEPS + 1):
            running = [(row, moment - row) for row in range(2) if 0 <= moment - row < STEPS]
            for branch in BOTH:
                given = [self.inputs(row, step, branch) for row, step in running]
                listed = [self.sessions[r].row(branch=branch, step=step) for r, step in running]
                with cachepass.rows(self.model, listed):
                    joined = [torch.cat(parts) for parts in zip(*given, strict=True)]
                    found += as_tensor(self.model(*joined, return_dict=False)).cpu().split(1)
        return found


def _alike(some: Requests, others: Requests, limit: float) -> None:
    for got, want in zip(some.run(), others.run(), strict=True):
        assert distance(got, want) <= limit
    for mine, theirs in zip(some.sessions, others.sessions, strict=True):
        assert decisions(mine) == decisions(theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_compute_is_the_model_itself(device: str) -> None:
    requests = Requests(device, "compute")
    given = requests.inputs(0, 0, "cond")
    with torch.no_grad():
        want = as_tensor(requests.model._orig_mod(*given, return_dict=False))
    assert torch.equal(as_tensor(requests.model(*given, return_dict=False)), want)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_rows_that_differ(device: str, policy: cachepass.NamedPolicy) -> None:
    """Decisions and numbers are those of the CPU."""
    _alike(Requests(device, policy), Requests("cpu", policy), 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_slots_on_the_host_hold_the_same(device: str, policy: cachepass.NamedPolicy) -> None:
    """Pinned, sent for ahead and waited for, where there is a GPU: not a bit is another."""
    _alike(Requests(device, policy, cache_on_host=True), Requests(device, policy), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_sent_for_leaves_no_memory_behind() -> None:
    """Copies are made on one stream, whose memory is used again."""
    requests = Requests("cuda", MIXED, cache_on_host=True)
    reserved = []
    for _ in range(6):
        requests.sessions = [cachepass.session(requests.model) for _ in range(2)]
        requests.run()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[2]


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
def test_slots_of_eight_bits_on_the_host(device: str) -> None:
    dtype = torch.float8_e4m3fn
    there = Requests(device, MIXED, cache_on_host=True, cache_dtype=dtype)
    _alike(there, Requests(device, MIXED, cache_dtype=dtype), 0.0)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_compiled(device: str, policy: cachepass.NamedPolicy) -> None:
    _alike(Requests(device, policy, inner="inductor"), Requests("cpu", policy), 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_graph(device: str) -> None:
    policy = cachepass.FirstBlock(threshold=0.105, warmup_steps=0)
    model: Any = cachepass.compile(WAN.model().to(device), policy=policy, lowering="graph")
    plain: Any = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    requests = Requests(device, "compute")
    for step in range(STEPS):
        given = requests.inputs(0, step, "cond")
        got = as_tensor(model(*given, return_dict=False)).cpu()
        want = as_tensor(plain(*(value.cpu() for value in given), return_dict=False))
        assert distance(got, want) < 1e-4


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Rows of each expert, and what its weights are."""

    sizes: Sequence[int]
    columns: int
    inner: int


LAYERS = {
    "balanced": Layer(sizes=[40] * 5, columns=48, inner=64),
    # More tiles than a GPU has multiprocessors, and more steps than its pipeline has stages.
    "many tiles": Layer(sizes=[4000, 100, 0, 1, 900], columns=2080, inner=1000),
    "one heavy": Layer(sizes=[190, 1, 1, 0, 8], columns=48, inner=64),
    "rests": Layer(sizes=[144, 160, 192, 256, 300], columns=272, inner=264),
    "narrow": Layer(sizes=[3, 1, 0, 20, 70], columns=8, inner=8),
    "nothing": Layer(sizes=[0] * 5, columns=48, inner=64),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by rows": lambda weight: weight,
    "by columns": lambda weight: weight.t().contiguous().t(),
    # Not at a multiple of 16 bytes.
    "one on": lambda weight: torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full) if n == "many tiles" else n for n in LAYERS],
)
def test_routed_experts(device: str, dtype: torch.dtype, name: str) -> None:
    """Against one product after another; on CUDA by the Triton kernel, in each way it has."""
    torch.manual_seed(0)
    layer = LAYERS[name]
    chosen = torch.repeat_interleave(torch.arange(5), torch.tensor(layer.sizes))
    chosen = chosen[torch.randperm(len(chosen))].to(device)
    x = torch.randn(len(chosen), layer.inner, dtype=dtype).to(device)
    shape = (layer.columns, layer.inner)
    drawn = [torch.randn(shape, dtype=dtype).to(device) / layer.inner**0.5 for _ in layer.sizes]
    biases = [torch.randn(layer.columns, dtype=dtype).to(device) for _ in layer.sizes]
    rows, offsets, _ = route(chosen[:, None], 5)
    strided = x.new_empty(len(x), 2 * layer.inner + 1)[:, : layer.inner].copy_(x)
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for added in ([], biases):
        ends = offsets.tolist()
        wanted = torch.cat(
            [
                F.linear(x[rows[start:end]], drawn[i], added[i] if added else None)
                for i, (start, end) in enumerate(itertools.pairwise([0, *ends]))
            ]
        )
        for given, index in ((x, rows), (strided, rows), (x[rows], None)):
            for lay in LAYOUTS.values() if device == "cuda" else [LAYOUTS["by rows"]]:
                weights = [lay(weight) for weight in drawn]
                ways = [grouped_linear(given, index, offsets, weights, added)]
                if device == "cuda":
                    ways += _by_each_tile(given, index, offsets, weights, added)
                assert all(_distance(got, wanted) < limit for got in ways)


def _by_each_tile(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    from cachepass.moe.triton_kernel import triton_grouped_linear

    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
    found = fitting(x, weights, aligned=aligned, gathers=rows is not None)
    return [triton_grouped_linear(x, rows, offsets, weights, biases, tiles) for tiles in found]


def _distance(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return distance(got, wanted) if len(wanted) else 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_routed_experts(device: str) -> None:
    entry = ZOO["HiDreamImageTransformer2DModel"]
    model = entry.model().to(device)
    given = pytree.tree_map_only(Tensor, lambda value: value.to(device), entry.call())
    with torch.no_grad():
        want = as_tensor(model(**given))
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    assert distance(as_tensor(cached(**given)), want) < 1e-5
