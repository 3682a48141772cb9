"""Predictors as numbers: weights of kept values against the formulas they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import cachepass
from cachepass.ir.predictors import Moment, low_band, weighted_sum

STEPS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def _moment(kept: list[int], elapsed: int) -> Moment:
    return Moment(step=kept[0] + elapsed, kept=tuple(kept), timesteps={}, ratios={})


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(gaps=STEPS, elapsed=st.integers(1, 4), order=st.integers(1, 3), seed=st.integers(0, 99))
def test_taylor_is_the_recurrence_of_differences(
    gaps: list[int], elapsed: int, order: int, seed: int
) -> None:
    values = torch.randn(len(gaps), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = [sum(gaps[:i]) for i in range(len(gaps))]
    old: list[float] = []
    for i, value in enumerate(values):  # as TaylorSeer's code keeps them, computed step by step
        new = [value]
        for k in range(min(order, len(old))):
            new.append((new[k] - old[k]) / (steps[i] - steps[i - 1]))
        old = new
    expected = math.fsum(d * elapsed**k / math.factorial(k) for k, d in enumerate(old))
    kept = steps[::-1][: order + 1]
    weights = cachepass.Taylor(order=order).weights(_moment(kept, elapsed))
    assert weights is not None
    assert len(weights) == order + 1
    pairs = zip(weights, values[::-1], strict=False)
    assert math.isclose(math.fsum(w * v for w, v in pairs), expected, rel_tol=1e-6, abs_tol=1e-6)


def test_damping_takes_differences_off() -> None:
    moment = _moment([6, 4], 2)
    assert cachepass.Taylor(damping=0.0).weights(moment) == (1.0, 0.0)
    assert cachepass.Taylor(damping=0.5).weights(moment) == (1.5, -0.5)
    assert cachepass.Taylor().weights(moment) == (2.0, -1.0)


def test_fewer_values_than_the_history() -> None:
    moment = _moment([3], 2)
    assert cachepass.Taylor(order=2).weights(moment) == (1.0, 0.0, 0.0)
    assert cachepass.Extrapolate(weight=0.5).weights(moment) == (1.0, 0.0)
    assert cachepass.TwoAnchor().weights(moment) == (1.0, 0.0)


@pytest.mark.parametrize(("trend", "gamma"), [(0.2, 1.0), (1.25, 1.25), (7.0, 2.0)])
def test_two_anchors(trend: float, gamma: float) -> None:
    moment = Moment(step=9, kept=(7, 5), timesteps={}, ratios={"trend": trend})
    assert cachepass.TwoAnchor().weights(moment) == (gamma, 1 - gamma)


def test_bands_add_up() -> None:
    value = torch.randn(2, 3, 5, 16, 12)
    low, high = cachepass.FrequencySplit().split(value)
    torch.testing.assert_close(low + high, value)
    torch.testing.assert_close(low_band(low), low, rtol=1e-4, atol=1e-5)
    flat = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(low_band(flat), flat)


def test_weights_per_row_also_where_frames_are_folded_into_rows() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    base = torch.randn(4, 3)
    weights = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    got = weighted_sum(weights, (a, b), base)
    torch.testing.assert_close(got[:2], base[:2] + a[:2])
    torch.testing.assert_close(got[2:], base[2:] + 0.5 * a[2:] + 2 * b[2:])
    assert weighted_sum(weights, (a.bfloat16(), b.bfloat16()), None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cachepass.Taylor(order=4), r"Taylor\(`order`=4\): must be 0, 1, 2 or 3"),
        (lambda: cachepass.Taylor(damping=2.0), r"Taylor\(`damping`=2.0\): must be from 0 to 1"),
        (lambda: cachepass.Reuse(keep="both"), r"Reuse\(`keep`='both'\): must be 'output', 'resi"),  # type: ignore[arg-type]
    ],
)
def test_bad_fields(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(cachepass.PolicyError, match=message):
        make()
