"""Audio models, and what is neither image, video nor audio."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from tests.zoo.entry import Entry, stirred


def _mask(length: int, shortest: int = 2) -> Tensor:
    """Which tokens are not padding."""
    return torch.arange(length)[None] < torch.randint(shortest, length, (1, 1))


# ----------------------------------------------------------------------------------- audio


def _ace_step() -> nn.Module:
    return stirred(diffusers.AceStepTransformer1DModel(
        hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, in_channels=12, audio_acoustic_hidden_dim=4,
        sliding_window=2, encoder_hidden_size=16,
    ))  # fmt: skip


def _ace_step_inputs() -> dict[str, Any]:
    time = torch.tensor([0.9])
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "timestep": time,
        "timestep_r": time.clone(),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "context_latents": torch.randn(1, 16, 8),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat_audio() -> nn.Module:
    return stirred(diffusers.LongCatAudioDiTTransformer(
        dit_dim=24, dit_depth=4, dit_heads=2, dit_text_dim=16, latent_dim=4, ff_mult=2.0,
    ))  # fmt: skip


def _longcat_audio_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 12, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": _mask(6),
        "timestep": torch.tensor([0.9]),
        "attention_mask": torch.ones(1, 12, dtype=torch.bool),
        "latent_cond": torch.zeros(1, 12, 4),
        "return_dict": False,
    }


def _minimax_music() -> nn.Module:
    return stirred(diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4, condition_dim=16, num_layers=4, num_attention_heads=2,
        attention_head_dim=12, ff_inner_dim=32, rotary_dim=8, fourier_embedding_dim=16,
    ))  # fmt: skip


def _minimax_music_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 12),
        "timestep": torch.tensor([0.9]),
        "return_dict": False,
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }


def _stable_audio() -> nn.Module:
    return stirred(diffusers.StableAudioDiTModel(
        sample_size=12, in_channels=4, num_layers=4, attention_head_dim=12,
        num_attention_heads=2, num_key_value_attention_heads=1, out_channels=4,
        cross_attention_dim=12, time_proj_dim=16, global_states_input_dim=16,
        cross_attention_input_dim=16,
    ))  # fmt: skip


def _stable_audio_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 12),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "global_hidden_states": torch.randn(1, 1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(
            6, 12 + 1, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }


def _stable_audio_3() -> nn.Module:
    return stirred(diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=32, depth=4, num_heads=2, cond_token_dim=16,
        global_cond_dim=16, local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2.0,
        num_memory_tokens=4,
    ))  # fmt: skip


def _stable_audio_3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 12),
        "timestep": torch.tensor([0.9]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "global_hidden_states": torch.randn(1, 16),
        "encoder_attention_mask": _mask(6),
        "return_dict": False,
    }


def _t5_film() -> nn.Module:
    return stirred(diffusers.T5FilmDecoder(
        input_dims=4, targets_length=12, d_model=24, num_layers=4, num_heads=2, d_kv=12, d_ff=32,
    ))  # fmt: skip


def _t5_film_inputs() -> dict[str, Any]:
    """A spectrogram, given notes and the spectrogram before it."""
    return {
        "encodings_and_masks": [(torch.randn(1, n, 24), _mask(n)) for n in (6, 12)],
        "decoder_input_tokens": torch.randn(1, 12, 4),
        "decoder_noise_time": torch.tensor([0.9]),
    }


# --------------------------------------------------------------------------------- proteins


def _proteina() -> nn.Module:
    return stirred(diffusers.RFD4ProteinaTransformer(
        nlayers=4, token_dim=24, nheads=2, dim_cond=16, pair_repr_dim=12, latent_dim=4,
        token_type_emb_dim=4, cath_emb_dim=4, t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=6,
        tri_mult_c=8, num_sequence_classes=9,
    ))  # fmt: skip


def _proteina_inputs() -> dict[str, Any]:
    """Seven residues of which the first two are given, and a place that is padding."""
    places, atoms = (1, 8), (1, 8, 37)
    padding = torch.arange(8)[None] < 7

    def some(shape: tuple[int, ...], kinds: int) -> Tensor:
        return torch.randint(0, kinds, shape)

    per_atom = {"hbond": 4, "pistack": 2, "pication": 4, "saltbridge": 2, "hydrophobic": 2}
    return {
        "bb_ca": torch.randn(1, 8, 3),
        "local_latents": torch.randn(1, 8, 4),
        "bb_ca_time": torch.tensor([0.9]),
        "local_latents_time": torch.tensor([0.8]),
        "padding_mask": padding,
        "token_type": some(places, 7),
        "atom37_mask": some(atoms, 2).bool(),
        "conditioning": {
            **{f"condition_{name}_1_atom": some(atoms, n) for name, n in per_atom.items()},
            "condition_metal-coord_1_atom": some(atoms, 2),
            "condition_secondary-structure_1_residue": some(places, 4),
            "condition_index-group_1_token": some(places, 3),
            "condition_cath-label_1_residue": some((*places, 3), 5),
            "token_bond_path_length": some((1, 8, 8), 8),
            "molecule_iid": some(places, 2),
            "molecule_entity_id": some(places, 2),
            "is_in_context_conditioning": torch.arange(8)[None] < 2,
            "supports_local_latent": padding,
        },
        "recycle_depth": 1,
        "attention_kwargs": None,
        "return_dict": False,
    }


_TRANSFORMER_BLOCKS = ("transformer_blocks",)

ZOO: dict[str, Entry] = {
    "AceStepTransformer1DModel": Entry(build=_ace_step, inputs=_ace_step_inputs, main=("layers",)),
    "LongCatAudioDiTTransformer": Entry(
        build=_longcat_audio, inputs=_longcat_audio_inputs, main=("blocks",)
    ),
    "MiniMaxMusic3Transformer1DModel": Entry(
        build=_minimax_music, inputs=_minimax_music_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "StableAudioDiTModel": Entry(
        build=_stable_audio, inputs=_stable_audio_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "StableAudio3DiTModel": Entry(
        build=_stable_audio_3, inputs=_stable_audio_3_inputs, main=_TRANSFORMER_BLOCKS
    ),
    "T5FilmDecoder": Entry(
        build=_t5_film,
        inputs=_t5_film_inputs,
        main=("decoders",),
        latent="decoder_input_tokens",
        timestep="decoder_noise_time",
    ),
    "RFD4ProteinaTransformer": Entry(
        build=_proteina,
        inputs=_proteina_inputs,
        main=("transformer_layers",),
        latent="bb_ca",
        timestep="bb_ca_time",
    ),
}
