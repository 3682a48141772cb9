"""Tiny random configurations of all transformers of diffusers that a denoising loop calls."""

from __future__ import annotations

from tests.zoo import audio_and_others, images_a_to_i, images_j_to_z, videos_a_to_k, videos_l_to_z
from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {
    **images_a_to_i.ZOO,
    **images_j_to_z.ZOO,
    **videos_a_to_k.ZOO,
    **videos_l_to_z.ZOO,
    **audio_and_others.ZOO,
}
