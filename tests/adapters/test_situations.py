"""What users do with pipelines; requests, steps and branches stay what they are."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import cachepass
from cachepass.adapters.diffusers import denoisers
from tests.adapters.driving import (
    REUSE,
    REUSES,
    STEPS,
    assert_same,
    calls,
    compiled,
    generate,
    requests,
)
from tests.adapters.parts import FLOW, image_vae, picture
from tests.adapters.pipes import PIPES, flux, lumina, sd3, shapes
from tests.zoo.entry import stirred

# ------------------------------------------------------------------- how many steps there are


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_last_step_of_an_image_is_the_last(strength: float) -> None:
    """A rule about the last step holds for the loop, whatever the scheduler was set to."""
    pipe, given = PIPES["flux img2img"].make()
    given |= {"strength": strength, "num_inference_steps": 8}
    steps = 8 - int(max(8 - 8 * strength, 0))
    often = cachepass.Periodic(period=100)
    trigger = cachepass.Limited(trigger=often, warmup_steps=1, last=1)
    compiled(pipe, cachepass.Policy(sites="stack", trigger=trigger))
    generate(pipe, given)
    (request,) = requests(pipe)
    assert request["num_inference_steps"] == steps
    reused = [bool(reused) for _, _, reused in calls(request)]
    assert reused == [False, *[True] * (steps - 2), False]


def test_strength_and_a_solver_that_calls_twice() -> None:
    pipe, given = sd3(
        diffusers.StableDiffusion3Img2ImgPipeline, vae=image_vae(4),
        scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    size = {"height": 8, "width": 8, "image": picture(8), "strength": 0.6}
    pipe = assert_same((pipe, given | size))
    (request,) = requests(pipe)
    steps = request["num_inference_steps"]
    assert [c[0] for c in calls(request)] == list(range(steps))
    assert steps < len(pipe.scheduler.timesteps) == 2 * STEPS - 1


def test_strength_and_a_scheduler_without_an_index() -> None:
    """DDIM keeps no place in its timesteps: the pipeline tells, or the first step does."""
    for bar in (True, False):
        pipe, given = PIPES["cogvideox image to video"].make()
        pipe = diffusers.CogVideoXVideoToVideoPipeline(
            **{**pipe.components, "transformer": PIPES["cogvideox"].make()[0].transformer}
        )
        pipe.set_progress_bar_config(disable=True)
        given = {n: v for n, v in given.items() if n not in ("image", "num_frames")}
        given |= {"video": [picture() for _ in range(5)], "strength": 0.5}
        compiled(pipe, cachepass.Schedule(reuse={1: "stack"}))
        if not bar:
            del vars(pipe)["progress_bar"]
        generate(pipe, given)
        (request,) = requests(pipe)
        assert request["num_inference_steps"] == 2 < len(pipe.scheduler.timesteps)
        assert [c[0] for c in calls(request)] == [0, 1]


def test_an_interrupted_loop() -> None:
    """`pipe._interrupt` makes the rest of the loop empty: what was cached is freed."""
    pipe, given = shapes()
    compiled(pipe, REUSE)

    def stop(owner: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        owner._interrupt = step == 2
        return values

    generate(pipe, given, callback_on_step_end=stop)
    (session,) = pipe.transformer.denoiser._sessions
    assert session.cache_bytes == 0
    (request,) = requests(pipe)
    assert request["num_inference_steps"] == 3
    assert request["notes"] == ["the loop ended after 3 of 4 steps"]
    generate(pipe, given)
    assert [c[2] for c in calls(requests(pipe)[1])] == [r for r in REUSES for _ in range(2)]
    assert requests(pipe)[1]["notes"] == []


def test_frames_with_schedulers_of_their_own() -> None:
    """Diffusion forcing: as many steps as rows of a matrix, and nobody steps the pipeline's."""
    pipe, given = PIPES["skyreels forcing"].make()
    given |= {"num_frames": 9, "ar_step": 1, "causal_block_size": 1}
    seen: list[int] = []

    def count(_: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return values

    expected = generate(pipe, given, callback_on_step_end=count)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)
    (request,) = requests(pipe)
    assert len(seen) > STEPS
    assert request["num_inference_steps"] == len(seen)
    assert [c[:2] for c in calls(request)] == [(s, b) for s in seen for b in ("cond", "uncond")]
    assert pipe.transformer.denoiser.request.cache_bytes == 0


# -------------------------------------------------------------------------- which branch it is


def test_a_third_call_of_some_steps() -> None:
    """Skip-layer guidance: two prompts in one batch, then one of them with layers left out."""
    pipe = assert_same(
        sd3(), skip_guidance_layers=[1], skip_layer_guidance_start=0.3,
        skip_layer_guidance_stop=0.9,
    )  # fmt: skip
    (request,) = requests(pipe)
    assert [c[:2] for c in calls(request)] == [
        (0, "call0"), (1, "call0"), (2, "call0"), (2, "call1"), (3, "call0"), (3, "call1"),
    ]  # fmt: skip


