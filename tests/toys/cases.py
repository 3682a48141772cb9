"""How the toys are built and called, and what is to be found in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.replay import Given
from tests.toys.audio_dit import AudioDiT
from tests.toys.controlnet import SelfSteeredDiT, SteeredDiT
from tests.toys.latte import Latte
from tests.toys.mmdit import MMDiT
from tests.toys.staged import CheckpointedDiT, StagedDiT
from tests.toys.stdit import STDiT
from tests.toys.uvit import UViT

STEPS = 8


@dataclasses.dataclass(frozen=True)
class Toy:
    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    time: str
    rest: Callable[[], dict[str, Any]]
    """All inputs but the latent, which comes first, and the timestep, of the other's name."""

    stacks: dict[str, int]
    sublayers: dict[str, int]
    """Residual branches by kind, counted in the source; of joint attention one for each stream."""

    name: str = "x"
    """Of the latent."""

    scale: float = 1.0
    """Of the timestep: it falls from here."""

    def model(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().eval()

    def request(self, branches: tuple[str, ...] = ("cond", "uncond")) -> list[Given]:
        """A latent that drifts, and for each branch other conditioning that stays."""
        generator = torch.Generator().manual_seed(3)
        noise, drift = (torch.randn(self.latent, generator=generator) for _ in range(2))
        with torch.random.fork_rng():
            torch.manual_seed(4)
            rest = {branch: self.rest() for branch in branches}
        return [
            (
                step,
                branch,
                {
                    self.name: noise + 0.05 * step * drift,
                    self.time: torch.tensor([self.scale * (1 - step / STEPS)]),
                    **rest[branch],
                },
            )
            for step in range(STEPS)
            for branch in branches
        ]


def _label() -> dict[str, Any]:
    return {"y": torch.randint(10, (1,))}


def _text(tokens: int = 5) -> dict[str, Any]:
    return {"text": torch.randn(1, tokens, 12)}


TOYS: dict[str, Toy] = {
    "latte": Toy(
        Latte, (1, 3, 4, 8, 8), "t", _label, {"blocks": 4},
        {"spatial-attention": 2, "temporal-attention": 2, "mlp": 4}, scale=1000.0,
    ),
    "stdit": Toy(
        STDiT, (1, 4, 3, 8, 8), "timestep",
        lambda: {**_text(6), "text_mask": torch.arange(6)[None] < torch.randint(2, 6, (1, 1))},
        {"spatial_blocks": 2, "temporal_blocks": 2},
        {"spatial-attention": 2, "temporal-attention": 2, "cross-attention": 4, "mlp": 4},
        name="z", scale=1000.0,
    ),
    "uvit": Toy(
        UViT, (1, 3, 8, 8), "timesteps", _label, {"in_blocks": 2, "out_blocks": 2},
        {"self-attention": 4, "mlp": 4},
    ),
    "mmdit": Toy(
        MMDiT, (1, 12, 8), "timesteps",
        lambda: {"txt": torch.randn(1, 5, 12), "y": torch.randn(1, 10)},
        {"double_blocks": 2, "single_blocks": 2}, {"self-attention": 6, "mlp": 4}, name="img",
    ),
    "mmdit, as much text as image": Toy(
        MMDiT, (1, 12, 8), "timesteps",
        lambda: {"txt": torch.randn(1, 12, 12), "y": torch.randn(1, 10)},
        {"double_blocks": 2, "single_blocks": 2}, {"self-attention": 6, "mlp": 4}, name="img",
    ),
    "audio": Toy(
        AudioDiT, (1, 4, 16), "t",
        lambda: {
            "context": torch.randn(1, 6, 12),
            "context_mask": torch.arange(6)[None] < torch.randint(2, 6, (1, 1)),
            "global_embed": torch.randn(1, 6),
        },
        {"layers": 4}, {"self-attention": 4, "cross-attention": 4, "mlp": 4},
    ),
    "steered": Toy(
        SteeredDiT, (1, 12, 8), "timestep",
        lambda: {"block_residuals": [torch.randn(1, 12, 16) for _ in range(2)]},
        {"blocks": 4}, {"self-attention": 4, "mlp": 4},
    ),
    "steered by itself": Toy(
        SelfSteeredDiT, (1, 12, 8), "timestep",
        lambda: {"control": torch.randn(1, 12, 6)},
        {"control_blocks": 2, "blocks": 4}, {"self-attention": 6, "mlp": 6},
    ),
    "staged": Toy(
        StagedDiT, (1, 12, 8), "t", _text, {"image_refiner": 2, "stages": 2},
        {"self-attention": 6, "mlp": 6}, name="image",
    ),
    "checkpointed": Toy(
        CheckpointedDiT, (1, 12, 8), "t", _text, {"image_refiner": 2, "layers": 4},
        {"self-attention": 6, "mlp": 6}, name="image",
    ),
}  # fmt: skip
