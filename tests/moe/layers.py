"""Layers of routed experts, written as users write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Glu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


def plain(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, in the place of the layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return out


class ScoreLoop(nn.Module):
    """A gate of scores, and a loop over the rows that chose an expert: no graph can hold it."""

    def __init__(
        self,
        dim: int = 16,
        experts: int = 6,
        k: int = 2,
        build: Callable[[int, int], nn.Module] = Glu,
    ) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.mlps = nn.ModuleList(build(dim, 2 * dim) for _ in range(experts))
        self.k = k

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = torch.topk(self.router(x).softmax(-1), self.k)
        return weight / weight.sum(-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, index = self.pick(flat)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.mlps):
            rows, slot = torch.where(index == i)
            out[rows] += weight[rows, slot, None] * expert(flat[rows])
        return out.view_as(x)


class Sigmoid(ScoreLoop):
    """Weights that do not add up to one."""

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = torch.topk(self.router(x).sigmoid(), self.k)
        return weight, index


class Squared(ScoreLoop):
    """Weights that nobody would guess."""

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = torch.topk(self.router(x).softmax(-1), self.k)
        return weight**2, index
