"""An MMDiT: text and image as two streams with joint attention, then as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """One stream's half of a joint block."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU("tanh"), nn.Linear(dim * 4, dim))
        self.modulation = nn.Linear(dim, dim * 6)

    def pre(self, x: Tensor, vec: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        mod = self.modulation(F.silu(vec))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + mod[1]) + mod[0]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return [self.norm_q(q), self.norm_k(k), v], mod[2:]

    def post(self, x: Tensor, attention: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_mlp = mod
        x = x + gate * self.proj(attention)
        x = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale) + shift)
        return x


class JointBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.txt, self.img = Stream(dim), Stream(dim)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        txt_qkv, txt_mod = self.txt.pre(txt, vec)
        img_qkv, img_mod = self.img.pre(img, vec)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attention = attend(q, k, v)
        text, image = attention.split([txt.shape[1], img.shape[1]], dim=1)
        return self.img.post(img, image, img_mod), self.txt.post(txt, text, txt_mod)


class SingleBlock(nn.Module):
    """Attention and MLP side by side."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.linear1 = nn.Linear(dim, dim * 3 + dim * 2)
        self.linear2 = nn.Linear(dim + dim * 2, dim)
        self.modulation = nn.Linear(dim, dim * 3)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(vec))[:, None].chunk(3, dim=-1)
        h = self.linear1(self.norm(x) * (1 + scale) + shift)
        qkv, mlp = h.split([3 * self.dim, 2 * self.dim], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.linear2(torch.cat((attend(q, k, v), F.gelu(mlp)), 2))
        return x


class MMDiT(nn.Module):
    def __init__(self, dim: int = 16, joint: int = 2, single: int = 2) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(8, dim), nn.Linear(12, dim)
        self.time_in, self.vector_in = nn.Linear(1, dim), nn.Linear(10, dim)
        self.double_blocks = nn.ModuleList([JointBlock(dim) for _ in range(joint)])
        self.single_blocks = nn.ModuleList([SingleBlock(dim) for _ in range(single)])
        self.norm_out, self.final = nn.LayerNorm(dim), nn.Linear(dim, 8)

    def forward(self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        vec = self.time_in(timesteps.float()[:, None]) + self.vector_in(y)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec)
        out: Tensor = self.final(self.norm_out(x[:, txt.shape[1] :]))
        return out
