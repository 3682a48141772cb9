"""Every policy against a transcription of its rule on the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cachepass
from tests.models import WAN
from tests.reference import Reference, Rule
from tests.requests import BOTH, assert_follows, caller, decisions, denoise, plain
from tests.rules import (
    MIXCACHE,
    AdaCacheRule,
    DBCacheRule,
    DiCacheRule,
    EasyCacheRule,
    FasterCacheRule,
    FirstBlockRule,
    MagCacheRule,
    MixCacheRule,
    PABRule,
    ScheduleRule,
    TaylorSeerRule,
    TeaCacheRule,
)

STEPS = 12
TAIL = cachepass.Blocks(name="tail", start=1)


class Never(Rule):
    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        return set()


def check(policy: cachepass.NamedPolicy, rule: Rule, **options: Any) -> Reference:
    model = WAN.model()
    cached = cachepass.compile(model, policy=policy, inner="eager")
    reference = Reference(model, rule, STEPS)
    assert_follows(cached, reference, **options)
    reused = {bool(names) for _, _, names in reference.decisions}
    assert reused == {False, True}, "the case decides nothing: choose other numbers"
    return reference


def test_the_reference_is_the_model() -> None:
    model = WAN.model()
    ours = denoise(Reference(model, Never(), STEPS).call, steps=3)
    for got, want in zip(ours, denoise(plain(model), steps=3), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["step", "cfg", "stack", "block", "attention", "mlp"])
def test_schedule(kind: str) -> None:
    table = {2: kind, 3: kind, 6: kind, 9: kind}
    rule = ScheduleRule(dict.fromkeys(table, (kind,)), middle=(1, 3))
    reference = check(cachepass.Schedule(reuse=table), rule)
    cached = [(s, b) for s, b, names in reference.decisions if names == [kind]]
    branches = ("uncond",) if kind == "cfg" else BOTH
    assert cached == [(step, branch) for step in table for branch in branches]


@pytest.mark.parametrize("branches", [BOTH, ("cond",)])
def test_firstblock(branches: tuple[str, ...]) -> None:
    policy = cachepass.FirstBlock(threshold=0.1, warmup_steps=2, site=TAIL, predictor=None)
    check(policy, FirstBlockRule(0.1, 2), branches=branches)


def test_half_precision() -> None:
    """Computed calls are the model's, bit by bit; outputs and slots have its dtype."""
    model = WAN.model().bfloat16()
    policy = cachepass.FirstBlock(threshold=0.1, warmup_steps=2)
    cached: Any = cachepass.compile(model, policy=policy, inner="eager")
    session = cachepass.session(cached, num_inference_steps=STEPS)
    ours, theirs = caller(cached, session), plain(model)

    def call(step: int, branch: str, *tensors: torch.Tensor) -> torch.Tensor:
        out = ours(step, branch, *tensors)
        assert out.dtype == torch.bfloat16
        if not decisions(session)[-1][2]:
            assert torch.equal(out, theirs(step, branch, *tensors))
        return out

    denoise(call, steps=STEPS, dtype=torch.bfloat16)
    assert {bool(names) for _, _, names in decisions(session)} == {False, True}
    assert {kept.value.dtype for kept in session.slots.values()} == {torch.bfloat16}


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.5, 0.3, 0.001)])
def test_teacache(coefficients: tuple[float, ...]) -> None:
    policy = cachepass.TeaCache(
        threshold=0.3, coefficients=coefficients, warmup_steps=2, site="stack", predictor=None
    )
    check(policy, TeaCacheRule(0.3, coefficients, 2))


BOOK = ((0.05, 4), (0.1, 3), (0.2, 2), (1.0, 1))


@pytest.mark.parametrize("branches", [BOTH, ("cond",)])
def test_adacache_without_motion(branches: tuple[str, ...]) -> None:
    check(
        cachepass.AdaCache(codebook=BOOK, motion=False, site="stack", predictor=None),
        AdaCacheRule(BOOK, motion=False),
        branches=branches,
    )


@pytest.mark.parametrize("scale", [0.385, 0.7])
def test_adacache_with_motion(scale: float) -> None:
    options: dict[str, Any] = {"motion_scale": scale, "motion_power": 2.0, "motion_gradient": 1.5}
    check(
        cachepass.AdaCache(
            codebook=BOOK, motion_window=(0.1, 0.9), site="stack", predictor=None, **options
        ),
        AdaCacheRule(BOOK, motion=True, scale=scale, power=2.0, gradient=1.5, window=(0.1, 0.9)),
    )


MIXES: list[dict[str, Any]] = [
    {},
    {"repeat_penalty": 1.0, "trigger": 1.0},
    {"interval": (2, 3), "start_interval": 2, "shorten": 0.02, "lengthen": 0.01},
    {"influence": (3.0, 1.0, 0.5), "latest_start": 0.5, "interval": (2, 6)},
    {"shorten": 9.0, "lengthen": 8.0, "trigger": 1.0},
]


@pytest.mark.parametrize("options", MIXES)
def test_mixcache(options: dict[str, Any]) -> None:
    chosen = MIXCACHE | options
    reference = check(cachepass.MixCache(**chosen), MixCacheRule(**chosen))
    kinds = {name for _, _, names in reference.decisions for name in names}
    assert len(kinds) == (1 if options.get("repeat_penalty") == 1.0 else 2)


@pytest.mark.parametrize("options", MIXES[:2])
def test_mixcache_without_guidance(options: dict[str, Any]) -> None:
    chosen = MIXCACHE | options
    reference = check(cachepass.MixCache(**chosen), MixCacheRule(**chosen), branches=("cond",))
    assert not any("cfg" in names for _, _, names in reference.decisions)


def test_dbcache() -> None:
    policy = cachepass.DBCache(
        front=2, back=1, threshold=0.15, warmup_steps=2, max_in_a_row=2, max_in_all=5
    )
    check(policy, DBCacheRule(0.15, 2, 2, 5))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer(order: int) -> None:
    policy = cachepass.TaylorSeer(interval=3, order=order, warmup_steps=3)
    check(policy, TaylorSeerRule(3, order, 3))


@pytest.mark.parametrize("apart", [False, True])
def test_magcache(apart: bool) -> None:
    cond = [1 + 0.05 * (-1) ** i * (i % 4) for i in range(STEPS)]
    uncond = [1 - 0.02 * (i % 5) for i in range(STEPS)] if apart else cond
    policy = cachepass.MagCache(
        ratios=tuple(cond),
        uncond_ratios=tuple(uncond) if apart else (),
        threshold=0.2,
        max_in_a_row=2,
        site="stack",
    )
    check(policy, MagCacheRule({"cond": cond, "uncond": uncond}, 0.2, 2, 0.2))


@pytest.mark.parametrize("branches", [BOTH, ("cond",)])
def test_easycache(branches: tuple[str, ...]) -> None:
    policy = cachepass.EasyCache(threshold=0.3, warmup_steps=3)
    check(policy, EasyCacheRule(0.3, 3), branches=branches)


def test_dicache() -> None:
    policy = cachepass.DiCache(threshold=0.3, warmup_steps=3)
    check(policy, DiCacheRule(0.3, 3, (1.0, 2.0)))


def test_pab() -> None:
    policy = cachepass.PAB(self_attention=2, cross=3, timesteps=(100, 850))
    check(policy, PABRule({"self": 2, "cross": 3}, (100, 850)))


def test_fastercache() -> None:
    policy = cachepass.FasterCache(start=4, cfg_period=3)
    check(policy, FasterCacheRule(4, 3, 1.1))
