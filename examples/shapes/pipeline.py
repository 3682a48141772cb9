"""A diffusers `WanPipeline` around the trained weights.

    pipe = build_pipeline()
    video = pipe("red disc bounce plain", output_type="pt").frames[0]  # (8, 3, 64, 64)

Everything that drives the transformer (guidance, scheduler loop, cache contexts) is
diffusers' own; only the parts around it, text and pixels, belong to this world.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from examples.shapes.codec import PatchCodec
from examples.shapes.model import load
from examples.shapes.world import FRAMES, SIZE, embed_prompt

GUIDANCE_SCALE = 4.0
SHIFT = 3.0


class CaptionEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The text encoder: looks captions up, so it needs no tokenizer and no weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        # Tells the pipeline this module's device and dtype, as weights would.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def forward(self, prompts: list[str]) -> torch.Tensor:
        """Embeds prompts as (batch, 4, 64)."""
        anchor = self.get_buffer("anchor")
        return torch.stack([embed_prompt(prompt) for prompt in prompts]).to(anchor)


class ShapesPipeline(WanPipeline):  # type: ignore[misc]
    """`WanPipeline` for this world: captions as prompts, eight frames of 64x64."""

    def __init__(
        self,
        tokenizer: None,
        text_encoder: CaptionEncoder,
        vae: PatchCodec,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        # The parameters are the base class's, since diffusers takes a pipeline's
        # components from this signature.
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        # The base class demands `num_frames % factor == 1`, which has no solution for
        # the codec's factor of 1. Here the factor serves that check alone (see
        # `prepare_latents`), so it is set to what lets eight frames pass.
        self.vae_scale_factor_temporal = FRAMES - 1

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int = SIZE,
        width: int = SIZE,
        num_frames: int = FRAMES,
        guidance_scale: float = GUIDANCE_SCALE,
        **options: Any,
    ) -> Any:
        """Generates videos; `WanPipeline.__call__` with the defaults of this world."""
        return super().__call__(
            prompt=prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            **options,
        )

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Embeds prompts as (batch * num_videos_per_prompt, 4, 64).

        A caption always has four tokens, so there is no padding and
        `max_sequence_length` means nothing here.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds: torch.Tensor = self.text_encoder(prompts)
        embeds = embeds.to(device=device, dtype=dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, dim=0)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = SIZE,
        width: int = SIZE,
        num_frames: int = FRAMES,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws the noise (batch, 16, frames, height / 4, width / 4)."""
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        rows = height // self.vae_scale_factor_spatial
        columns = width // self.vae_scale_factor_spatial
        shape = (batch_size, num_channels_latents, num_frames, rows, columns)
        noise: torch.Tensor = randn_tensor(shape, generator, device, dtype)
        return noise


def build_pipeline(
    size: str = "large",
    scheduler: Literal["euler", "unipc"] = "euler",
    dtype: torch.dtype = torch.float32,
) -> ShapesPipeline:
    """Builds a pipeline around the shipped weights.

    Args:
        size: `large` or `small`.
        scheduler: `euler`, or `unipc` (of second order).
        dtype: Type the transformer computes in; latents stay float32.

    Raises:
        ValueError: There is no such size or scheduler.
    """
    return ShapesPipeline(
        tokenizer=None,
        text_encoder=CaptionEncoder(),
        vae=PatchCodec.load(),
        scheduler=build_scheduler(scheduler),
        transformer=load(size, dtype),
    )


def build_scheduler(name: str) -> SchedulerMixin:
    """Builds a scheduler for the weights: flow matching, shift 3.

    Raises:
        ValueError: There is no such scheduler.
    """
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if name == "unipc":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
    raise ValueError(f"unknown scheduler {name!r}; choose one of euler, unipc")


def embed_prompts(prompts: list[str]) -> torch.Tensor:
    """Embeds prompts as (batch, 4, 64): `prompt_embeds` for a pipeline or a loop."""
    return torch.stack([embed_prompt(prompt) for prompt in prompts])
