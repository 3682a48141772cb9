"""Models written without a thought of cachepass: found, captured, cached as decided."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import cachepass
from cachepass import Blocks, Reuse
from tests.models import as_tensor
from tests.replay import Replay, record
from tests.toys.cases import STEPS, TOYS, Toy

POLICIES: dict[str, cachepass.NamedPolicy] = {
    "firstblock": cachepass.FirstBlock(threshold=1e9, warmup_steps=0, predictor=Reuse()),
    "firstblock, tail": cachepass.FirstBlock(
        threshold=1e9, warmup_steps=0, site=Blocks(name="tail", start=1), predictor=None
    ),
    "mixcache": cachepass.MixCache(predictor=Reuse(), influence=(1.0, 1.0, 0.0)),
    "adacache": cachepass.AdaCache(codebook=((10.0, 3), (1e9, 1)), predictor=Reuse()),
    "dbcache": cachepass.DBCache(front=1, back=1, threshold=1e9, warmup_steps=0),
    "schedule": cachepass.Schedule(reuse={2: "stack", 3: "block", 4: "step", 6: "cfg"}),
}
REUSED: dict[str, set[tuple[int, str, str]]] = {
    "firstblock": {(s, b, "step") for s in range(1, STEPS) for b in ("cond", "uncond")},
    "firstblock, tail": {(s, b, "tail") for s in range(1, STEPS) for b in ("cond", "uncond")},
    # Two full steps, then two reused ones as often as the first and the last two allow.
    "adacache": {(s, b, "step") for s in (2, 3, 5) for b in ("cond", "uncond")},
    "dbcache": {(s, b, "middle") for s in range(1, STEPS) for b in ("cond", "uncond")},
    "schedule": {
        *(
            (s, b, n)
            for s, n in ((2, "stack"), (3, "block"), (4, "step"))
            for b in ("cond", "uncond")
        ),
        (6, "uncond", "cfg"),
    },
}


def _cached(toy: Toy, policy: Any) -> tuple[Any, Any]:
    model = toy.model()
    return model, cachepass.compile(model, policy=policy, inner="eager")


@functools.cache
def _computed(name: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """Some calls that were computed, each as the compiled and as the plain model has it."""
    toy = TOYS[name]
    model, cached = _cached(toy, "compute")
    with torch.no_grad():
        pairs = [(cached(**given), model(**given)) for _, _, given in toy.request()[:4]]
    return pairs, cachepass.report(cached).to_dict()


@pytest.mark.parametrize("name", TOYS)
def test_compute_is_bitwise_equal(name: str) -> None:
    pairs, report = _computed(name)
    for got, want in pairs:
        assert want.abs().sum() > 0
        assert torch.equal(got, want)
    assert report["stacks"] == TOYS[name].stacks
    assert report["compiles"]["graphs"] == 1


@pytest.mark.parametrize("name", TOYS)
def test_sublayers(name: str) -> None:
    _, report = _computed(name)
    assert report["sublayers"] == TOYS[name].sublayers


ALIKE = ("mmdit, as much text as image", "steered by itself")
"""Toys with streams of one shape."""

# What is drawn from the toys left out here is that of another one.
LESS = [toy for toy in TOYS if toy not in (ALIKE[0], "checkpointed")]

CASES = [
    *((toy, policy) for toy in TOYS if toy != "checkpointed" for policy in ("schedule", "dbcache")),
    *((toy, "firstblock, tail") for toy in ALIKE),
    *((t, p) for t in LESS for p in ("firstblock", "mixcache")),
]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_reuse_is_what_a_replay_gives(name: str, policy: str) -> None:
    check(name, policy)


@pytest.mark.parametrize("name", LESS)
def test_adacache_is_what_a_replay_gives(name: str) -> None:
    check(name, "adacache")


def check(name: str, policy: str) -> None:
    toy = TOYS[name]
    model, cached = _cached(toy, POLICIES[policy])
    outputs, calls = record(cached, toy.request(), steps=STEPS)
    reused = {(call.step, call.branch, site) for call in calls for site in call.reused}
    assert reused == REUSED.get(policy, reused)
    assert reused
    replay = Replay(model, toy.stacks, cached.denoiser.policy.sites)
    for call, got, want in zip(calls, outputs, replay.run(calls), strict=True):
        torch.testing.assert_close(as_tensor(got), as_tensor(want), rtol=1e-6, atol=1e-6)
        if call.reused:  # and the case can tell: what is reused is not what would be computed
            with torch.no_grad():
                assert not torch.allclose(as_tensor(got), as_tensor(model(**call.inputs)))


def test_branches_of_training_are_left_out() -> None:
    toy = TOYS["checkpointed"]
    model, cached = _cached(toy, "compute")
    model.gradient_checkpointing = True
    inputs = toy.request()[0][2]
    with torch.no_grad():
        assert torch.equal(cached(**inputs), model(**inputs))
    assert cachepass.report(cached).to_dict()["stacks"] == toy.stacks
