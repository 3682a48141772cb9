"""Image models, J to Z."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor, nn

from tests.zoo.entry import Entry, stirred


def _prompt(length: int, at_least: int = 3) -> Tensor:
    """Which tokens of a padded prompt are real: another number for each prompt."""
    return torch.arange(length)[None] < torch.randint(at_least, length, (1, 1))


def _diagonal_ids(length: int) -> Tensor:
    place = torch.arange(float(length))
    return torch.stack([torch.zeros(length), place, place], dim=1)


def _grid_ids(modality: float = 0.0, start: float = 0.0) -> Tensor:
    """Places of 4 x 4 tokens."""
    side = start + torch.arange(4.0)
    return torch.cartesian_prod(torch.tensor([modality]), side, side)


def _joyimage() -> nn.Module:
    return stirred(diffusers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16,
        num_layers=4, rope_dim_list=[4, 6, 6], mlp_width_ratio=1.0,
    ))  # fmt: skip


def _joyimage_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 4, 1, 8, 8),  # a reference image, then the target
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
    }


def _joyimage_plus() -> nn.Module:
    return stirred(diffusers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16,
        num_layers=4, rope_dim_list=[4, 6, 6], mlp_width_ratio=1.0,
    ))  # fmt: skip


def _joyimage_plus_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16 + 6, 4, 1, 2, 2),  # patches of target and reference
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states_mask": _prompt(6).long(),
        "shape_list": [[(1, 4, 4), (1, 2, 3)]],
        "return_dict": False,
    }


def _krea2() -> nn.Module:
    return stirred(diffusers.Krea2Transformer2DModel(
        in_channels=8, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=16, num_layerwise_text_blocks=2, num_refiner_text_blocks=2,
        axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip


def _krea2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 8),
        "encoder_hidden_states": torch.randn(1, 6, 3, 16),
        "timestep": torch.tensor([0.9]),
        "position_ids": torch.cat([torch.zeros(6, 3), _grid_ids()]),
        "encoder_attention_mask": _prompt(6),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat_image() -> nn.Module:
    return stirred(diffusers.LongCatImageTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
    ))  # fmt: skip


def _longcat_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 8),
        "timestep": torch.tensor([0.9]),
        "guidance": None,
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "txt_ids": _diagonal_ids(6),
        "img_ids": _grid_ids(modality=1.0, start=8.0),
        "return_dict": False,
    }


def _lumina2() -> nn.Module:
    return stirred(diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=4, num_refiner_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16), cap_feat_dim=16,
    ))  # fmt: skip


def _lumina2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "encoder_attention_mask": _prompt(8).long(),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _lumina_next() -> nn.Module:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=4, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    nn.init.zeros_(model.pad_token)  # made of whatever the memory held
    return stirred(model)


def _lumina_next_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_mask": _prompt(6).long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


def _nucleus_moe() -> nn.Module:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=16,
        capacity_factors=2.0,
    )  # fmt: skip
    for block in model.transformer_blocks[1:]:  # made of whatever the memory held
        nn.init.normal_(block.img_mlp.experts.gate_up_proj, std=0.2)
        nn.init.normal_(block.img_mlp.experts.down_proj, std=0.2)
    return stirred(model)


def _nucleus_moe_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "encoder_hidden_states_mask": None,  # one prompt has no padding
        "img_shapes": [(1, 4, 4)],
        "attention_kwargs": None,
        "return_dict": False,
    }


def _omnigen() -> nn.Module:
    return stirred(diffusers.OmniGenTransformer2DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_layers=4, pad_token_id=0, vocab_size=32,
        max_position_embeddings=64, original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=16, time_step_dim=16,
    ))  # fmt: skip


def _omnigen_inputs() -> dict[str, Any]:
    """A prompt of 8 tokens, 4 of them a reference image, then the time and 16 patches."""
    attended = torch.ones(25, 25).tril()
    attended[2:6, 2:6] = 1  # images see all of themselves
    attended[9:] = 1
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.9]),
        "input_ids": torch.randint(1, 32, (1, 8)),
        "input_img_latents": [torch.randn(1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 6]]},
        "attention_mask": attended[None],
        "position_ids": torch.arange(25)[None],
        "return_dict": False,
    }


def _ovis_image() -> nn.Module:
    return stirred(diffusers.OvisImageTransformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip


def _ovis_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "txt_ids": _diagonal_ids(6),
        "img_ids": _grid_ids(),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _pixart() -> nn.Module:
    return stirred(diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=4,
        cross_attention_dim=24, sample_size=8, caption_channels=16,
        use_additional_conditions=True,
    ))  # fmt: skip


def _pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _prompt(6).long(),
        "timestep": torch.tensor([900]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 64.0]]),
            "aspect_ratio": torch.tensor([[1.0]]),
        },
        "return_dict": False,
    }


def _prior() -> nn.Module:
    return stirred(diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, num_layers=4, embedding_dim=16,
        num_embeddings=6, additional_embeddings=4,
    ))  # fmt: skip


def _prior_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16),  # an embedding of an image, no image
        "timestep": torch.tensor(900),
        "proj_embedding": torch.randn(1, 16),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "attention_mask": _prompt(6),
        "return_dict": False,
    }


def _prx() -> nn.Module:
    return stirred(diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=1.0, num_heads=2, depth=4,
        axes_dim=[8, 8],
    ))  # fmt: skip


def _prx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "attention_mask": _prompt(6),
        "return_dict": False,
    }


def _qwen_image() -> nn.Module:
    return stirred(diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip


def _qwen_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([0.9]),
        "guidance": None,
        "encoder_hidden_states_mask": None,  # one prompt has no padding
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "img_shapes": [[(1, 4, 4)]],
        "attention_kwargs": {},
        "return_dict": False,
    }


def _qwen_image21() -> nn.Module:
    return stirred(diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=24, mlp_ratio=1, axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip


def _qwen_image21_inputs() -> dict[str, Any]:
    """A step after the first: the text is in the cache that the pipeline keeps."""
    cache = QwenImage21KVCache(4)
    for layer in cache.layer_caches:
        layer.store(torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16))
    return {
        "hidden_states": torch.randn(1, 16, 8),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "encoder_hidden_states_mask": None,  # one prompt has no padding
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.arange(10)[None] >= 6,  # a slot is 2 x 2 tokens of the image
        "attention_kwargs": None,
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "return_dict": False,
    }


def _sana() -> nn.Module:
    return stirred(diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=4,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8,
    ))  # fmt: skip


def _sana_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _prompt(6).long(),
        "timestep": torch.tensor([900.0]),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _sd3() -> nn.Module:
    return stirred(diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=16, pos_embed_max_size=8, dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ))  # fmt: skip


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "pooled_projections": torch.randn(1, 16),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _vq() -> nn.Module:
    return stirred(diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=4, cross_attention_dim=24,
        sample_size=4, num_vector_embeds=9, num_embeds_ada_norm=1000, norm_type="ada_norm",
    ))  # fmt: skip


def _vq_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, 16, dtype=torch.int64),  # entries of a codebook
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "timestep": torch.tensor(900),
        "return_dict": False,
    }


def _z_image() -> nn.Module:
    return stirred(diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=4, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    ))  # fmt: skip


def _z_image_inputs() -> dict[str, Any]:
    return {
        "x": [torch.randn(4, 1, 8, 8)],
        "t": torch.tensor([0.9]),
        "cap_feats": [torch.randn(6, 16)],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


_BLOCKS = ("transformer_blocks",)
_BOTH = ("transformer_blocks", "single_transformer_blocks")

# fmt: off
ZOO: dict[str, Entry] = {
    "JoyImageEditTransformer3DModel":
        Entry(build=_joyimage, inputs=_joyimage_inputs, main=("double_blocks",)),
    "JoyImageEditPlusTransformer3DModel":
        Entry(build=_joyimage_plus, inputs=_joyimage_plus_inputs, main=("double_blocks",)),
    "Krea2Transformer2DModel": Entry(build=_krea2, inputs=_krea2_inputs, main=_BLOCKS),
    "LongCatImageTransformer2DModel":
        Entry(build=_longcat_image, inputs=_longcat_image_inputs, main=_BOTH),
    "Lumina2Transformer2DModel": Entry(build=_lumina2, inputs=_lumina2_inputs, main=("layers",)),
    "LuminaNextDiT2DModel":
        Entry(build=_lumina_next, inputs=_lumina_next_inputs, main=("layers",)),
    "NucleusMoEImageTransformer2DModel":
        Entry(build=_nucleus_moe, inputs=_nucleus_moe_inputs, main=_BLOCKS),
    "OmniGenTransformer2DModel": Entry(build=_omnigen, inputs=_omnigen_inputs, main=("layers",)),
    "OvisImageTransformer2DModel":
        Entry(build=_ovis_image, inputs=_ovis_image_inputs, main=_BOTH),
    "PixArtTransformer2DModel": Entry(build=_pixart, inputs=_pixart_inputs, main=_BLOCKS),
    "PriorTransformer": Entry(build=_prior, inputs=_prior_inputs, main=_BLOCKS),
    "PRXTransformer2DModel": Entry(build=_prx, inputs=_prx_inputs, main=("blocks",)),
    "QwenImageTransformer2DModel":
        Entry(build=_qwen_image, inputs=_qwen_image_inputs, main=_BLOCKS),
    "QwenImage21Transformer2DModel":
        Entry(build=_qwen_image21, inputs=_qwen_image21_inputs, main=_BLOCKS),
    "SanaTransformer2DModel": Entry(build=_sana, inputs=_sana_inputs, main=_BLOCKS),
    "SD3Transformer2DModel": Entry(build=_sd3, inputs=_sd3_inputs, main=_BLOCKS),
    "Transformer2DModel": Entry(build=_vq, inputs=_vq_inputs, main=_BLOCKS),
    "ZImageTransformer2DModel":
        Entry(build=_z_image, inputs=_z_image_inputs, main=("layers",), latent="x", timestep="t"),
}
