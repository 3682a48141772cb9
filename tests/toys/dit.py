"""A class-conditional image DiT: the smallest of the toys, which many tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        h = self.norm1(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(h)
        x = x + self.mlp(self.norm2(x))
        return x


class ToyDiT(nn.Module):
    """A class-conditional image DiT, written without a thought of cachepass."""

    def __init__(self, dim: int = 16, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, dim, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)
        self.layers = nn.ModuleList(ToyBlock(dim) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * 2 * 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        tokens = self.patchify(x).flatten(2).transpose(1, 2) + self.position[:, : h * w]
        c = self.time(t[:, None].float()) + self.label(y)
        for layer in self.layers:
            tokens = layer(tokens, c)
        out: Tensor = self.out(tokens).unflatten(1, (h, w)).unflatten(-1, (3, 2, 2))
        out = out.permute(0, 3, 1, 4, 2, 5)
        return out.flatten(4, 5).flatten(2, 3)
