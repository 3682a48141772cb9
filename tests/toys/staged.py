"""A DiT in stages with refiners before them, that can save memory while it is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.w1, self.w2 = nn.Linear(dim, dim * 2), nn.Linear(dim * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention_norm2(self.out(h))
        x = x + self.ffn_norm2(self.w2(F.silu(self.w1(self.ffn_norm1(x)))))
        return x


class Trunk(nn.Module):
    """What the models of this file have in common: everything but how the trunk is run."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed_image, self.embed_text = nn.Linear(8, dim), nn.Linear(12, dim)
        self.embed_time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text_refiner = nn.ModuleList([Block(dim) for _ in range(2)])
        self.image_refiner = nn.ModuleList([Block(dim) for _ in range(2)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 8))

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor, text: Tensor, t: Tensor) -> Tensor:
        image, text = self.embed_image(image), self.embed_text(text)
        for layer in self.text_refiner:
            text = layer(text)
        image = image + self.embed_time(t[:, None])[:, None]
        for layer in self.image_refiner:
            image = layer(image)
        x = self.run(torch.cat([text, image], dim=1))
        out: Tensor = self.head(x[:, text.shape[1] :])
        return out


class StagedDiT(Trunk):
    """A Sequential of Sequentials, which saves memory whenever gradients are wanted."""

    def __init__(self, dim: int = 16, stages: int = 2, depth: int = 2) -> None:
        super().__init__(dim)
        self.stages = nn.Sequential(
            *(nn.Sequential(*(Block(dim) for _ in range(depth))) for _ in range(stages))
        )

    def run(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            for stage in self.stages:
                x = checkpoint(stage, x, use_reentrant=False)
            return x
        out: Tensor = self.stages(x)
        return out


class CheckpointedDiT(Trunk):
    """A plain list, which saves memory where it is told to."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__(dim)
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.gradient_checkpointing:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x
