"""How the kernel of routed experts cuts its work and fetches it, by device and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One way to cut and to fetch."""

    columns: int
    """Of a tile. Its rows are 128; 16, 32, 64 or 128 where an expert ends."""

    stages: int
    """Of the pipeline between memory and products."""

    by_tma: bool
    """Whether weights, and rows that are sorted, come as blocks through the tensor memory
    accelerator. Then the first of a tile are on their way while the tile before is written."""

    shared: int
    """Bytes of shared memory, as Triton 3.6 compiles it for sm_90 and bfloat16."""


CHOICES = (
    Tiles(columns=256, stages=4, by_tma=True, shared=229_408),
    Tiles(columns=256, stages=4, by_tma=False, shared=196_608),
    Tiles(columns=256, stages=3, by_tma=False, shared=147_456),
    Tiles(columns=128, stages=4, by_tma=True, shared=163_872),
    Tiles(columns=128, stages=3, by_tma=False, shared=98_304),
    Tiles(columns=128, stages=2, by_tma=False, shared=65_536),
)
"""From the fastest on an H200 (docs/moe.md)."""


def fitting(x: Tensor, weights: Sequence[Tensor], *, aligned: bool, gathers: bool) -> list[Tiles]:
    """Those that can be had, the fastest first.

    The accelerator and wide tiles are for Hopper alone: nothing was tried on a later GPU.

    Args:
        x: what is multiplied, (rows, in).
        weights: (out, in) of each expert, all of one shape and layout.
        aligned: whether each of them starts at a multiple of 16 bytes.
        gathers: whether rows of `x` are gathered on the way.
    """
    hopper, room = _device(x.device)
    size, weight = x.element_size(), weights[0]
    # Wide tiles leave no register free: they spill with wider elements or narrower loads.
    wide = hopper and size == 2 and weight.shape[0] >= 256 and aligned and _in_sixteens(weight)
    fetched = [weight] if gathers else [weight, x]
    by_tma = hopper and aligned and all(_is_block(tensor) for tensor in fetched)
    by_tma = by_tma and (gathers or x.data_ptr() % 16 == 0)
    found = [
        tiles
        for tiles in CHOICES
        if tiles.shared <= room and (wide or tiles.columns == 128) and (by_tma or not tiles.by_tma)
    ]
    return found or [CHOICES[-1]]


def _device(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper, and how many bytes of shared memory a program may take."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False, 0  # ROCm does not tell
    properties = torch.cuda.get_device_properties(device)
    hopper = (properties.major, properties.minor) == (9, 0)
    return hopper, int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _in_sixteens(tensor: Tensor) -> bool:
    """Whether 16 bytes can be loaded at a time, along rows or along columns."""
    apart = max(tensor.stride())
    return min(tensor.stride()) == 1 and apart * tensor.element_size() % 16 == 0


def _is_block(tensor: Tensor) -> bool:
    """Whether the accelerator takes it: rows that are dense and 16 bytes apart, or a multiple."""
    apart, step = tensor.stride()
    return step == 1 and apart > 0 and apart * tensor.element_size() % 16 == 0
