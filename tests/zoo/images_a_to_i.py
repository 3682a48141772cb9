"""Image models, A to I."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from tests.models import HIDREAM, TINY
from tests.zoo.entry import Entry, stirred


def _prompt(length: int, at_least: int = 3) -> Tensor:
    """Which tokens of a padded prompt are real: another number for each prompt."""
    return torch.arange(length)[None] < torch.randint(at_least, length, (1, 1))


def _grid_ids(height: int = 4, width: int = 4) -> Tensor:
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))
    )


def _grid_ids_4(height: int = 4, width: int = 4) -> Tensor:
    return torch.cartesian_prod(
        torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)
    )


def _text_ids_4(length: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, length)))


def _packed_inputs(text: int = 6) -> dict[str, Any]:
    """An image of 4 x 4 tokens and its prompt, with positions as Flux has them."""
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, text, 24),
        "img_ids": _grid_ids(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def _auraflow() -> nn.Module:
    return stirred(diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
        num_single_dit_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=64,
    ))  # fmt: skip


def _auraflow_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "timestep": torch.tensor([0.9]),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _bria() -> nn.Module:
    return stirred(diffusers.BriaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
    ))  # fmt: skip


def _bria_inputs() -> dict[str, Any]:
    return {**_packed_inputs(), "timestep": torch.tensor([900.0]), "attention_kwargs": None}


def _bria_fibo() -> nn.Module:
    return stirred(diffusers.BriaFiboTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
        text_encoder_dim=12,
    ))  # fmt: skip


def _bria_fibo_inputs() -> dict[str, Any]:
    attended = torch.cat([_prompt(6), torch.ones(1, 16, dtype=torch.bool)], dim=1)
    return {
        **_packed_inputs(),
        "timestep": torch.tensor([900.0]),
        "text_encoder_layers": [torch.randn(1, 6, 12) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": attended[:, None, None, :]},
    }


def _bria_fibo2() -> nn.Module:
    return stirred(diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=4, n_refiner_layers=2, n_heads=2,
        cap_feat_dim=12, injection_layer_ids=(1, 3), perceiver_num_layers=1,
        min_num_gist_tokens=2, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=2,
        gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(32, 16, 16),
    ))  # fmt: skip


def _bria_fibo2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 3, 6, 12),
        "encoder_attention_mask": None,  # one prompt has no padding
        "context_latents": None,
        "return_dict": False,
    }


def _chroma() -> nn.Module:
    return stirred(diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    ))  # fmt: skip


def _chroma_inputs() -> dict[str, Any]:
    return {
        **_packed_inputs(),
        "timestep": torch.tensor([0.9]),
        "attention_mask": torch.cat([_prompt(6).float(), torch.ones(1, 16)], dim=1),
        "joint_attention_kwargs": {},
    }


def _cogview3plus() -> nn.Module:
    return stirred(diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
        pos_embed_max_size=8, sample_size=8,
    ))  # fmt: skip


def _cogview_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "timestep": torch.tensor([900.0]),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
        "return_dict": False,
    }


def _cogview3plus_inputs() -> dict[str, Any]:
    return {**_cogview_inputs(), "timestep": torch.tensor([900])}


def _cogview4() -> nn.Module:
    return stirred(diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
        pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16),
    ))  # fmt: skip


def _cogview4_inputs() -> dict[str, Any]:
    return {**_cogview_inputs(), "attention_kwargs": None}


def _dit() -> nn.Module:
    return stirred(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=4,
        norm_num_groups=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ))  # fmt: skip


def _dit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([900]),
        "class_labels": torch.randint(0, 10, (1,)),
        "return_dict": False,
    }


def _ernie() -> nn.Module:
    return stirred(diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=4, ffn_hidden_size=48, in_channels=4,
        out_channels=4, patch_size=1, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    ))  # fmt: skip


def _ernie_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([900.0]),
        "text_bth": torch.randn(1, 6, 24),
        "text_lens": torch.randint(3, 7, (1,)),
        "return_dict": False,
    }


def _flux2() -> nn.Module:
    return stirred(diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ))  # fmt: skip


def _flux2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "timestep": torch.tensor([0.9]),
        "guidance": torch.tensor([4.0]),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "txt_ids": _text_ids_4(6)[None],
        "img_ids": _grid_ids_4()[None],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _flux3() -> nn.Module:
    return stirred(diffusers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    ))  # fmt: skip


def _flux3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "timestep": torch.tensor([0.9]),
        "return_dict": False,
        "img_ids": _grid_ids_4().float(),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "txt_ids": _text_ids_4(6).float(),
    }


def _glm() -> nn.Module:
    return stirred(diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    ))  # fmt: skip


def _glm_inputs() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "prior_token_id": torch.randint(0, 32, (1, 16)),
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": torch.tensor([899.0]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": GlmImageKVCache(num_layers=4),
    }


def _hunyuandit() -> nn.Module:
    return stirred(diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=32, num_layers=6, cross_attention_dim=24, cross_attention_dim_t5=16,
        pooled_projection_dim=12, text_len=5, text_len_t5=6,
    ))  # fmt: skip


def _hunyuandit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "text_embedding_mask": _prompt(5).long(),
        "encoder_hidden_states_t5": torch.randn(1, 6, 16),
        "text_embedding_mask_t5": _prompt(6).long(),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4)),
        "return_dict": False,
    }


def _hunyuanimage() -> nn.Module:
    return stirred(diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=24,
        text_embed_2_dim=12, rope_axes_dim=(8, 8),
    ))  # fmt: skip


def _hunyuanimage_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([900.0]),
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "encoder_attention_mask": _prompt(6).long(),
        "encoder_hidden_states_2": torch.randn(1, 5, 12),
        "encoder_attention_mask_2": _prompt(5).long(),
    }


def _ideogram4() -> nn.Module:
    return stirred(diffusers.Ideogram4Transformer2DModel(
        in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=48, adaln_dim=16, llm_features_dim=24, mrope_section=(4, 2, 2),
    ))  # fmt: skip


def _ideogram4_inputs() -> dict[str, Any]:
    """Padding, prompt and image in one sequence; a shorter prompt has more padding."""
    padding = int(torch.randint(0, 3, ()))
    text = torch.arange(6 - padding)[:, None].expand(-1, 3)
    image = _grid_ids().long() + 65536
    positions = torch.cat([torch.zeros(padding, 3, dtype=torch.long), text, image])
    lengths = torch.tensor([padding, 6 - padding, 16])
    return {
        "hidden_states": torch.randn(1, 22, 4),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 22, 24),
        "position_ids": positions[None],
        "segment_ids": torch.tensor([-1, 1, 1]).repeat_interleave(lengths)[None],
        "indicator": torch.tensor([0, 3, 2]).repeat_interleave(lengths)[None],
        "attention_kwargs": None,
        "return_dict": False,
    }


_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")

ZOO: dict[str, Entry] = {
    "AuraFlowTransformer2DModel": Entry(
        build=_auraflow,
        inputs=_auraflow_inputs,
        main=("joint_transformer_blocks", "single_transformer_blocks"),
    ),
    "BriaTransformer2DModel": Entry(build=_bria, inputs=_bria_inputs, main=_DOUBLE_SINGLE),
    "BriaFiboTransformer2DModel": Entry(
        build=_bria_fibo, inputs=_bria_fibo_inputs, main=_DOUBLE_SINGLE
    ),
    "BriaFibo2Transformer2DModel": Entry(
        build=_bria_fibo2, inputs=_bria_fibo2_inputs, main=("layers",)
    ),
    "ChromaTransformer2DModel": Entry(build=_chroma, inputs=_chroma_inputs, main=_DOUBLE_SINGLE),
    "CogView3PlusTransformer2DModel": Entry(
        build=_cogview3plus, inputs=_cogview3plus_inputs, main=("transformer_blocks",)
    ),
    "CogView4Transformer2DModel": Entry(
        build=_cogview4, inputs=_cogview4_inputs, main=("transformer_blocks",)
    ),
    "DiTTransformer2DModel": Entry(build=_dit, inputs=_dit_inputs, main=("transformer_blocks",)),
    "ErnieImageTransformer2DModel": Entry(build=_ernie, inputs=_ernie_inputs, main=("layers",)),
    "FluxTransformer2DModel": Entry(
        build=TINY["flux"].build, inputs=TINY["flux"].inputs, main=_DOUBLE_SINGLE
    ),
    "Flux2Transformer2DModel": Entry(build=_flux2, inputs=_flux2_inputs, main=_DOUBLE_SINGLE),
    "Flux3Transformer2DModel": Entry(
        build=_flux3, inputs=_flux3_inputs, main=("single_transformer_blocks",)
    ),
    "GlmImageTransformer2DModel": Entry(
        build=_glm, inputs=_glm_inputs, main=("transformer_blocks",)
    ),
    "HiDreamImageTransformer2DModel": Entry(
        build=HIDREAM.build,
        inputs=HIDREAM.inputs,
        timestep="timesteps",
        main=("double_stream_blocks", "single_stream_blocks"),
    ),
    "HunyuanDiT2DModel": Entry(build=_hunyuandit, inputs=_hunyuandit_inputs, main=("blocks",)),
    "HunyuanImageTransformer2DModel": Entry(
        build=_hunyuanimage, inputs=_hunyuanimage_inputs, main=_DOUBLE_SINGLE
    ),
    "Ideogram4Transformer2DModel": Entry(
        build=_ideogram4, inputs=_ideogram4_inputs, main=("layers",)
    ),
}
