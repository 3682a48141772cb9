"""Models that cannot be compiled, each for a reason of its own."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tests.toys.dit import ToyDiT


class NoRepeats(nn.Module):
    """A small convolutional net: no block comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 2, 2))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.SiLU(), nn.Conv2d(8, 3, 1))
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.down(x) + self.time(t[:, None])[..., None, None]
        out: Tensor = self.up(h) + y
        return out


class OneBlock(ToyDiT):
    """A single block in its list is not repeated."""

    def __init__(self) -> None:
        super().__init__(depth=1)


class Branches(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return super().forward(x, t, y)


class Loops(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        while x.abs().max() > 3:
            x = x / 2
        return super().forward(x, t, y)


class Prints(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        print("mean", x.mean())
        return super().forward(x, t, y)


class TakesItem(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        scale = x.std().item()
        if scale > 0.5:
            x = x / scale
        return super().forward(x, t, y)


class UsesNumpy(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = y.cpu().numpy()
        for _ in range(int(labels[0])):
            x = x * math.exp(-0.5)
        return super().forward(x, t, y)


class SelectsRows(ToyDiT):
    """Boolean indexing: how many there are is known at run time alone."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        bright = x.flatten()[x.flatten() > 0]
        if bright.shape[0] > 10:
            x = x - bright.mean()
        return super().forward(x, t, y)


class Raises(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] % 16:
            raise ValueError(f"width {x.shape[-1]} is no multiple of 16")
        return super().forward(x, t, y)
