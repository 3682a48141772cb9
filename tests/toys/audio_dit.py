"""A 1-D DiT for audio: a global token in front, rotary self-attention, masked cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first half of the channels."""
    turned, rest = x.chunk(2, dim=-1)
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


class Block(nn.Module):
    def __init__(self, dim: int, context: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.pre_norm, self.cross_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff_norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.cross_attn = nn.MultiheadAttention(
            dim, heads, kdim=context, vdim=context, batch_first=True
        )
        self.ff_in, self.ff_out = nn.Linear(dim, dim * 4), nn.Linear(dim * 2, dim)

    def self_attention(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        out: Tensor = self.to_out(h.transpose(1, 2).flatten(2))
        return out

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        context_mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        x = x + self.self_attention(self.pre_norm(x), rotary, mask)
        attended, _ = self.cross_attn(
            self.cross_norm(x), context, context, key_padding_mask=~context_mask, need_weights=False
        )
        x = x + attended
        value, gate = self.ff_in(self.ff_norm(x)).chunk(2, dim=-1)
        x = x + self.ff_out(value * F.silu(gate))
        return x


class AudioDiT(nn.Module):
    def __init__(self, channels: int = 4, dim: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.preprocess = nn.Conv1d(channels, channels, 1, bias=False)
        self.project_in = nn.Linear(channels, dim)
        self.to_timestep_embed = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.to_global_embed = nn.Linear(6, dim)
        self.layers = nn.ModuleList([Block(dim, context=12) for _ in range(depth)])
        self.project_out = nn.Linear(dim, channels, bias=False)
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 4, 2) / 4))
        self.inv_freq: Tensor

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor, global_embed: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = self.preprocess(x) + x
        token = self.to_timestep_embed(t[:, None]) + self.to_global_embed(global_embed)
        h = torch.cat([token.unsqueeze(1), self.project_in(x.transpose(1, 2))], dim=1)
        if mask is None:
            mask = torch.ones(h.shape[0], h.shape[1] - 1, dtype=torch.bool, device=h.device)
        mask = F.pad(mask, (1, 0), value=True)
        angles = torch.arange(h.shape[1], device=h.device)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        rotary = (angles.cos(), angles.sin())
        for layer in self.layers:
            h = layer(h, context, context_mask=context_mask, rotary=rotary, mask=mask)
        out: Tensor = self.project_out(h[:, 1:]).transpose(1, 2)
        return out
