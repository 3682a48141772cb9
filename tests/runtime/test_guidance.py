"""Guidance in all its forms: two calls in either order, one batch of both, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from tests.models import TINY, WAN, as_tensor
from tests.requests import BOTH, decisions, notes
from tests.toys.dit import ToyDiT

STEPS = 10
CFG: dict[int, str] = {3: "cfg", 4: "cfg", 7: "cfg"}
BACKWARDS = tuple(reversed(BOTH))


def _compile(policy: cachepass.NamedPolicy | None = None, **options: Any) -> Any:
    chosen = policy or cachepass.Schedule(reuse=CFG)
    return cachepass.compile(WAN.model(), policy=chosen, inner="eager", **options)


def _texts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {branch: torch.randn(1, 5, 16, generator=generator) for branch in BOTH}


def _loop(
    model: Any, *, order: Sequence[str] = BOTH, concat: str | None = None, until: int = STEPS
) -> tuple[list[Tensor], cachepass.Session]:
    """A request; guidance is off from step `until` on. Returns the latents after each step."""
    session = cachepass.session(model, num_inference_steps=STEPS)
    latent = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    texts, latents = _texts(), []
    for step in range(STEPS):
        time = torch.full((1,), 1000.0 * (1 - step / STEPS))
        found = {}
        if concat is not None:
            first, second = BACKWARDS if concat == "concat" else BOTH
            with session.at(step=step):
                both = model(
                    latent.repeat(2, 1, 1, 1, 1), time.repeat(2),
                    torch.cat([texts[first], texts[second]]), return_dict=False,
                )  # fmt: skip
            found = dict(zip((first, second), as_tensor(both).chunk(2), strict=True))
        else:
            for branch in order if step < until else ("cond",):
                with session.at(step=step, branch=branch):
                    out = model(latent, time, texts[branch], return_dict=False)
                found[branch] = as_tensor(out)
        velocity = found["cond"]
        if "uncond" in found:
            velocity = found["uncond"] + 3.0 * (velocity - found["uncond"])
        latent = latent - velocity / STEPS
        latents.append(latent)
    return latents, session


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


MIX = cachepass.MixCache(trigger=9.0, influence=(9.0, 0.0, 9.0))


@pytest.mark.parametrize("policy", [None, MIX], ids=["schedule", "mixcache"])
def test_the_order_of_the_calls_does_not_matter(policy: cachepass.NamedPolicy | None) -> None:
    usual, first = _loop(_compile(policy))
    backwards, second = _loop(_compile(policy), order=BACKWARDS)
    assert _same(usual, backwards)
    reused = {(s, b) for s, b, names in decisions(first) if names}
    assert reused == {(s, b) for s, b, names in decisions(second) if names} != set()
    assert {branch for _, branch in reused} == {"uncond"}
    assert len(decisions(second)) == 2 * STEPS, "a call ahead of its turn counts once"


def test_a_call_ahead_of_its_turn_with_other_inputs_is_made_again() -> None:
    model, texts = _compile(cachepass.Schedule(reuse={1: "cfg"})), _texts()
    session = cachepass.session(model, num_inference_steps=3)
    latent, time = torch.randn(1, 4, 2, 8, 8), torch.tensor([900.0])
    for step in (0, 1):
        for branch in BACKWARDS:
            text = texts[branch] + (step if branch == "cond" else 0)  # changes in mid-request
            with session.at(step=step, branch=branch):
                out = as_tensor(model(latent, time, text, return_dict=False))
    with torch.no_grad():
        expected = as_tensor(WAN.model()(latent, time, texts["cond"] + 1, return_dict=False))
    assert torch.equal(out, expected)
    assert "its inputs turned out to be others: it was computed again" in notes(session)


@pytest.mark.parametrize(
    ("policy", "form"),
    [
        (None, "concat"),
        (MIX, "concat-cond-first"),
        pytest.param(None, "concat-cond-first", marks=pytest.mark.full),
        pytest.param(MIX, "concat", marks=pytest.mark.full),
    ],
)
def test_one_batch_of_both_branches_is_two_calls(
    policy: cachepass.NamedPolicy | None, form: Any
) -> None:
    apart, first = _loop(_compile(policy))
    together, second = _loop(_compile(policy, guidance=form), concat=form)
    assert _same(apart, together)
    assert decisions(first) == decisions(second)


def test_diffusers_says_that_a_batch_holds_both() -> None:
    tiny = TINY["cogvideox"]
    policy = cachepass.Schedule(reuse={1: "cfg"})
    cached: Any = cachepass.compile(tiny.model(), policy=policy, inner="eager")
    session = cachepass.session(cached, num_inference_steps=3)
    inputs = {k: torch.cat([v, v]) for k, v in tiny.example().items() if isinstance(v, Tensor)}
    other = {k: v for k, v in tiny.example().items() if k not in inputs}
    inputs["encoder_hidden_states"][0] *= 0.5
    with session:
        for time in (900, 800, 700):
            with cached.cache_context("cond_uncond"):
                cached(**{**inputs, **other, "timestep": torch.tensor([time, time])})
    assert [(b, names) for _, b, names in decisions(session)] == [
        ("cond", []), ("uncond", []),
        ("cond", []), ("uncond", ["cfg"]),
        ("cond", []), ("uncond", []),
    ]  # fmt: skip


def test_two_prompts_are_no_guidance() -> None:
    """Rows whose latents differ are rows, whatever the context is called."""
    cached = _compile(MIX)
    session = cachepass.session(cached, num_inference_steps=STEPS)
    latents, texts = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 5, 16)
    with session.at(step=0), cached.cache_context("cond_uncond"):
        out = as_tensor(cached(latents, torch.tensor([900.0, 900.0]), texts, return_dict=False))
    assert out.shape[0] == 2
    assert len(decisions(session)) == 1


def test_guidance_that_ends_part_way() -> None:
    latents, session = _loop(_compile(MIX), until=6)
    assert {b for s, b, _ in decisions(session) if s >= 6} == {"cond"}
    expected, _ = _loop(_compile(cachepass.Compute()), until=6)
    assert torch.equal(latents[0], expected[0])


class Stereo(ToyDiT):
    """Two outputs, as models of video and sound have."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        out = super().forward(x, t, y)
        return out, 2 * out[:, :, ::2]


