"""The codec between pixels and latents: linear, fitted, exact to about 35 dB.

It stands where a diffusers video pipeline expects its VAE. A 4x4 patch of RGB pixels
(48 numbers) becomes the 16 principal components of such patches; frames stay apart.
Being linear it costs nothing next to the transformer, which is what the examples are
about.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 4
CHANNELS = 16
WEIGHTS = Path(__file__).with_name("weights") / "codec.safetensors"


class PatchCodec(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A linear autoencoder of 4x4 RGB patches with the face of a diffusers VAE.

    Attributes:
        mean: The mean patch, (48,), pixels in [0, 1].
        basis: Principal directions in columns, (48, 16), orthonormal.
        scale: Divisor of each component, (16,), for latents of about unit variance.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_dim: int = CHANNELS,
        scale_factor_spatial: int = PATCH,
        scale_factor_temporal: int = 1,
        # The pipeline undoes this normalisation before it decodes. Ours sits in
        # `scale`, where the weights have it, so what is left is the identity.
        latents_mean: tuple[float, ...] = (0.0,) * CHANNELS,
        latents_std: tuple[float, ...] = (1.0,) * CHANNELS,
    ) -> None:
        super().__init__()
        pixels = 3 * scale_factor_spatial**2
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.eye(pixels, z_dim))
        self.register_buffer("scale", torch.ones(z_dim))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> PatchCodec:
        """Loads a fitted codec, by default the one the shipped weights belong to."""
        codec: PatchCodec = cls()
        codec.load_state_dict(load_file(path))
        codec.eval()
        return codec

    @classmethod
    def fit(cls, video: torch.Tensor) -> PatchCodec:
        """Fits a codec to the patches of example videos.

        Args:
            video: Pixels in [-1, 1], (batch, 3, frames, height, width).
        """
        codec: PatchCodec = cls()
        patches = _to_patches(video).flatten(0, -2)
        mean = patches.mean(0)
        centred = patches - mean
        _, variance, directions = torch.linalg.svd(centred.T @ centred / len(patches))
        std = variance[:CHANNELS].sqrt()
        # Dividing by sqrt(std) flattens the spectrum half-way: all channels matter to
        # the transformer's loss, the strong ones still more.
        scale = std.sqrt()
        scale = scale * ((std / scale) ** 2).mean().sqrt()
        basis = directions[:CHANNELS].T.contiguous()
        codec.load_state_dict({"mean": mean, "basis": basis, "scale": scale})
        codec.eval()
        return codec

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encodes pixels; returns the latents themselves, as nothing is random here.

        Args:
            video: Pixels in [-1, 1], (batch, 3, frames, height, width).

        Returns:
            Latents (batch, 16, frames, height / 4, width / 4).
        """
        latents = (_to_patches(video) - self.mean) @ self.basis / self.scale
        return latents.movedim(-1, 1)

    def decode(
        self, latents: torch.Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents.

        Args:
            latents: (batch, 16, frames, height, width).
            return_dict: Whether to wrap the result as diffusers does, or in a tuple.

        Returns:
            Pixels in [-1, 1], (batch, 3, frames, 4 * height, 4 * width).
        """
        patches = (latents.movedim(1, -1) * self.scale) @ self.basis.T + self.mean
        frames = pixel_shuffle(patches.movedim(-1, -3), PATCH).clamp(0, 1)
        video = frames.transpose(1, 2) * 2 - 1
        return DecoderOutput(sample=video) if return_dict else (video,)


def _to_patches(video: torch.Tensor) -> torch.Tensor:
    """(batch, 3, F, H, W) in [-1, 1] to (batch, F, H / 4, W / 4, 48) in [0, 1]."""
    frames = (video.transpose(1, 2) + 1) / 2
    return pixel_unshuffle(frames, PATCH).movedim(-3, -1)
