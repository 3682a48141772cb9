"""Tiny models with random weights, and inputs for one call of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.toys.dit import ToyDiT

STEPS = 10


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to build a model, and what to call it with."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    blocks: int

    def model(self, seed: int = 0) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().eval()

    def example(self, seed: int = 1) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs()


def as_tensor(output: Any) -> Tensor:
    """The one tensor of a model's output."""
    if isinstance(output, Tensor):
        return output
    value = output[0]
    assert isinstance(value, Tensor)
    return value


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# --------------------------------------------------------------------------- diffusers


def _wan() -> nn.Module:
    model: nn.Module = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    return model


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "return_dict": False,
    }


def _cogvideox() -> nn.Module:
    model: nn.Module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
    )  # fmt: skip
    return model


def _cogvideox_inputs() -> dict[str, Any]:
    latent = torch.randn(1, 2, 4, 8, 8)  # the two halves of guidance, as the pipeline does it
    return {
        "hidden_states": torch.cat([latent, latent]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([900, 900]),
        "return_dict": False,
    }


def _flux() -> nn.Module:
    model: nn.Module = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([0.9]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


def _hunyuan() -> nn.Module:
    model: nn.Module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model


def _hunyuan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": (torch.arange(6)[None] < torch.randint(2, 6, (1, 1))).float(),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }


def _ltx() -> nn.Module:
    model: nn.Module = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model


def _ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2 * 4 * 4, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([900]),
        "encoder_attention_mask": (torch.arange(5)[None] < torch.randint(2, 5, (1, 1))).float(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }


def _mochi() -> nn.Module:
    model: nn.Module = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4,
        max_sequence_length=8,
    )  # fmt: skip
    return model


def _mochi_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.tensor([900.0]),
        "encoder_attention_mask": torch.arange(8)[None] < torch.randint(4, 8, (1, 1)),
        "return_dict": False,
    }


def _hidream() -> nn.Module:
    model: nn.Module = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16],
        text_emb_dim=64, num_routed_experts=4, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1, 2, 3),
    )  # fmt: skip
    return model


def _hidream_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timesteps": torch.tensor([900]),
        "encoder_hidden_states_t5": torch.randn(1, 6, 32),
        "encoder_hidden_states_llama3": torch.randn(4, 1, 6, 16),
        "pooled_embeds": torch.randn(1, 64),
        "return_dict": False,
    }


def _toy_inputs() -> dict[str, Any]:
    return {"x": torch.randn(1, 3, 8, 8), "t": torch.tensor([0.9]), "y": torch.tensor([3])}


WAN = Tiny(_wan, _wan_inputs, blocks=4)
TOY = Tiny(ToyDiT, _toy_inputs, blocks=3)
HIDREAM = Tiny(_hidream, _hidream_inputs, blocks=4)
"""Not among `TINY`: its routed experts are captured in a way of their own."""

TINY: dict[str, Tiny] = {
    "wan": WAN,
    "cogvideox": Tiny(_cogvideox, _cogvideox_inputs, blocks=2),
    "flux": Tiny(_flux, _flux_inputs, blocks=4),
    "hunyuan": Tiny(_hunyuan, _hunyuan_inputs, blocks=4),
    "ltx": Tiny(_ltx, _ltx_inputs, blocks=2),
    "mochi": Tiny(_mochi, _mochi_inputs, blocks=2),
    "toy": TOY,
}