class Loop:
    """A pipeline that says nothing of branches; the unconditional call is made at first only."""

    def __init__(self, transformer: nn.Module) -> None:
        self.scheduler, self.transformer = FLOW(), transformer

    @property
    def components(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "transformer": self.transformer}

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return iterable

    @torch.no_grad()
    def __call__(self, guided: int, total: int = STEPS) -> Tensor:
        latent, *texts = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
        self.scheduler.set_timesteps(STEPS)
        self.progress_bar(total=total)
        for i, t in enumerate(self.scheduler.timesteps):
            made = [
                self.transformer(latent, t[None], text, return_dict=False)[0]
                for text in (texts if i < guided else texts[-1:])
            ]
            velocity = made[0] + 3.0 * (made[-1] - made[0])
            latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
        return latent


def test_a_branch_that_is_left_out() -> None:
    """Without names, the unconditional call first: the conditional one keeps its cache."""
    pipe = compiled(Loop(shapes()[0].transformer), REUSE)
    pipe(guided=2)
    (request,) = requests(pipe)
    assert calls(request) == [
        (0, "call0", []), (0, "call1", []), (1, "call0", []), (1, "call1", []),
        (2, "call1", ["stack"]), (3, "call1", []),
    ]  # fmt: skip
    assert request["num_inference_steps"] == STEPS


def test_a_loop_longer_than_was_said() -> None:
    """It goes on with empty slots, and its last step is the last."""
    trigger = cachepass.Limited(trigger=cachepass.Periodic(period=100), warmup_steps=1, last=1)
    pipe = Loop(shapes()[0].transformer)
    compiled(pipe, cachepass.Policy(sites="stack", trigger=trigger))
    pipe(guided=0, total=2)
    (request,) = requests(pipe)
    assert calls(request) == [(step, "call0", []) for step in range(STEPS)]
    assert request["num_inference_steps"] == STEPS
    pipe(guided=0)
    assert [bool(c[2]) for c in calls(requests(pipe)[1])] == [False, True, True, False]


def test_several_images_for_a_prompt() -> None:
    """Two of each half of guidance in one batch."""
    pipe, given = PIPES["pixart alpha"].make()
    given["num_images_per_prompt"] = 2
    expected = generate(pipe, given)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)
    (request,) = requests(pipe)
    assert [c[0] for c in calls(request)] == list(range(STEPS))
    assert {len(call["reused"]) for call in request["steps"]} == {4}
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] == 1


@pytest.mark.full
def test_guidance_rescaled() -> None:
    pipe = assert_same(PIPES["ltx"].make(), guidance_rescale=0.7)
    (request,) = requests(pipe)
    assert [c[:2] for c in calls(request)] == [(step, "cond_uncond") for step in range(STEPS)]


def test_ascending_timesteps() -> None:
    """Lumina counts time from 0 to 1: the scheduler tells the steps all the same."""
    pipe = assert_same(lumina())
    (request,) = requests(pipe)
    assert [c[0] for c in calls(request)] == list(range(STEPS))
    assert request["num_inference_steps"] == STEPS


def test_a_controlnet_is_no_denoiser() -> None:
    """It is called with a timestep, and what it returns is added inside of the denoiser."""
    plain, given = flux()
    with warnings.catch_warnings():  # diffusers on a name that its own ControlNet imports
        warnings.simplefilter("ignore", FutureWarning)
        net = diffusers.FluxControlNetModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
            axes_dims_rope=[4, 4, 8],
        )  # fmt: skip
    stirred(net).eval()
    for part in (net, diffusers.FluxMultiControlNetModel([net])):
        pipe = diffusers.FluxControlNetPipeline(
            **{**plain.components, "vae": image_vae(1)}, controlnet=part
        )
        assert list(denoisers(pipe)) == ["transformer"]
    pipe = diffusers.FluxControlNetPipeline(
        **{**plain.components, "vae": image_vae(1)}, controlnet=net
    )
    given |= {"height": 8, "width": 8, "control_image": picture(8)}
    pipe = assert_same((pipe, given))
    assert pipe.controlnet is net
    assert [c[1] for c in calls(requests(pipe)[0])] == ["call0"] * STEPS


def test_a_pipeline_made_from_a_compiled_one() -> None:
    """The components are shared: the scheduler tells what the new pipeline's loop does."""
    pipe, given = flux(vae=image_vae(1))
    compiled(pipe)
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    given |= {"height": 8, "width": 8, "image": picture(8), "strength": 0.5}
    generate(other, given | {"num_inference_steps": STEPS, "output_type": "latent"})
    (request,) = requests(pipe)
    assert request["num_inference_steps"] == 2
