"""What the zoo knows of a class: how to build it tiny, and how to call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A diffusers class with a tiny random configuration, and one call of it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    """Keyword arguments of one denoising call of one row; random values anew each time."""

    main: tuple[str, ...]
    """Its main stacks: attributes that hold the blocks which do nearly all the work."""

    latent: str = "hidden_states"
    timestep: str = "timestep"

    def model(self, seed: int = 0) -> Any:
        """The model, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().eval()

    def call(self, step: int = 0, steps: int = 8, seed: int = 1) -> dict[str, Any]:
        """The inputs at a step: the latent drifts slowly, the timestep falls to zero.

        Another `seed` is another branch of guidance: the same latent, other conditioning.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            given = self.inputs()
            torch.manual_seed(17)
            first = given[self.latent]
            given[self.latent] = _drift(first, 0.02 * step)
        time = given[self.timestep]
        if isinstance(time, Tensor):
            given[self.timestep] = (time.double() * (1 - step / steps)).to(time.dtype)
        else:
            given[self.timestep] = type(time)(time * (1 - step / steps))
        return given


def stirred(model: nn.Module) -> nn.Module:
    """The model, its all-zero parameters made small random ones, so that every gate is open."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model


def _drift(latent: Any, share: float) -> Any:
    """Noise that is the same for all calls of a request, and goes on slowly."""
    if isinstance(latent, Tensor) and not latent.is_floating_point():  # tokens: some are drawn anew
        moves = torch.rand(latent.shape) < share
        first, other = (torch.randint_like(latent, 8) for _ in range(2))
        return torch.where(moves, other, first)
    if isinstance(latent, Tensor):
        return torch.randn_like(latent) + share * torch.randn_like(latent)
    return type(latent)(_drift(part, share) for part in latent)  # a list of samples
