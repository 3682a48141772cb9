"""A DiT that is steered from outside: a residual for each block, or hints it makes itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 2), nn.SiLU(), nn.Linear(dim * 2, dim))
        self.modulation = nn.Parameter(torch.randn(1, 4, dim) * 0.1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale, gate, gate2 = (self.modulation + e.unsqueeze(1)).chunk(4, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + gate * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + gate2 * self.ffn(self.norm2(x))
        return x


class SteeredDiT(nn.Module):
    """Takes what a ControlNet made: residuals, each for as many blocks."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, dim)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, 8)

    def forward(
        self, x: Tensor, timestep: Tensor, block_residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        e = self.time(timestep[:, None])
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, e)
            if block_residuals is not None:
                x = x + block_residuals[i * len(block_residuals) // len(self.blocks)]
        out: Tensor = self.head(x)
        return out


class ControlBlock(Block):
    """A block of the control branch: goes on with its stream, and makes a hint of it."""

    def __init__(self, dim: int, first: bool) -> None:
        super().__init__(dim)
        self.before = nn.Linear(dim, dim) if first else None
        self.after = nn.Linear(dim, dim)

    def forward(self, c: Tensor, e: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.before is not None:
            c = self.before(c) + x
        c = super().forward(c, e)
        return self.after(c), c


class SelfSteeredDiT(SteeredDiT):
    """Runs its control branch first and adds a hint after every other block."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__(dim, depth)
        self.control_embed = nn.Linear(6, dim)
        self.control_blocks = nn.ModuleList(
            [ControlBlock(dim, first=i == 0) for i in range(depth // 2)]
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, control: Tensor, scale: float = 1.0
    ) -> Tensor:
        e = self.time(timestep[:, None])
        x, c = self.embed(x), self.control_embed(control)
        hints = []
        for control_block in self.control_blocks:
            hint, c = control_block(c, e, x)
            hints.append(hint)
        for i, block in enumerate(self.blocks):
            x = block(x, e)
            if i % 2 == 0:
                x = x + hints[i // 2] * scale
        out: Tensor = self.head(x)
        return out
