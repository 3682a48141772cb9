"""What a device could change. The same tests run on a CPU, so that they are known to hold there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import cachepass
from cachepass.moe.grouped import grouped_linear, route
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [48, 272])
@pytest.mark.parametrize(
    "sizes",
    [[40] * 5, [790, 1, 1, 0, 8], [144, 160, 192, 256, 300]],
    ids=["balanced", "one heavy", "rests"],
)
def test_routed_experts(device: str, dtype: torch.dtype, columns: int, sizes: list[int]) -> None:
    """Against one product after another; on CUDA by the Triton kernel."""
    torch.manual_seed(0)
    chosen = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    chosen = chosen[torch.randperm(len(chosen))].to(device)
    x = torch.randn(len(chosen), 64, dtype=dtype).to(device)
    weights = [torch.randn(columns, 64, dtype=dtype).to(device) / 8 for _ in sizes]
    biases = [torch.randn(columns, dtype=dtype).to(device) for _ in sizes]
    rows, offsets, _ = route(chosen[:, None], len(sizes))
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for added in ([], biases):
        ends = offsets.tolist()
        wanted = torch.cat(
            [
                F.linear(x[rows[start:end]], weights[i], added[i] if added else None)
                for i, (start, end) in enumerate(itertools.pairwise([0, *ends]))
            ]
        )
        assert distance(grouped_linear(x, rows, offsets, weights, added), wanted) < limit
        assert distance(grouped_linear(x[rows], None, offsets, weights, added), wanted) < limit


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_routed_experts(device: str) -> None:
    entry = ZOO["HiDreamImageTransformer2DModel"]
    model = entry.model().to(device)
    given = pytree.tree_map_only(Tensor, lambda value: value.to(device), entry.call())
    with torch.no_grad():
        want = as_tensor(model(**given))
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    assert distance(as_tensor(cached(**given)), want) < 1e-5
