"""The grouped linear layer as one Triton kernel over tiles of unequal tasks.

Each expert with rows is a task, cut into tiles of up to 128 rows by 128 columns. A *task map* (see
`task_map`), computed on the device, tells a program which tile it works on; a fixed number of
programs takes the tiles in turns. So one launch serves every load, and an empty expert costs
nothing. Rows of `x` are gathered through their index, never permuted in memory, and weights are
read where they lie, through a list of pointers: no stacked copy.

Static batching of irregular work, arXiv 2501.16103. Heights are powers of two here, as Triton
wants them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachepass.errors import CachePassError

MOST_EXPERTS = 1024
"""What a task map holds: one program looks at all of it at once."""

COLUMNS = 128
"""Of a tile. With 256, as in the paper, tiles of 128 rows overflow the registers of sm_90."""

_INTERPRETED_PROGRAMS = 4


def task_map(offsets: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tiles there are, without a look at data on the host.

    Args:
        offsets: where the rows of each expert end.
        columns: how many columns a result has.

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
            f"{MOST_EXPERTS}. Split the layer, or leave it as it is (docs/moe.md)"
        )
    sizes = offsets.diff(prepend=offsets.new_zeros(1))
    height = torch.full_like(sizes, 16)
    for limit in (16, 32, 64):
        height = torch.where(sizes > limit, 2 * limit, height)
    tiles = (sizes + height - 1) // height * math.ceil(columns / COLUMNS)
    # The non-empty first, in their order; the empty ones behind add nothing.
    task = (sizes == 0).to(torch.int8).argsort(stable=True).to(torch.int32)
    prefix = tiles[task].cumsum(0).to(torch.int32)
    padding = _map_size(experts) - experts
    total = prefix[-1:].expand(padding)
    return torch.cat([prefix, total]), torch.cat([task, task[:1].expand(padding)]), height


def triton_grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """`cachepass::grouped_linear` on a CUDA device, or in Triton's interpreter."""
    columns, inner = weights[0].shape
    choices = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_empty(choices, columns)
    prefix, task, height = task_map(offsets, columns)
    programs = _programs(x.device)
    _kernel[(programs,)](
        x,
        rows if rows is not None else offsets,  # not looked at without rows
        _pointers(weights, x.device),
        _pointers(biases, x.device) if biases else offsets,
        out,
        prefix,
        task,
        height,
        offsets,
        columns,
        inner,
        x.stride(0),
        x.stride(1),
        weights[0].stride(0),
        weights[0].stride(1),
        wave=max(1, round(math.sqrt(programs * COLUMNS / 128))),
        entries=_map_size(len(weights)),
        gathers=rows is not None,
        biased=bool(biases),
        columns_tile=COLUMNS,
        inner_tile=128 // x.element_size(),
        num_warps=8,
        num_stages=3,
    )
    return out


def _map_size(experts: int) -> int:
    return max(2, 1 << (experts - 1).bit_length())


def _pointers(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Addresses on the device; kept as long as the tensors are where they are."""
    return _addresses(tuple(tensor.data_ptr() for tensor in tensors), device)


@functools.lru_cache(maxsize=1024)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _kernel(
    x,
    rows,
    weights,
    biases,
    out,
    prefix,
    task,
    height,
    offsets,
    columns,
    inner,
    x_row,
    x_column,
    w_row,
    w_column,
    wave: tl.constexpr,
    entries: tl.constexpr,
    gathers: tl.constexpr,
    biased: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
):
    counts = tl.load(prefix + tl.arange(0, entries))
    total = tl.max(counts, axis=0)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        below = counts <= tile
        entry = tl.sum(below.to(tl.int32), axis=0)
        first = tl.max(tl.where(below, counts, 0), axis=0)
        expert = tl.load(task + entry)
        high = tl.load(height + expert)
        end = tl.load(offsets + expert)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        weight = tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty))
        bias = weight
        if biased:
            bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
        # A wave of tiles shares columns of the weight, and its rows, in the cache.
        tiles_down = tl.cdiv(end - start, high)
        tiles_across = tl.cdiv(columns, columns_tile)
        number = tile - first
        group = number // (wave * tiles_across)
        down = tl.minimum(tiles_down - group * wave, wave)
        row = start + (group * wave + number % (wave * tiles_across) % down) * high
        column = number % (wave * tiles_across) // down * columns_tile
        if high == 128:
            _tile(x, rows, weight, bias, out, row, end, column, columns, inner, x_row, x_column,
                  w_row, w_column, gathers, biased, 128, columns_tile, inner_tile)  # fmt: skip
        elif high == 64:
            _tile(x, rows, weight, bias, out, row, end, column, columns, inner, x_row, x_column,
                  w_row, w_column, gathers, biased, 64, columns_tile, inner_tile)  # fmt: skip
        elif high == 32:
            _tile(x, rows, weight, bias, out, row, end, column, columns, inner, x_row, x_column,
                  w_row, w_column, gathers, biased, 32, columns_tile, inner_tile)  # fmt: skip
        else:
            _tile(x, rows, weight, bias, out, row, end, column, columns, inner, x_row, x_column,
                  w_row, w_column, gathers, biased, 16, columns_tile, inner_tile)  # fmt: skip


@triton.jit
def _tile(
    x,
    rows,
    weight,
    bias,
    out,
    row,
    end,
    column,
    columns,
    inner,
    x_row,
    x_column,
    w_row,
    w_column,
    gathers: tl.constexpr,
    biased: tl.constexpr,
    rows_tile: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
):
    down = row + tl.arange(0, rows_tile)
    across = column + tl.arange(0, columns_tile)
    inside = down < end
    source = down
    if gathers:
        source = tl.load(rows + down, mask=inside, other=0)
    left = x + source.to(tl.int64)[:, None] * x_row
    right = weight + across.to(tl.int64)[None, :] * w_row
    sums = tl.zeros((rows_tile, columns_tile), dtype=tl.float32)
    for k in range(0, inner, inner_tile):
        deep = k + tl.arange(0, inner_tile)
        a = tl.load(
            left + deep[None, :] * x_column,
            mask=inside[:, None] & (deep < inner)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + deep[:, None] * w_column,
            mask=(deep < inner)[:, None] & (across < columns)[None, :],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if biased:
        added = tl.load(bias + across, mask=across < columns, other=0.0)
        sums += added.to(tl.float32)[None, :]
    to = out + down.to(tl.int64)[:, None] * columns + across[None, :]
    tl.store(to, sums.to(x.dtype.element_ty), mask=inside[:, None] & (across < columns)[None, :])
