"""SRDiffusion: sketch with a large model, render with a small one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import nn

from cachepass.errors import PolicyError
from cachepass.runtime.policy import NamedPolicy, Policy, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRDiffusion:
    """The pipeline's own model makes the first steps, a small one of its latent space the rest.

    Both follow one scheduler, with its solver's history, the same guidance and prompts. The
    switch comes when the latent has settled: ``d_t = tanh(rel(x_t, x_(t-1)))`` and
    ``0 < d_t - d_(t-1) < delta``, after `min_steps`, and at `latest` in any case. Either model may
    be cached as well. Source: SRDiffusion (arXiv 2505.19151, section 3.3); delta from its text
    [2nd], the bounds of the switch from forks of its code.
    """

    name: ClassVar[str] = "srdiffusion"

    render: nn.Module
    """The small model: called like the pipeline's, in the same latent space."""

    sketch_policy: str | Policy | NamedPolicy = "compute"
    """Of the pipeline's own model."""

    render_policy: str | Policy | NamedPolicy = "compute"
    """Of the small model."""

    delta: float = 0.01
    """Change of d below which the sketch has settled [2nd]."""

    rising: bool = True
    """Whether d has to grow in that step; forks differ."""

    measured: Literal["latent", "output"] = "latent"
    """What d is taken of: the noisy latent, or the model's output; forks differ."""

    min_steps: int = 5
    """Steps of the large model at least [forks]."""

    latest: float = 0.6
    """Share of the steps after which the small model takes over in any case: 30 of 50 [forks]."""

    def __post_init__(self) -> None:
        if not isinstance(self.render, nn.Module):
            raise PolicyError(
                f"SRDiffusion(`render`=...): must be a torch.nn.Module, got "
                f"{type(self.render).__name__}"
            )
        check(self.delta > 0, self, "delta", "above 0")
        check(self.measured in ("latent", "output"), self, "measured", "'latent' or 'output'")
        check(self.min_steps >= 1, self, "min_steps", "at least 1")
        check(0 < self.latest <= 1, self, "latest", "a share above 0 and up to 1")
