"""A text-to-video DiT with a list of spatial and a list of temporal blocks, called pair by pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (scale + 1) + shift


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        out: Tensor = self.to_out(
            torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).flatten(2)
        )
        return out


class Block(nn.Module):
    def __init__(self, dim: int, temporal: bool = False) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.cross_attn = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor, frames: int) -> Tensor:
        batch = x.shape[0]
        a, b, c, d, e, f = (self.scale_shift_table[None] + t.reshape(batch, 6, -1)).chunk(6, dim=1)
        h = modulate(self.norm1(x), a, b).unflatten(1, (frames, -1))
        if self.temporal:
            h = h.transpose(1, 2)
        folded = h.flatten(0, 1)
        h = self.attn(folded, folded).reshape(h.shape)
        if self.temporal:
            h = h.transpose(1, 2)
        x = x + c * h.flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        x = x + f * self.mlp(modulate(self.norm2(x), d, e))
        return x


class STDiT(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, dim, (1, 2, 2), (1, 2, 2))
        self.position = nn.Parameter(torch.randn(1, 1, 16, dim) * 0.1)
        self.t_embedder = nn.Sequential(nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.Sequential(nn.Linear(12, dim), nn.GELU(), nn.Linear(dim, dim))
        self.spatial_blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([Block(dim, temporal=True) for _ in range(depth)])
        self.final = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * 4))

    def forward(self, z: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        batch, _, frames, height, width = z.shape
        x = self.patch(z).flatten(3).permute(0, 2, 3, 1) + self.position
        x = x.flatten(1, 2)
        frequencies = torch.exp(-math.log(10000) * torch.arange(4, device=z.device) / 4)
        angles = timestep[:, None].float() * frequencies
        t = self.t_block(self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1)))
        y = self.y_embedder(text)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, y, t, text_mask, frames)
            x = temporal(x, y, t, text_mask, frames)
        x = self.final(x).view(batch, frames, height // 2, width // 2, 4, 2, 2)
        out: Tensor = x.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, 4, frames, height, width)
        return out