@pytest.mark.parametrize("order", [BOTH, BACKWARDS])
def test_a_model_with_two_outputs(order: Sequence[str]) -> None:
    plain = Stereo().eval()
    policy = cachepass.Schedule(reuse={2: "cfg"})
    model: Any = cachepass.compile(plain, policy=policy, inner="eager")
    session = cachepass.session(model, num_inference_steps=4)
    x, labels = torch.randn(1, 3, 8, 8), {"cond": torch.tensor([3]), "uncond": torch.tensor([10])}
    deltas: list[Tensor] = []
    for step in range(3):
        given = {
            b: (x + 0.1 * step, torch.tensor([1.0 - step]), label) for b, label in labels.items()
        }
        with torch.no_grad():
            expected = {branch: plain(*given[branch]) for branch in BOTH}
        found = {}
        for branch in order:
            with session.at(step=step, branch=branch):
                found[branch] = model(*given[branch])
        if step == 2:
            last = [c + delta for c, delta in zip(expected["cond"], deltas, strict=True)]
            expected["uncond"] = tuple(last)
        deltas = [u - c for c, u in zip(expected["cond"], expected["uncond"], strict=True)]
        for branch in BOTH:
            assert all(map(torch.equal, found[branch], expected[branch]))
    assert (
        decisions(session)[-2:]
        == [(2, "cond", []), (2, "uncond", ["cfg"])][:: 1 if order == BOTH else -1]
    )


def test_no_guidance_is_said() -> None:
    _, session = _loop(_compile(cachepass.MixCache(trigger=9.0)), until=0)
    assert "site 'cfg' has nothing to skip: the model is called once per step" in notes(session)
    with pytest.raises(cachepass.PolicyError, match=r"'schedule': site 'cfg' has nothing to skip"):
        _loop(_compile(), until=0)


def test_unknown_guidance() -> None:
    with pytest.raises(cachepass.CachePassError, match=r"unknown `guidance`='batch': must be None"):
        _compile(guidance="batch")
