"""Which tiles a grouped product has: a compressed map from their numbers to experts.

Each expert with rows is a task, cut into tiles of up to 128 rows by some columns. The map is
computed where the rows are counted, on the device, so that a launch waits for nothing. Static
batching of irregular work, arXiv 2501.16103; heights are powers of two here, as Triton wants them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cachepass.errors import CachePassError

MOST_EXPERTS = 1024
"""What a map holds: one program looks at all of it at once."""


def task_map(offsets: Tensor, columns: int, across: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tiles there are, without a look at data on the host.

    Args:
        offsets: where the rows of each expert end.
        columns: how many columns a result has.
        across: how many of them a tile has.

    Returns:
        prefix: int32, how many tiles the non-empty experts have up to each of them, padded with
            the total to a power of two. Tile t is of task ``number of entries <= t``.
        task: the expert of each entry.
        height: rows of a tile, for each expert.

    Raises:
        CachePassError: more experts than the map holds.
    """
    experts = offsets.shape[0]
    if experts > MOST_EXPERTS:
        raise CachePassError(
            f"a layer has {experts} routed experts: the task map of the kernel holds at most "
            f"{MOST_EXPERTS}. Split the layer in two, or run it on a CPU, which needs no map"
        )
    sizes = offsets.diff(prepend=offsets.new_zeros(1))
    height = torch.full_like(sizes, 16)
    for limit in (16, 32, 64):
        height = torch.where(sizes > limit, 2 * limit, height)
    tiles = (sizes + height - 1) // height * math.ceil(columns / across)
    # The non-empty first, in their order; the empty ones behind add nothing.
    task = (sizes == 0).to(torch.int8).argsort(stable=True).to(torch.int32)
    prefix = tiles[task].cumsum(0).to(torch.int32)
    padding = _map_size(experts) - experts
    total = prefix[-1:].expand(padding)
    return torch.cat([prefix, total]), torch.cat([task, task[:1].expand(padding)]), height


def _map_size(experts: int) -> int:
    return max(2, 1 << (experts - 1).bit_length())
