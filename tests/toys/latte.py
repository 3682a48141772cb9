"""A video DiT whose blocks look at the places of a frame and at the frames of a place in turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


class Latte(nn.Module):
    """Even blocks are spatial, odd blocks temporal."""

    def __init__(self, dim: int = 16, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        self.temp_embed = nn.Parameter(torch.randn(1, 8, dim) * 0.1)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 2 * 2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, frames, channels, height, width = x.shape
        x = self.x_embedder(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.pos_embed
        places = x.shape[1]
        c = self.t_embedder(t[:, None].float() / 1000) + self.y_embedder(y)
        c_spatial = c.repeat_interleave(frames, dim=0)
        c_temporal = c.repeat_interleave(places, dim=0)
        for i in range(0, len(self.blocks), 2):
            x = self.blocks[i](x, c_spatial)
            x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            if i == 0:
                x = x + self.temp_embed[:, :frames]
            x = self.blocks[i + 1](x, c_temporal)
            x = x.unflatten(0, (batch, places)).transpose(1, 2).flatten(0, 1)
        x = self.linear(self.norm(x))
        x = x.reshape(batch * frames, height // 2, width // 2, 2, 2, channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(batch, frames, channels, height, width)
