"""What users do to pipelines and around them; requests, steps and outputs stay what they are."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import cachepass
from cachepass.adapters.diffusers import denoisers
from tests.adapters.pipes import (
    FLOW,
    PIPES,
    STEPS,
    flux,
    generate,
    image_vae,
    lumina,
    picture,
    sd3,
    wan,
)
from tests.zoo.entry import stirred

REUSE = cachepass.Schedule(reuse={2: "stack"})
REUSES = [[], [], ["stack"], []]
"""By step, with `REUSE`."""


def compiled(pipe: Any, policy: Any = "compute") -> Any:
    return cachepass.compile(pipe, policy=policy, inner="eager")


def requests(pipe: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cachepass.report(pipe).to_dict()["requests"]
    return found


def calls(request: dict[str, Any]) -> list[tuple[int, str, list[str]]]:
    return [(c["step"], c["branch"], c["reused"][0]) for c in request["steps"]]


def assert_same(made: tuple[Any, dict[str, Any]], **more: Any) -> Any:
    """`compute` gives what the plain pipeline does; the pipeline, compiled."""
    pipe, given = made
    pipe.set_progress_bar_config(disable=True)
    given |= {"num_inference_steps": STEPS, "output_type": "latent", **more}
    expected = generate(pipe, given)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)
    return pipe


def shapes(**options: Any) -> tuple[Any, dict[str, Any]]:
    """A Wan pipeline and its call."""
    pipe, given = wan(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**given, "num_inference_steps": STEPS, "output_type": "latent"}


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

    @torch.no_grad()
    def __call__(self, latent: Tensor, texts: list[Tensor], guided: int) -> Tensor:
        self.scheduler.set_timesteps(STEPS)
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
    pipe = compiled(Loop(shapes()[0].transformer), cachepass.Schedule(reuse={2: "stack"}))
    pipe(torch.randn(1, 4, 2, 8, 8), [torch.randn(1, 5, 16) for _ in range(2)], guided=2)
    (request,) = requests(pipe)
    assert calls(request) == [
        (0, "call0", []), (0, "call1", []), (1, "call0", []), (1, "call1", []),
        (2, "call1", ["stack"]), (3, "call1", []),
    ]  # fmt: skip
    assert request["num_inference_steps"] == STEPS


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


# ------------------------------------------------------------------------ what is around a call


@pytest.mark.parametrize("when", ["before", "after"])
def test_whole_models_are_moved(when: str) -> None:
    """The hook that model offload puts on each component, on the only device there is."""
    pipe, given = shapes()
    expected = generate(pipe, given)
    if when == "before":
        _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    compiled(pipe)
    if when == "after":
        _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    for _ in range(2):
        assert torch.equal(generate(pipe, given), expected)
        hook.offload()
    assert [request["num_inference_steps"] for request in requests(pipe)] == [STEPS] * 2
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] == 1


def test_offload_of_layers_is_refused() -> None:
    """Weights that come and go within a call: an error that says what to do instead."""
    for how in ("sequential", "group"):
        pipe, given = shapes()
        model = pipe.transformer
        if how == "sequential":
            accelerate.cpu_offload(model, "cpu")
        else:
            apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
        compiled(pipe)
        with pytest.raises(
            cachepass.CaptureError,
            match=r"DModel\.\w+ carries a hook .*pipe.enable_model_cpu_offload\(\)",
        ):
            generate(pipe, given)


@contextlib.contextmanager
def _as_fused(module: nn.Module) -> Iterator[None]:
    """A low-rank addition to a layer's weights, as fusing writes and unfusing takes back."""
    weight = module.get_parameter("blocks.1.attn1.to_q.weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.data += 0.5 * torch.ones(24, 1) @ torch.ones(1, 24)
    yield
    weight.data.copy_(kept)


def test_weights_fused_and_taken_back() -> None:
    pipe, given = shapes()
    before = generate(pipe, given)
    with _as_fused(pipe.transformer):
        fused = generate(pipe, given)
    assert not torch.equal(fused, before)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), before)
    with _as_fused(pipe.transformer):
        assert torch.equal(generate(pipe, given), fused)
    assert torch.equal(generate(pipe, given), before)
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] == 1


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, as libraries of adapters put there."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down, self.up = nn.Linear(24, 2, bias=False), nn.Linear(2, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.scale * self.up(self.down(x))
        return result


