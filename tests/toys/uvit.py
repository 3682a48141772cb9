"""A U-ViT: the blocks of the first half hand long skips to those of the second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2, skip: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim * 2), nn.Linear(dim * 2, dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(h.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


class UViT(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4, patch: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.time_embed = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_emb = nn.Embedding(classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + 16, dim) * 0.1)
        self.in_blocks = nn.ModuleList([Block(dim) for _ in range(depth // 2)])
        self.mid_block = Block(dim)
        self.out_blocks = nn.ModuleList([Block(dim, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * patch**2)
        self.final_layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        time = self.time_embed(timesteps[:, None].float()).unsqueeze(1)
        label = self.label_emb(y).unsqueeze(1)
        x = torch.cat((label, time, x), dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        x = x.transpose(1, 2).unflatten(1, (channels * self.patch**2,))
        x = F.fold(x, (height, width), self.patch, stride=self.patch)
        out: Tensor = self.final_layer(x)
        return out
