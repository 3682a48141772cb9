"""How close a video is to another, and whether it shows what its caption says.

All videos are (frames, 3, height, width) with RGB in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d, max_pool2d

from examples.shapes.world import COLOURS

# Wang et al. 2004, section III-C: window, its width, and the two stabilisers.
_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB; infinite for equal videos.

    The error is averaged over the whole video before the logarithm, so that one frame
    that happens to be exact does not outweigh the others.
    """
    error = (video.double() - reference.double()).square().mean().item()
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, the mean over frames; 1 for equal videos.

    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli: "Image quality assessment:
    from error visibility to structural similarity", IEEE Transactions on Image
    Processing 13(4), 2004. On luma, with the 11x11 Gaussian window of the paper,
    windows wholly inside the frame.
    """
    x, y = _luma(video), _luma(reference)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean().item()


def _luma(video: torch.Tensor) -> torch.Tensor:
    """Rec. 601 luma, (frames, 1, height, width), float64."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return torch.einsum("fchw,c->fhw", video.double().cpu(), weights)[:, None]


def _blur(images: torch.Tensor) -> torch.Tensor:
    """Gaussian mean over each window; loses 10 rows and 10 columns."""
    offset = torch.arange(_WINDOW, dtype=images.dtype) - _WINDOW // 2
    kernel = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    rows = conv2d(images, kernel.view(1, 1, -1, 1))
    return conv2d(rows, kernel.view(1, 1, 1, -1))


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a video shows, as far as a few lines of arithmetic can tell."""

    colour: str
    """Colour of the shape, one of the caption's words."""
    background: str
    """Kind of background, one of the caption's words."""
    motion: float
    """Mean absolute change of a pixel from a frame to the next, in [0, 1]."""


def content(video: torch.Tensor) -> Content:
    """Reads colour, background and amount of motion off a video."""
    video = video.float().cpu()
    # Every colour has a channel above 0.78, no background has one above 0.61. Pixels
    # near the shape belong to neither: there the two are blended.
    brightest = video.amax(1)
    inside = brightest > 0.72
    outside = max_pool2d((brightest > 0.64).float(), 5, stride=1, padding=2) == 0
    return Content(
        colour=_nearest_colour(video, inside),
        background=_background(video, outside),
        motion=(video[1:] - video[:-1]).abs().mean().item(),
    )


def _nearest_colour(video: torch.Tensor, inside: torch.Tensor) -> str:
    pixels = video.movedim(1, -1)[inside]
    median = pixels.median(0).values if len(pixels) else torch.zeros(3)
    palette = torch.tensor(list(COLOURS.values()))
    return list(COLOURS)[int((palette - median).norm(dim=-1).argmin())]


def _background(video: torch.Tensor, outside: torch.Tensor) -> str:
    """Tells backgrounds by which of row and column their brightness depends on."""
    # No background moves, so the median over the frames that show a pixel of it
    # leaves out the shape and most flicker, too.
    shown = video.masked_fill(~outside[:, None], torch.nan).nanmedian(0).values
    level = shown.nanmean((1, 2), keepdim=True)
    pattern = torch.where(shown.isnan(), 0, shown - level)  # (3, height, width)
    total = pattern.std().item()
    if total < 0.015:
        return "plain"
    by_row = pattern.mean(2).std().item() / total
    by_column = pattern.mean(1).std().item() / total
    if max(by_row, by_column) < 0.6:
        return "checker"
    return "gradient" if by_row > by_column else "stripes"
