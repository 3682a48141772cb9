"""The two trained transformers, in one latent space.

Both are diffusers' `WanTransformer3DModel`, only smaller than the published ones: 512
tokens (8 frames of 8x8 patches of 2x2 latents), velocity prediction of flow matching,
timesteps from 1000 (noise) to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from examples.shapes.codec import CHANNELS
from examples.shapes.world import TEXT_DIM

WEIGHTS = Path(__file__).with_name("weights")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the sizes differ in; all else is shared."""

    layers: int
    heads: int
    head_dim: int = 48


SIZES = {
    "large": Size(layers=12, heads=4),  # 7.5 M parameters
    "small": Size(layers=6, heads=2),  # 1 M parameters
}


def build(size: str) -> WanTransformer3DModel:
    """Builds the transformer of a size with fresh weights.

    Raises:
        ValueError: There is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    config = SIZES[size]
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=4 * config.heads * config.head_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def load(
    size: str, dtype: torch.dtype = torch.float32, path: Path | None = None
) -> WanTransformer3DModel:
    """Loads a trained transformer, ready for inference.

    Args:
        size: `large` or `small`.
        dtype: Type to compute in; the files hold bfloat16.
        path: A safetensors file to take in place of the shipped one.
    """
    model = build(size)
    weights = load_file(path or WEIGHTS / f"{size}.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    if dtype != torch.float32:
        _cast(model, dtype)
    return model.eval()


def _cast(model: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Casts as `from_pretrained` does: norms and time embedding stay in float32."""
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
