"""Everything compiles at the first generation, in one graph, and never again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import compilation_time_metrics, counters

import cachepass
from tests.models import TINY, TOY, WAN, as_tensor, distance
from tests.reference import Reference, Rule
from tests.requests import assert_follows, decisions, run
from tests.rules import (
    MIXCACHE,
    DiCacheRule,
    EasyCacheRule,
    FasterCacheRule,
    FirstBlockRule,
    MixCacheRule,
    TaylorSeerRule,
)

STEPS = 12
POLICIES: dict[str, cachepass.NamedPolicy] = {
    "firstblock": cachepass.FirstBlock(threshold=0.1, warmup_steps=0),
    "teacache": cachepass.TeaCache(threshold=0.3, warmup_steps=1),
    "adacache": cachepass.AdaCache(codebook=((9.0, 3), (99.0, 1)), motion=False),
    "mixcache": cachepass.MixCache(**MIXCACHE),
    "mixcache, taylor": cachepass.MixCache(**MIXCACHE | {"predictor": "taylor"}),
    "dbcache": cachepass.DBCache(front=1, back=1, threshold=0.3, warmup_steps=1),
    "taylorseer": cachepass.TaylorSeer(interval=3, order=2, warmup_steps=2),
    "magcache": cachepass.MagCache(ratios=(1.0,) * STEPS),
    "easycache": cachepass.EasyCache(threshold=0.3, warmup_steps=3),
    "dicache": cachepass.DiCache(threshold=0.3, warmup_steps=3),
    "pab": cachepass.PAB(self_attention=2, cross=3, timesteps=(100, 850)),
    "fastercache": cachepass.FasterCache(start=4, cfg_period=3),
    **{
        f"schedule-{kind}": cachepass.Schedule(reuse={2: kind, 3: kind, 7: kind})
        for kind in ("step", "cfg", "stack", "block", "attention", "mlp")
    },
}


def _compiled() -> int:
    return sum(len(times) for times in compilation_time_metrics.values())


def _compiles(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = cachepass.report(model).to_dict()["compiles"]
    return found


def _steps(
    model: Any, inputs: Sequence[dict[str, Any]]
) -> tuple[list[torch.Tensor], cachepass.Session]:
    """One call in each step of a session."""
    session = cachepass.session(model, num_inference_steps=len(inputs) + 1)
    outputs = []
    for step, given in enumerate(inputs):
        with session.at(step=step):
            outputs.append(as_tensor(model(**given)))
    return outputs, session


def _check(policy: cachepass.NamedPolicy) -> None:
    counters.clear()
    cached = cachepass.compile(WAN.model(), policy=policy)
    _, session = run(cached, steps=STEPS, seed=3)
    (request,) = cachepass.report(session).to_dict()["requests"]
    assert request["blocks_skipped"] > 0 or any(any(c["reused"]) for c in request["steps"])
    before, compiled = _compiles(cached), _compiled()
    assert before["graphs"] == 1
    assert before["regions"] > 0
    run(cached, steps=STEPS, seed=4)
    if any(not isinstance(site, cachepass.Cfg) for site in policy.combine().sites):
        run(cached, steps=STEPS - 2, seed=5, branches=("cond",))
    assert _compiles(cached) == before
    assert _compiled() == compiled
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]


def test_two_generations_compile_once() -> None:
    _check(POLICIES["firstblock"])


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in POLICIES if n != "firstblock"])
def test_two_generations_compile_once_under(name: str) -> None:
    _check(POLICIES[name])


def _follow(policy: cachepass.NamedPolicy, rule: Rule) -> None:
    model = WAN.model()
    reference = Reference(model, rule, STEPS)
    assert_follows(cachepass.compile(model, policy=policy), reference, eager=False)
    assert any(reused for _, _, reused in reference.decisions)


def test_inductor_follows_the_reference() -> None:
    _follow(cachepass.MixCache(**MIXCACHE), MixCacheRule(**MIXCACHE))


TAIL = cachepass.Blocks(name="tail", start=1)
RULES: dict[str, tuple[cachepass.NamedPolicy, Rule]] = {
    "firstblock": (
        cachepass.FirstBlock(threshold=0.1, warmup_steps=0, site=TAIL, predictor=None),
        FirstBlockRule(0.1),
    ),
    "dicache": (
        cachepass.DiCache(threshold=0.3, warmup_steps=3),
        DiCacheRule(0.3, 3, (1.0, 2.0)),
    ),
    "taylorseer": (
        cachepass.TaylorSeer(interval=3, order=2, warmup_steps=3),
        TaylorSeerRule(3, 2, 3),
    ),
    "easycache": (cachepass.EasyCache(threshold=0.3, warmup_steps=3), EasyCacheRule(0.3, 3)),
    "fastercache": (cachepass.FasterCache(start=4, cfg_period=3), FasterCacheRule(4, 3, 1.1)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", RULES)
def test_inductor_follows_the_reference_of(name: str) -> None:
    _follow(*RULES[name])


JOINT = ("cogvideox", "flux", "hunyuan", "mochi")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("policy", ["firstblock", "schedule-stack", "schedule-attention"])
def test_compiled_reuse_is_eager_reuse(name: str, policy: str) -> None:
    """Two calls, the second reused, on every model: Inductor against eager."""
    if policy == "schedule-attention" and name in JOINT:
        pytest.skip("attention that two streams share cannot be skipped alone")
    tiny = TINY[name]
    outputs = []
    for inner in ("eager", "inductor"):
        cached = cachepass.compile(
            tiny.model(),
            policy=cachepass.FirstBlock(threshold=1e9, warmup_steps=0)
            if policy == "firstblock"
            else cachepass.Schedule(reuse={1: policy.removeprefix("schedule-")}),
            inner=inner,
        )
        found, session = _steps(cached, [tiny.example(1), tiny.example(2)])
        assert [bool(names) for _, _, names in decisions(session)] == [False, True]
        outputs.append(found)
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "policy",
    [
        cachepass.Schedule(reuse={1: "stack", 3: "stack"}),
        cachepass.AdaCache(codebook=((9.0, 2),), motion=False),
    ],
)
def test_layouts_of_slots_and_arms(policy: cachepass.NamedPolicy) -> None:
    """A stream that is transposed in memory, and residuals that are not, over several steps."""
    cached, eager = (
        cachepass.compile(TOY.model(), policy=policy, inner=inner)
        for inner in ("inductor", "eager")
    )
    found = []
    for model in (cached, eager):
        outputs, session = _steps(model, [TOY.example(step) for step in range(6)])
        assert any(names for _, _, names in decisions(session))
        found.append(outputs)
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.full
def test_flux_with_two_rows() -> None:
    """Its single blocks return slices, which with several rows are not dense."""
    tiny = TINY["flux"]
    cached = cachepass.compile(tiny.model(), policy=cachepass.Schedule(reuse={1: "stack"}))
    inputs = tiny.example()
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        inputs[name] = torch.cat([inputs[name], inputs[name] + 0.1])
    inputs["timestep"] = inputs["timestep"].repeat(2)
    outputs, session = _steps(cached, [inputs] * 3)
    assert [bool(names) for _, _, names in decisions(session)] == [False, True, False]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_a_new_resolution_compiles_and_is_right() -> None:
    model = TOY.model()
    cached = cachepass.compile(model, policy="compute")
    for size in (8, 6):
        x, t, y = torch.randn(1, 3, size, size), torch.tensor([0.5]), torch.tensor([1])
        with torch.no_grad():
            assert distance(cached(x, t, y), model(x, t, y)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_resolutions_of_wan(dynamic: bool | None) -> None:
    model = WAN.model()
    cached = cachepass.compile(model, policy=POLICIES["firstblock"], dynamic=dynamic)
    inputs = WAN.example()
    session = cachepass.session(cached, num_inference_steps=9)
    for step, size in enumerate((8, 12, 16, 8)):
        inputs["hidden_states"] = torch.randn(1, 4, 2, size, size)
        with session.at(step=step), torch.no_grad():
            assert distance(as_tensor(cached(**inputs)), as_tensor(model(**inputs))) < 1e-5
    if dynamic:
        assert len(cached.denoiser.programs) == 1, "one graph for all sizes"


@pytest.mark.parametrize("kind", ["attention", pytest.param("mlp", marks=pytest.mark.full)])
def test_sublayers_compile(kind: str) -> None:
    """Modulation comes in a tuple that several sublayers take items of."""
    cached = cachepass.compile(WAN.model(), policy=cachepass.Schedule(reuse={1: kind}))
    eager = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: kind}), inner="eager"
    )
    for a, b in zip(run(cached, steps=3)[0], run(eager, steps=3)[0], strict=True):
        assert distance(a, b) < 1e-5
