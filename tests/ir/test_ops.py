"""The tensor functions of the vocabulary, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from cachepass.ir import ops
from cachepass.runtime.policy import UNMEASURED, Facts, Measure
from cachepass.runtime.triggers.accumulated import polynomial
from cachepass.runtime.triggers.cheapest import adapt_interval
from cachepass.runtime.triggers.codebook import look_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l1_sums(dtype: torch.dtype) -> None:
    a, b = (torch.randn(3, 4, 5).to(dtype) for _ in range(2))
    sums = ops.l1_sums(a, b)
    assert sums.dtype == torch.float32
    for row in range(3):
        diff = float((a[row].double() - b[row].double()).abs().sum())
        assert sums[row].tolist() == pytest.approx([diff, float(b[row].double().abs().sum())])


def test_sums_of_rows_elsewhere() -> None:
    a, b, c = (torch.randn(3, 8, 5) for _ in range(3))
    x, y, z = (t.transpose(0, 1) for t in (a, b, c))
    assert torch.equal(ops.l1_sums(x, y, 1), ops.l1_sums(a, b))
    assert torch.equal(ops.trend_sums(x, y, z, 1), ops.trend_sums(a, b, c))
    assert torch.equal(ops.motion_sums(x, y, 4, 1), ops.motion_sums(a, b, 4))


def test_motion_sums() -> None:
    frames, tokens = 3, 4
    value, reference = torch.randn(2, frames * tokens, 5), torch.randn(2, frames * tokens, 5)
    sums = ops.motion_sums(value, reference, frames)
    assert torch.equal(sums[:, :2], ops.l1_sums(value, reference))
    for row in range(2):
        change = size = 0.0
        for f in range(frames - 1):
            now = value[row, f * tokens : (f + 1) * tokens].double()
            later = value[row, (f + 1) * tokens : (f + 2) * tokens].double()
            change += float((later - now).abs().sum())
            size += float((later.abs() + now.abs()).sum())
        assert sums[row, 2:].tolist() == pytest.approx([change, size])


def test_a_clone_has_memory_of_its_own() -> None:
    x = torch.randn(3)
    assert ops.clone(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("diff", [math.nan, math.inf])
def test_what_cannot_be_told_is_nan(diff: float) -> None:
    assert math.isnan(Measure(diff, 1.0, 0, 1).rel)
    assert math.isnan(Measure(1.0, 0.0, 0, 1).rel)
    assert math.isnan(UNMEASURED.rel)
    assert Measure(1.0, 4.0, 0, 1).rel == 0.25


def test_the_last_step() -> None:
    def facts(step: int, count: int | None) -> Facts:
        return Facts(step, count, "cond", frozenset(), {})

    assert facts(4, 5).is_last
    assert not facts(3, 5).is_last
    assert not facts(3, None).is_last
    assert math.isnan(facts(0, None).signal("nothing").rel)


def test_pieces_of_rules() -> None:
    assert polynomial((2.0, 3.0, 4.0), 5.0) == 2 * 25 + 3 * 5 + 4
    book = ((0.1, 4), (0.2, 2), (1.0, 1))
    assert [look_up(book, x) for x in (0.05, 0.1, 0.5, 7.0, math.nan)] == [4, 2, 1, 1, 1]
    bounds = {"low": 0.1, "high": 0.2, "bounds": (2, 4)}
    assert [adapt_interval(3, x, **bounds) for x in (0.05, 0.15, 0.3, math.nan)] == [4, 3, 2, 2]  # type: ignore[arg-type]
    assert adapt_interval(4, 0.0, **bounds) == 4  # type: ignore[arg-type]
    assert adapt_interval(2, 9.0, **bounds) == 2  # type: ignore[arg-type]