def test_an_adapter_loaded_scaled_and_unloaded() -> None:
    pipe, given = shapes()
    attention = pipe.transformer.blocks[1].attn1
    layer = attention.to_q
    adapted = Adapted(layer, 1.0).eval()

    def outputs() -> Iterator[Tensor]:
        for scale in (None, 1.0, 0.5, None):
            attention.to_q = layer if scale is None else adapted
            adapted.scale = scale or 0.0
            yield generate(pipe, given)

    expected = list(outputs())
    assert len({float(value.sum()) for value in expected}) == 3
    compiled(pipe)
    for got, want in zip(outputs(), expected, strict=True):
        assert torch.equal(got, want)
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] <= 3


class Int8(Tensor):
    """Weights in eight bits, made wide where they are used: how quantization libraries do it."""

    quantized: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: type[Int8], values: Tensor, scale: Tensor) -> Int8:
        made: Int8 = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)
        made.quantized, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["quantized", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Int8:
        return Int8(parts["quantized"], parts["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the operation
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if op is torch.ops.aten.detach.default:
            return Int8(args[0].quantized, args[0].scale)
        args, kwargs = tree_map_only(
            Int8, lambda q: q.quantized.to(q.scale.dtype) * q.scale, (args, kwargs or {})
        )
        return op(*args, **kwargs)


def test_quantized_weights() -> None:
    pipe, given = shapes()
    plain = generate(pipe, given)
    for module in pipe.transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            quantized = Int8((weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(quantized, requires_grad=False)
    expected = generate(pipe, given)
    assert not torch.equal(expected, plain)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)


def test_inference_mode() -> None:
    pipe, given = shapes()
    expected = generate(pipe, given)
    compiled(pipe, REUSE)
    with torch.inference_mode():
        reused = generate(pipe, given)
    assert not torch.equal(reused, expected)
    (request,) = requests(pipe)
    assert [c[2] for c in calls(request)] == [r for r in REUSES for _ in range(2)]
    assert torch.equal(generate(pipe, given), reused)


def test_autocast() -> None:
    pipe, given = shapes()
    plain = generate(pipe, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generate(pipe, given)
    compiled(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generate(pipe, given), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(generate(pipe, given), plain)


def test_another_attention_backend() -> None:
    """Chosen before, or between two requests: each has the kernel that is set."""
    pipe, given = shapes()
    with attention_backend("native"):  # what is set is set for all models, until here
        native = generate(pipe, given)
        pipe.transformer.set_attention_backend("_native_math")
        math = generate(pipe, given)
        compiled(pipe)
        for name, expected in (("_native_math", math), ("native", native), ("_native_math", math)):
            pipe.transformer.set_attention_backend(name)
            torch.testing.assert_close(generate(pipe, given), expected, rtol=1e-4, atol=1e-5)
        assert [r["num_inference_steps"] for r in requests(pipe)] == [STEPS] * 3


class Twice(FluxAttnProcessor):  # type: ignore[misc]
    """A processor of one's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return tuple(2 * part for part in made) if isinstance(made, tuple) else 2 * made


def test_a_processor_between_requests() -> None:
    pipe, given = flux()
    pipe.set_progress_bar_config(disable=True)
    given |= {"num_inference_steps": STEPS, "output_type": "latent"}
    before = generate(pipe, given)
    own = copy.copy(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(Twice())
    twice = generate(pipe, given)
    assert not torch.equal(before, twice)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), twice)
    pipe.transformer.set_attn_processor(own)
    assert torch.equal(generate(pipe, given), before)


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
