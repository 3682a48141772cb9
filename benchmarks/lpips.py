"""LPIPS, a learned distance between videos, from weights that the user brings.

R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang: "The unreasonable effectiveness of
deep features as a perceptual metric", CVPR 2018, version 0.1 on AlexNet. The package of
that name needs torchvision and the net; what it computes is five convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, normalize, relu

# AlexNet's convolutions as (stride, padding), and before which of them it pools.
_CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
_POOLED = (1, 2)
# Mean and width of the channels of RGB in [-1, 1], as the paper's code has them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """The distance of two videos, 0 for equal ones, averaged over their frames.

    Args:
        path: a safetensors file of AlexNet's convolutions, `conv0.weight`, `conv0.bias` to
            `conv4`, and the heads of version 0.1, `lin0.weight` to `lin4.weight`.

    Raises:
        SystemExit: a weight is missing.
    """

    def __init__(self, path: Path) -> None:
        self.weights = load_file(path)
        kinds = ("conv{}.weight", "conv{}.bias", "lin{}.weight")
        wanted = [kind.format(i) for kind in kinds for i in range(len(_CONVOLUTIONS))]
        if missing := [name for name in wanted if name not in self.weights]:
            raise SystemExit(f"{path} has no {missing[0]}: see benchmarks/lpips.py")

    @torch.no_grad()
    def __call__(self, video: Tensor, reference: Tensor) -> float:
        """Both (frames, 3, height, width), RGB in [0, 1]; at least 32 pixels each way."""
        of = self._features(video), self._features(reference)
        distance = torch.zeros(len(video))
        for i, (a, b) in enumerate(zip(*of, strict=True)):
            apart = (normalize(a) - normalize(b)).square()
            distance += conv2d(apart, self.weights[f"lin{i}.weight"]).mean((1, 2, 3))
        return distance.mean().item()

    def _features(self, video: Tensor) -> Iterator[Tensor]:
        shift, scale = (torch.tensor(of).view(3, 1, 1) for of in (_SHIFT, _SCALE))
        x = (video.float() * 2 - 1 - shift) / scale
        for i, (stride, padding) in enumerate(_CONVOLUTIONS):
            if i in _POOLED:
                x = max_pool2d(x, 3, 2)
            weight, bias = self.weights[f"conv{i}.weight"], self.weights[f"conv{i}.bias"]
            x = relu(conv2d(x, weight, bias, stride, padding))
            yield x
