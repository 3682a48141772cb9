"""Tiny random components of pipelines, and what these are called with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from tests.zoo import ZOO
from tests.zoo.entry import stirred


def model(name: str, **changes: Any) -> Any:
    """The tiny model of a class, with another config if need be."""
    made = ZOO[name].model()
    return stirred(type(made).from_config(made.config, **changes)).eval() if changes else made


def embeds(*shape: int) -> Tensor:
    """A prompt."""
    return torch.randn(1, *shape)


def both(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """A prompt and a negative one, by argument."""
    names = [
        (prefix + name, shape) for prefix in ("", "negative_") for name, shape in shapes.items()
    ]
    return {
        name: torch.ones(1, *shape, dtype=torch.int64) if "mask" in name else embeds(*shape)
        for name, shape in names
    }


def picture(side: int = 64) -> Image.Image:
    """An image to start from."""
    return Image.new("RGB", (side, side), (200, 100, 50))


FLOW = FlowMatchEulerDiscreteScheduler
NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
NO_TEXTS: dict[str, Any] = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
SIZE = {"height": 64, "width": 64}
VIDEO = {**SIZE, "num_frames": 5}


def wan_vae() -> nn.Module:
    vae: nn.Module = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return vae.eval()


def image_vae(channels: int) -> nn.Module:
    vae: nn.Module = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip
    return vae.eval()
