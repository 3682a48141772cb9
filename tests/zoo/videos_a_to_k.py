"""Video models, A to K."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

from tests.models import TINY
from tests.zoo.entry import Entry, stirred


def _prompt(length: int) -> Tensor:
    """Which tokens of a padded prompt are real: another number for each prompt."""
    return torch.arange(length)[None] < torch.randint(3, length, (1, 1))


def _allegro() -> nn.Module:
    return stirred(diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=4, cross_attention_dim=24, sample_height=8, sample_width=8, sample_frames=2,
        caption_channels=16,
    ))  # fmt: skip


def _allegro_inputs() -> dict[str, Any]:
    *freqs, time, rows, columns = get_3d_rotary_pos_embed_allegro(
        12, ((0, 0), (4, 4)), (4, 4), temporal_size=2, interpolation_scale=(2.2, 2.0, 2.0)
    )
    places = torch.cartesian_prod(time.long(), rows.long(), columns.long())
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 1, 6, 16),
        "encoder_attention_mask": _prompt(6).long(),
        "timestep": torch.tensor([900]),
        "image_rotary_emb": (tuple(freqs), tuple(places.T.reshape(3, 1, -1).contiguous())),
        "return_dict": False,
    }


def _anyflow() -> nn.Module:
    return stirred(diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32,
    ))  # fmt: skip


def _anyflow_inputs() -> dict[str, Any]:
    """From a timestep to a later one, each given for every frame."""
    return {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "timestep": torch.full((1, 2), 900.0),
        "r_timestep": torch.full((1, 2), 50.0),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _anyflow_far() -> nn.Module:
    return stirred(diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32,
        full_chunk_limit=2, chunk_partition=(1, 1, 1),
    ))  # fmt: skip


def _anyflow_far_inputs() -> dict[str, Any]:
    """The last of three chunks of a frame: of the others, one is cached whole, one compressed."""
    full, compressed = (2, 1, 2, 2 * 16, 16), (2, 1, 2, 2 * 4, 16)
    return {
        "hidden_states": torch.randn(1, 1, 4, 8, 8),
        "timestep": torch.full((1, 1), 900.0),
        "r_timestep": torch.full((1, 1), 50.0),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "attention_kwargs": None,
        "return_dict": False,
        "chunk_partition": [1, 1, 1],
        "kv_cache": {
            block: {"full_cache": torch.randn(full), "compressed_cache": torch.randn(compressed)}
            for block in range(4)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def _chronoedit() -> nn.Module:
    return stirred(diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, image_dim=20, added_kv_proj_dim=24,
        rope_max_seq_len=32,
    ))  # fmt: skip


def _chronoedit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4 + 4 + 4, 3, 8, 8),  # latent, mask, image
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "encoder_hidden_states_image": torch.randn(1, 4, 20),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cogvideox() -> nn.Module:
    return stirred(TINY["cogvideox"].build())


def _cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([900]),
        "image_rotary_emb": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _consisid() -> nn.Module:
    return stirred(diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=4, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=6, use_rotary_positional_embeddings=True,
        is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2,
        LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2,
        LFE_num_id_token=2, LFE_num_querie=4, LFE_output_dim=21, LFE_ff_mult=2, LFE_num_scale=2,
    ))  # fmt: skip


def _consisid_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 4 + 4, 8, 8),  # latent, image
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([900]),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 2),
        "attention_kwargs": None,
        "return_dict": False,
        "id_vit_hidden": [torch.randn(1, 5, 16), torch.randn(1, 5, 16)],
        "id_cond": torch.randn(1, 12),
    }


def _cosmos() -> nn.Module:
    return stirred(diffusers.CosmosTransformer3DModel(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=4, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16),
        concat_padding_mask=False,  # which would need torchvision
    ))  # fmt: skip


def _cosmos_inputs() -> dict[str, Any]:
    """A timestep for each frame: the first is given."""
    first = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": 0.0001 * first + 0.9 * (1 - first),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "fps": 16,
        "condition_mask": first.expand(1, 1, 2, 8, 8),
        "padding_mask": torch.zeros(1, 1, 64, 64),
        "return_dict": False,
    }


def _cosmos3() -> nn.Module:
    return stirred(diffusers.Cosmos3OmniTransformer(
        head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, num_attention_heads=2,
        num_hidden_layers=4, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32,
        rope_axes_dim=(2, 1, 1),
    ))  # fmt: skip


def _cosmos3_inputs() -> dict[str, Any]:
    """Text and video in one sequence of 5 + 2 x 2 x 2 tokens."""
    text = torch.arange(5.0).expand(3, -1)
    video = torch.cartesian_prod(15005 + torch.arange(2.0), torch.arange(2.0), torch.arange(2.0))
    return {
        "input_ids": torch.randint(32, (5,)),
        "text_indexes": torch.arange(5),
        "position_ids": torch.cat([text, video.T], dim=1),
        "und_len": 5,
        "sequence_length": 13,
        "vision_tokens": [torch.randn(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(5, 13),
        "vision_mse_loss_indexes": torch.arange(5, 13),
        "vision_timesteps": torch.full((8,), 900.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
        "return_dict": False,
    }


def _easyanimate() -> nn.Module:
    return stirred(diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        num_layers=4, mmdit_layers=2, time_embed_dim=8, text_embed_dim=16,
        add_norm_text_encoder=True,
    ))  # fmt: skip


def _easyanimate_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
    }


def _helios() -> nn.Module:
    return stirred(diffusers.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_dim=(4, 4, 4),
    ))  # fmt: skip


def _helios_inputs() -> dict[str, Any]:
    """Two new frames after 1 + 4 + 2 + 1 of history, the older the coarser."""
    prefix, long, mid, short, new = torch.arange(10).split([1, 4, 2, 1, 2])
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "indices_hidden_states": new[None],
        "indices_latents_history_short": torch.cat([prefix, short])[None],
        "indices_latents_history_mid": mid[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": torch.randn(1, 4, 2, 8, 8),
        "latents_history_mid": torch.randn(1, 4, 2, 8, 8),
        "latents_history_long": torch.randn(1, 4, 4, 8, 8),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan() -> nn.Module:
    return stirred(TINY["hunyuan"].build())


def _hunyuan15() -> nn.Module:
    return stirred(diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=4,
        num_refiner_layers=2, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
        rope_axes_dim=(2, 4, 4), task_type="t2v",
    ))  # fmt: skip


def _hunyuan15_inputs() -> dict[str, Any]:
    """Without an image: its embedding is all zero."""
    return {
        "hidden_states": torch.randn(1, 4 + 4 + 1, 2, 4, 4),  # latent, image, mask
        "image_embeds": torch.zeros(1, 3, 8),
        "timestep": torch.tensor([900.0]),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _prompt(6).float(),
        "encoder_hidden_states_2": torch.randn(1, 4, 12),
        "encoder_attention_mask_2": _prompt(4).float(),
    }


def _framepack() -> nn.Module:
    return stirred(diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=2, num_single_layers=2, num_refiner_layers=2, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=12,
        has_clean_x_embedder=True,
    ))  # fmt: skip


def _framepack_inputs() -> dict[str, Any]:
    """The last section backwards: the image, two new frames, 1 + 2 + 4 frames that follow."""
    image, new, once, twice, four = torch.arange(10).split([1, 2, 1, 2, 4])
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _prompt(6).float(),
        "pooled_projections": torch.randn(1, 8),
        "image_embeds": torch.randn(1, 3, 12),
        "indices_latents": new,
        "guidance": torch.tensor([6000.0]),
        "latents_clean": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_clean": torch.cat([image, once]),
        "latents_history_2x": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_history_2x": twice,
        "latents_history_4x": torch.randn(1, 4, 4, 8, 8),
        "indices_latents_history_4x": four,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _kandinsky5() -> nn.Module:
    return stirred(diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=8, out_visual_dim=4,
        model_dim=16, ff_dim=32, num_text_blocks=2, num_visual_blocks=4, axes_dims=(4, 2, 2),
        visual_cond=True,
    ))  # fmt: skip


def _kandinsky5_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 8, 8, 4 + 4 + 1),  # latent, image, mask
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([900.0]),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(6),
        "scale_factor": (1, 3.16, 3.16),
        "sparse_params": None,
        "return_dict": False,
    }


def _kandinsky6() -> nn.Module:
    return stirred(diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=8,
        model_dim=16, ff_dim=32, num_text_blocks=2, num_visual_blocks=4, axes_dims=(4, 2, 2),
        in_audio_dim=6, out_audio_dim=6, text_token_padding=True, ca_rope=True, cross_gates=True,
        fix_modulation=True,
    ))  # fmt: skip


def _kandinsky6_inputs() -> dict[str, Any]:
    """Video and audio together."""
    return {
        "hidden_states": torch.randn(1, 2, 8, 8, 4 + 4 + 1),  # latent, image, mask
        "audio_hidden_states": torch.randn(1, 5, 6),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([900.0]),
        "visual_rope_pos": None,
        "encoder_attention_mask": _prompt(6),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _kandinsky6_sr() -> nn.Module:
    return stirred(diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=8, time_dim=8, model_dim=32, ff_dim=32,
        num_visual_blocks=4, axes_dims=(4, 6, 6), nabla_window=(3, 3, 3),
    ))  # fmt: skip


def _kandinsky6_sr_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 8, 8, 4 + 4 + 1),  # latent, anchor, mask
        "timestep": torch.tensor([900.0]),
        "return_dict": False,
    }


_TWO = ("transformer_blocks", "single_transformer_blocks")

ZOO: dict[str, Entry] = {
    "AllegroTransformer3DModel": Entry(
        build=_allegro, inputs=_allegro_inputs, main=("transformer_blocks",)
    ),
    "AnyFlowTransformer3DModel": Entry(build=_anyflow, inputs=_anyflow_inputs, main=("blocks",)),
    "AnyFlowFARTransformer3DModel": Entry(
        build=_anyflow_far, inputs=_anyflow_far_inputs, main=("blocks",)
    ),
    "ChronoEditTransformer3DModel": Entry(
        build=_chronoedit, inputs=_chronoedit_inputs, main=("blocks",)
    ),
    "CogVideoXTransformer3DModel": Entry(
        build=_cogvideox, inputs=_cogvideox_inputs, main=("transformer_blocks",)
    ),
    "ConsisIDTransformer3DModel": Entry(
        build=_consisid, inputs=_consisid_inputs, main=("transformer_blocks",)
    ),
    "CosmosTransformer3DModel": Entry(
        build=_cosmos, inputs=_cosmos_inputs, main=("transformer_blocks",)
    ),
    "Cosmos3OmniTransformer": Entry(
        build=_cosmos3,
        inputs=_cosmos3_inputs,
        main=("layers",),
        latent="vision_tokens",
        timestep="vision_timesteps",
    ),
    "EasyAnimateTransformer3DModel": Entry(
        build=_easyanimate, inputs=_easyanimate_inputs, main=("transformer_blocks",)
    ),
    "HeliosTransformer3DModel": Entry(build=_helios, inputs=_helios_inputs, main=("blocks",)),
    "HunyuanVideoTransformer3DModel": Entry(
        build=_hunyuan, inputs=TINY["hunyuan"].inputs, main=_TWO
    ),
    "HunyuanVideo15Transformer3DModel": Entry(
        build=_hunyuan15, inputs=_hunyuan15_inputs, main=("transformer_blocks",)
    ),
    "HunyuanVideoFramepackTransformer3DModel": Entry(
        build=_framepack, inputs=_framepack_inputs, main=_TWO
    ),
    "Kandinsky5Transformer3DModel": Entry(
        build=_kandinsky5, inputs=_kandinsky5_inputs, main=("visual_transformer_blocks",)
    ),
    "Kandinsky6Transformer3DModel": Entry(
        build=_kandinsky6, inputs=_kandinsky6_inputs, main=("visual_transformer_blocks",)
    ),
    "Kandinsky6SRTransformer3DModel": Entry(
        build=_kandinsky6_sr, inputs=_kandinsky6_sr_inputs, main=("visual_transformer_blocks",)
    ),
}
