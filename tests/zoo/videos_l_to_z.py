"""Video models, L to Z."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from tests.models import TINY, WAN
from tests.zoo.entry import Entry, stirred


def _video(channels: int, frames: int = 2) -> Tensor:
    return torch.randn(1, channels, frames, 8, 8)


def _mask(length: int, shortest: int = 2) -> Tensor:
    """Which tokens of a prompt are not padding."""
    return (torch.arange(length)[None] < torch.randint(shortest, length, (1, 1))).long()


# ------------------------------------------------------------------ Latte, LTX-2, MiniMax


def _latte() -> nn.Module:
    return stirred(diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=16, video_length=2,
    ))  # fmt: skip


def _latte_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _video(4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([900]),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _ltx2() -> nn.Module:
    return stirred(diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=2, caption_channels=16, rope_type="split",
    ))  # fmt: skip


def _ltx2_inputs() -> dict[str, Any]:
    frames, height, width, sounds = 2, 4, 4, 5
    time = torch.tensor([900.0])
    rows = torch.arange(frames * height * width)
    corner = torch.stack([rows // (height * width), rows // width % height, rows % width])
    video = (
        torch.stack([corner, corner + 1], dim=-1)[None]
        * torch.tensor([8.0, 32.0, 32.0])[:, None, None]
    )
    video[:, 0] = (video[:, 0] - 7).clamp(min=0) / 24
    start = torch.arange(float(sounds))
    audio = (torch.stack([start, start + 1], dim=-1)[None, None] * 4 - 3).clamp(min=0) / 100
    return {
        "hidden_states": torch.randn(1, frames * height * width, 8),
        "audio_hidden_states": torch.randn(1, sounds, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "audio_encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": time,
        "sigma": time,
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "audio_encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": sounds,
        "video_coords": video,
        "audio_coords": audio,
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _minimax_h3() -> nn.Module:
    return stirred(diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=14, hidden_size=24, num_layers=4,
        num_refiner_layers=2, ffn_dim=32, in_channels=4, audio_in_channels=6, text_dim=16,
        freq_dim=16, time_embed_hidden_dim=24, time_embed_dim=12, rope_freq_dim=2,
    ))  # fmt: skip


def _minimax_h3_inputs() -> dict[str, Any]:
    text, sounds, frames, rows = 5, 3, 2, 4  # two channels of sound, rows of a 4x4 latent
    position = torch.zeros(text + 2 * sounds + frames * rows, 3, dtype=torch.float64)
    position[:text, 0] = torch.arange(text)
    audio, video = slice(text, text + 2 * sounds), slice(text + 2 * sounds, None)
    position[audio, 0] = text + torch.arange(sounds).repeat(2)
    position[audio, 2] = torch.tensor([-1.0, 1.0]).repeat_interleave(sounds).double()
    position[video, 0] = text + 5 / 3 * torch.arange(frames).repeat_interleave(rows)
    position[video, 1:] = (
        torch.cartesian_prod(*2 * [torch.tensor([-1.0, 1.0])]).repeat(frames, 1).double()
    )
    tags = torch.zeros(len(position), dtype=torch.long)
    tags[audio], tags[video] = 2, 1
    order = torch.arange(len(position))
    return {
        "hidden_states": torch.randn(1, frames * rows, 4 * 4),
        "audio_hidden_states": torch.randn(1, 2 * sounds, 6),
        "encoder_hidden_states": torch.randn(1, text, 16),
        "timestep": torch.tensor([900.0, 1000.0]),  # media, and the text, which is clean
        "timestep_indices": (tags == 0).long(),
        "attention_kwargs": None,
        "return_dict": False,
        "position_ids": position,
        "token_tags": tags,
        "video_indices": order[video],
        "audio_indices": order[audio],
        "text_indices": order[:text],
    }


# --------------------------------------------------------------------- Motif, Sana, SkyReels


def _motif() -> nn.Module:
    return stirred(diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_single_layers=4, num_decoder_layers=2, mlp_ratio=2.0,
        text_embed_dim=16, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ))  # fmt: skip


def _motif_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _video(9),  # latents, those of a condition, its mask
        "timestep": torch.tensor([900.0]),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _mask(6).bool(),
    }


def _sana_video() -> nn.Module:
    return stirred(diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=4, num_cross_attention_heads=2, cross_attention_head_dim=12,
        cross_attention_dim=24, caption_channels=16, sample_size=8, rope_max_seq_len=32,
    ))  # fmt: skip


def _sana_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _video(4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _mask(6),
        "timestep": torch.tensor([900.0]),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _sana_wm() -> nn.Module:
    return stirred(diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=4, hidden_size=48, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=24, chunk_plucker_channels=12, image_size=64, caption_channels=16,
        mlp_ratio=2.0,
    ))  # fmt: skip


def _sana_wm_inputs() -> dict[str, Any]:
    """A camera that moves to the side; the first frame is given, so that its timestep is 0."""
    frames = 3
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, 0, 3] = torch.rand(()) * torch.arange(frames)
    lens = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(frames, 4)
    return {
        "hidden_states": torch.randn(1, 4, frames, 4, 4),
        "timestep": torch.tensor([[[0.0, 900.0, 900.0]]]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[32.0, 32.0]])},
        "mask": _mask(6),
        "camera_conditions": torch.cat([pose.flatten(1), lens], dim=-1)[None],
        "chunk_plucker": torch.randn(1, 12, frames, 4, 4),
    }


def _sana_wm_refiner() -> nn.Module:
    return stirred(diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=4, caption_channels=16, rope_type="split",
    ))  # fmt: skip


def _sana_wm_refiner_inputs() -> dict[str, Any]:
    """A block of frames that attends to keys and values of the first frame and the last block."""
    first, tokens = 16, 32

    def turns(start: int, count: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(start, start + count)[:, None] / 10.0 ** torch.arange(6)
        return angle.cos().expand(1, 2, -1, -1), angle.sin().expand(1, 2, -1, -1)

    cache = SanaWMRefinerKVCache(4)
    cache.sink_pe = turns(0, first)
    for layer in cache.layer_caches:
        layer.store_sink(torch.randn(1, first, 24), torch.randn(1, first, 24))
        layer.store_history(torch.randn(1, tokens, 24), torch.randn(1, tokens, 24))
    return {
        "hidden_states": torch.randn(1, tokens, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.full((1, tokens), 900.0),
        "video_rotary_emb": turns(first + tokens, tokens),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


def _skyreels() -> nn.Module:
    return stirred(diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32,
    ))  # fmt: skip


def _text_to_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _video(4),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


# ------------------------------------------------------------------------------------- Wan


def _wan_animate() -> nn.Module:
    sizes = {str(2**i): 4 for i in range(2, 5)}
    return stirred(diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, image_dim=16,
        added_kv_proj_dim=24, rope_max_seq_len=32, motion_encoder_channel_sizes=sizes,
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    ))  # fmt: skip


def _wan_animate_inputs() -> dict[str, Any]:
    return {
        **_text_to_video_inputs(),
        "hidden_states": _video(12, frames=3),  # latents, those of the reference, its mask
        "encoder_hidden_states_image": torch.randn(1, 5, 16),
        "pose_hidden_states": _video(4, frames=2),
        "face_pixel_values": torch.rand(1, 3, 5, 16, 16) * 2 - 1,
        "motion_encode_batch_size": None,
    }


def _wan_animate_2() -> nn.Module:
    return stirred(diffusers.WanAnimate2Transformer3DModel(
        text_len=6, in_dim=12, dim=32, ffn_dim=32, freq_dim=32, text_dim=16, out_dim=4,
        num_heads=2, num_layers=4,
    ))  # fmt: skip


def _wan_animate_2_inputs() -> dict[str, Any]:
    """A segment that attends to keys and values which a first pass left in a cache."""
    cache = WanAnimate2KVCache(4)
    for layer in range(4):
        cache.get(layer).store(torch.randn(1, 2 * 4 * 4, 2, 16), torch.randn(1, 2 * 4 * 4, 2, 16))
    return {
        "hidden_states": [_video(4, frames=3)[0]],
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": [torch.randn(5, 16)],
        "condition_latents": [_video(8, frames=3)[0]],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 3 * 4 * 4,
        "reference_grid_sizes": torch.tensor([[2, 4, 4]]),
        "origin_len": 5,
        "origin_area": [64, 64],
        "is_uncondtion": False,
        "encoder_hidden_states_image": torch.randn(1, 5, 1280),
        "return_dict": False,
    }


def _wan_vace() -> nn.Module:
    return stirred(diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32,
        vace_layers=[0, 2], vace_in_channels=12,
    ))  # fmt: skip


def _wan_vace_inputs() -> dict[str, Any]:
    return {
        **_text_to_video_inputs(),
        "control_hidden_states": _video(12),
        "control_hidden_states_scale": torch.ones(2),
    }


_BLOCKS, _TRANSFORMER_BLOCKS = ("blocks",), ("transformer_blocks",)

ZOO: dict[str, Entry] = {
    "LatteTransformer3DModel": Entry(
        build=_latte,
        inputs=_latte_inputs,
        main=("transformer_blocks", "temporal_transformer_blocks"),
    ),
    "LTXVideoTransformer3DModel": Entry(
        build=lambda: stirred(TINY["ltx"].build()),
        inputs=TINY["ltx"].inputs,
        main=_TRANSFORMER_BLOCKS,
    ),
    "LTX2VideoTransformer3DModel": Entry(
        build=_ltx2, inputs=_ltx2_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "MiniMaxH3Transformer3DModel": Entry(
        build=_minimax_h3, inputs=_minimax_h3_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "MochiTransformer3DModel": Entry(
        build=lambda: stirred(TINY["mochi"].build()),
        inputs=TINY["mochi"].inputs,
        main=_TRANSFORMER_BLOCKS,
    ),
    "MotifVideoTransformer3DModel": Entry(
        build=_motif,
        inputs=_motif_inputs,
        main=("transformer_blocks", "single_transformer_blocks"),
    ),
    "SanaVideoTransformer3DModel": Entry(
        build=_sana_video, inputs=_sana_video_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "SanaWMTransformer3DModel": Entry(build=_sana_wm, inputs=_sana_wm_inputs, main=_BLOCKS),
    "SanaWMLTX2RefinerTransformer3DModel": Entry(
        build=_sana_wm_refiner, inputs=_sana_wm_refiner_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "SkyReelsV2Transformer3DModel": Entry(
        build=_skyreels, inputs=_text_to_video_inputs, main=_BLOCKS
    ),
    "WanTransformer3DModel": Entry(
        build=lambda: stirred(WAN.build()), inputs=WAN.inputs, main=_BLOCKS
    ),
    "WanAnimateTransformer3DModel": Entry(
        build=_wan_animate, inputs=_wan_animate_inputs, main=_BLOCKS
    ),
    "WanAnimate2Transformer3DModel": Entry(
        build=_wan_animate_2, inputs=_wan_animate_2_inputs, main=_BLOCKS
    ),
    "WanVACETransformer3DModel": Entry(build=_wan_vace, inputs=_wan_vace_inputs, main=_BLOCKS),
}
