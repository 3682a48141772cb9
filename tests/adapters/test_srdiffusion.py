"""SRDiffusion: two trained models take turns in one pipeline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.adapters.diffusers import denoisers
from examples.shapes.model import load
from examples.shapes.pipeline import ShapesPipeline, build_pipeline, build_scheduler
from examples.shapes.world import embed_prompt

STEPS = 8
PROMPT = "red disc bounce plain"


def _pipe(scheduler: Any = "euler") -> ShapesPipeline:
    pipe = build_pipeline("large", scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate(pipe: ShapesPipeline) -> Tensor:
    frames: Tensor = pipe(
        PROMPT, num_inference_steps=STEPS, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    return frames


def _relay(pipe: ShapesPipeline, **options: Any) -> Any:
    policy = cachepass.SRDiffusion(render=load("small"), **options)
    return cachepass.compile(pipe, policy=policy, inner="eager")


def _by_hand(
    scheduler: Any, delta: float, least: int, latest: float, measured: str
) -> tuple[Tensor, int | None]:
    """The same request on plain models, with the rule in three lines."""
    models, scheduler = (
        {"sketch": load("large"), "render": load("small")},
        build_scheduler(scheduler),
    )
    scheduler.set_timesteps(STEPS)
    latent = torch.randn(1, 16, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [embed_prompt(PROMPT)[None], embed_prompt("")[None]]
    name, switched, seen = "sketch", None, []
    for i, t in enumerate(scheduler.timesteps):
        if measured == "latent":
            seen.append(latent)
        d = [math.tanh(float((b - a).abs().sum() / a.abs().sum())) for a, b in zip(seen, seen[1:])]  # noqa: RUF007, B905
        settled = len(d) > 1 and 0 < d[-1] - d[-2] < delta
        if name == "sketch" and ((i >= least and settled) or i >= latest * STEPS):
            name, switched = "render", i
        with torch.no_grad():
            cond, uncond = (
                models[name](latent, t[None], text, return_dict=False)[0] for text in texts
            )
        if measured == "output":
            seen.append(cond)
        latent = scheduler.step(uncond + 4.0 * (cond - uncond), t, latent, return_dict=False)[0]
    return latent, switched


@pytest.mark.parametrize("scheduler", ["euler", pytest.param("unipc", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("delta", "latest", "measured"),
    [
        (0.01, 0.9, "latent"),
        (1.0, 0.9, "output"),
        pytest.param(1e-9, 0.5, "latent", marks=pytest.mark.full),
    ],
)
def test_it_is_the_rule_on_plain_models(
    scheduler: str, delta: float, latest: float, measured: Any
) -> None:
    pipe = _relay(_pipe(scheduler), delta=delta, min_steps=3, latest=latest, measured=measured)
    got = _generate(pipe)
    expected, switched = _by_hand(scheduler, delta, 3, latest, measured)
    assert pipe.transformer.switch.switched_at == [switched]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, _generate(pipe)), "a second request starts with the sketch again"


def test_either_side_may_be_cached() -> None:
    pipe = _relay(
        _pipe(), min_steps=4, latest=0.5, delta=1e-9,
        sketch_policy=cachepass.Schedule(reuse={2: "step"}),
        render_policy=cachepass.Schedule(reuse={5: "step", 6: "cfg"}),
    )  # fmt: skip
    _generate(pipe)
    report = cachepass.report(pipe)
    of = {
        name: [(c["step"], c["branch"], c["reused"][0]) for c in part["requests"][0]["steps"]]
        for name, part in report.to_dict()["denoisers"].items()
    }
    assert [c for c in of["transformer, sketch"] if c[2]] == [
        (2, b, ["step"]) for b in ("cond", "uncond")
    ]
    assert [c for c in of["render"] if c[2]] == [
        (5, "cond", ["step"]), (5, "uncond", ["step"]), (6, "uncond", ["cfg"]),
    ]  # fmt: skip
    assert {s for s, _, _ in of["render"]} == {4, 5, 6, 7}
    assert "render: policy Schedule" in str(report)


def test_restore_puts_the_large_model_back() -> None:
    pipe = _pipe()
    plain = pipe.transformer
    _relay(pipe)
    assert pipe.transformer is not plain
    assert pipe.transformer.config.num_layers == 12
    cachepass.restore(pipe)
    assert pipe.transformer is plain
    assert list(denoisers(pipe)) == ["transformer"]


def test_two_denoisers_have_sessions_of_their_own() -> None:
    """As in Wan 2.2: one model for high noise, one for low."""
    pipe = ShapesPipeline(
        tokenizer=None, text_encoder=_pipe().text_encoder, vae=_pipe().vae,
        scheduler=build_scheduler("euler"), transformer=load("small"), transformer_2=load("small"),
        boundary_ratio=0.8,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    expected = _generate(pipe)
    cachepass.compile(pipe, policy="compute", inner="eager")
    assert torch.equal(_generate(pipe), expected)
    cachepass.restore(pipe)
    policy = cachepass.Schedule(reuse=dict.fromkeys(range(1, STEPS), "step"))
    cachepass.compile(pipe, policy=policy, inner="eager")
    _generate(pipe)
    parts = cachepass.report(pipe).to_dict()["denoisers"]
    steps = {
        name: {c["step"]: c["reused"][0] for c in part["requests"][0]["steps"]}
        for name, part in parts.items()
    }
    assert set(steps["transformer"]) | set(steps["transformer_2"]) == set(range(STEPS))
    first = min(steps["transformer_2"])
    assert first > 1
    assert steps["transformer_2"][first] == [], "it has nothing of its own to reuse yet"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": 0.0}, r"SRDiffusion\(`delta`=0.0\): must be above 0"),
        ({"min_steps": 0}, r"SRDiffusion\(`min_steps`=0\): must be at least 1"),
        ({"latest": 1.5}, r"SRDiffusion\(`latest`=1.5\): must be a share above 0 and up to 1"),
        ({"measured": "x"}, r"SRDiffusion\(`measured`='x'\): must be 'latent' or 'output'"),
        ({"render": "small"}, r"SRDiffusion\(`render`=...\): must be a torch.nn.Module, got str"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(cachepass.PolicyError, match=message):
        cachepass.SRDiffusion(**{"render": torch.nn.Identity(), **fields})


def test_it_has_no_defaults() -> None:
    with pytest.raises(cachepass.PolicyError, match=r"'srdiffusion' needs a second model: policy="):
        cachepass.compile(load("small"), policy="srdiffusion")


def test_a_model_is_no_pipeline() -> None:
    with pytest.raises(cachepass.PolicyError, match="SRDiffusion takes turns within a request"):
        cachepass.compile(load("small"), policy=cachepass.SRDiffusion(render=load("small")))
