"""Routed experts as one operation: equal to the loop over experts, for every load."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachepass.errors import CachePassError
from cachepass.moe import grouped
from cachepass.moe.grouped import MOST_EXPERTS, combine, grouped_linear, kernel_takes, route
from tests.models import distance

EXPERTS, DIM, HIDDEN = 8, 16, 24


def _weights(out: int, into: int) -> list[Tensor]:
    return [nn.Parameter(torch.randn(out, into), requires_grad=False) for _ in range(EXPERTS)]


def _loads(name: str, k: int) -> Tensor:
    """Which experts 40 tokens choose."""
    if name == "balanced":
        return (torch.arange(40 * k) % EXPERTS).view(40, k)
    if name == "one heavy":  # every token takes the same first expert
        rest = 1 + (torch.arange(40 * k).view(40, k) % (EXPERTS - 1))
        rest[:, 0] = 0
        return rest
    if name == "empty":  # the experts from the second half have no rows
        return (torch.arange(40 * k) % (EXPERTS // 2)).view(40, k)
    assert name == "single rows"
    index = torch.zeros(40, k, dtype=torch.int64)
    index[:EXPERTS, 0] = torch.arange(EXPERTS)
    return index


def _loop(x: Tensor, index: Tensor, weight: Tensor, up: list[Tensor], down: list[Tensor]) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(index[token].tolist(), weight[token], strict=True):
            out[token] += share * (F.silu(x[token] @ up[expert].t()) @ down[expert].t())
    return out


def _together(
    x: Tensor, index: Tensor, weight: Tensor, up: list[Tensor], down: list[Tensor]
) -> Tensor:
    rows, offsets, place = route(index, EXPERTS)
    hidden = F.silu(grouped_linear(x, rows, offsets, up, []))
    return combine(grouped_linear(hidden, None, offsets, down, []), place, weight, x)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("load", ["balanced", "one heavy", "empty", "single rows"])
@pytest.mark.parametrize("pack_below", [0, 1000], ids=["in place", "packed"])
def test_equals_the_loop(
    load: str, k: int, pack_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "PACK_BELOW", pack_below)
    x, index, weight = torch.randn(40, DIM), _loads(load, k), torch.rand(40, k)
    up, down = _weights(HIDDEN, DIM), _weights(DIM, HIDDEN)
    wanted = _loop(x, index, weight, up, down)
    assert distance(_together(x, index, weight, up, down), wanted) < 1e-6


@pytest.mark.parametrize("pack_below", [0, 1000], ids=["in place", "packed"])
def test_bfloat16_and_biases(pack_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "PACK_BELOW", pack_below)
    x, index = torch.randn(40, DIM), _loads("one heavy", 2)
    rows, offsets, _ = route(index, EXPERTS)
    weights, biases = _weights(HIDDEN, DIM), [torch.randn(HIDDEN) for _ in range(EXPERTS)]
    exact = grouped_linear(x, rows, offsets, weights, biases)
    experts = index.reshape(-1).sort().values
    for row in range(len(rows)):
        expert = int(experts[row])
        wanted = F.linear(x[rows[row]], weights[expert], biases[expert])
        assert distance(exact[row], wanted) < 1e-6
    half = [[t.bfloat16() for t in given] for given in (weights, biases)]
    rounded = grouped_linear(x.bfloat16(), rows, offsets, *half)
    assert rounded.dtype == torch.bfloat16
    assert distance(rounded, exact) < 2e-2


def test_a_compiler_takes_it_whole() -> None:
    x, index, weight = torch.randn(40, DIM), _loads("empty", 2), torch.rand(40, 2)
    up, down = _weights(HIDDEN, DIM), _weights(DIM, HIDDEN)
    compiled = torch.compile(_together, fullgraph=True, backend="aot_eager")
    wanted = _together(x, index, weight, up, down)
    assert torch.equal(compiled(x, index, weight, up, down), wanted)
    torch.library.opcheck(
        grouped_linear,
        (x, *route(index, EXPERTS)[:2], up, []),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_packed_copy_follows_its_weights() -> None:
    weights = _weights(HIDDEN, DIM)
    first = grouped._packed(weights)
    assert grouped._packed(weights) is first, "taken once"
    assert first.weights.is_contiguous()

    def check() -> None:
        assert torch.equal(grouped._packed(weights).right[3], weights[3].t())

    weights[3].mul_(2)
    check()
    weights[3].data += 1  # counts no version
    check()
    weights[3].data = torch.randn(HIDDEN, DIM)
    check()
    weights[3] = nn.Parameter(torch.randn(HIDDEN, DIM), requires_grad=False)
    check()
    gone = weakref.ref(grouped._PACKS[weights[0]])
    weights.clear()
    gc.collect()
    assert gone() is None, "the copy goes with the model"


def test_what_cannot_be_packed_is_read_in_place() -> None:
    with torch.inference_mode():
        weights = _weights(HIDDEN, DIM)
        assert not grouped._packable(torch.randn(1, DIM), weights[0]), "no version is counted"
    x, index = torch.randn(40, DIM), _loads("balanced", 2)
    rows, offsets, _ = route(index, EXPERTS)
    with torch.inference_mode():
        assert grouped_linear(x, rows, offsets, weights, []).shape == (80, HIDDEN)


def test_more_experts_than_the_map_holds() -> None:
    x, weight = torch.randn(2, DIM), torch.randn(3, DIM)
    ends = torch.full((MOST_EXPERTS,), 2, dtype=torch.int32)
    assert kernel_takes(x, None, ends, [weight] * MOST_EXPERTS, [])
    with pytest.raises(
        CachePassError,
        match=r"has 1025 routed experts: the task map of the kernel holds at most 1024\. Split",
    ):
        kernel_takes(x, None, ends, [weight] * (MOST_EXPERTS + 1), [])


def test_what_the_kernel_would_misread() -> None:
    x, weights = torch.randn(2, DIM), [torch.randn(3, DIM) for _ in range(2)]
    ends, rows = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 0])
    biases = [torch.randn(3) for _ in range(2)]
    assert kernel_takes(x, rows, ends, weights, biases)
    assert not kernel_takes(x, torch.tensor([1, 9, 0, 9])[::2], ends, weights, biases)
    assert not kernel_takes(x, rows, ends.long(), weights, biases)
    assert not kernel_takes(x.double(), rows, ends, weights, biases)
    assert not kernel_takes(x, rows, ends, [weights[0], torch.randn(DIM, 3).t()], biases)
    assert not kernel_takes(x, rows, ends, [weights[0], torch.randn(4, DIM)], [])
    assert not kernel_takes(
        x[:, :1].expand(2, DIM).as_strided((2, 1), (1, 2**31)),
        rows,
        ends,
        [w[:, :1] for w in weights],
        [],
    )
    assert not kernel_takes(x, rows, ends, weights, [biases[0], torch.randn(6)[::2]])
