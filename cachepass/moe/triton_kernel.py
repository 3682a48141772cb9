"""The grouped linear layer as one Triton kernel over tiles of unequal tasks.

The task map (`cachepass.moe.task_map`) tells a program which tile it works on; a fixed number of
programs takes the tiles in turns. So one launch serves every load, and an empty expert costs
nothing. Rows of `x` are gathered through their index, never permuted in memory, and weights are
read where they lie, through a list of pointers: no stacked copy.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachepass.moe.task_map import task_map

TILE_COLUMNS = (256, 128)
"""Of a tile: the first, as in the paper, where it has room.

A tile of 128 rows by 256 columns takes 147,456 bytes of shared memory and 223 of a thread's 255
registers on sm_90, if weights can be loaded 16 bytes at a time; if they cannot, it spills.
"""

_SHARED_BYTES = 147_456
_INTERPRETED_PROGRAMS = 4


def triton_grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    across: int | None = None,
) -> Tensor:
    """`cachepass::grouped_linear` on a CUDA device, or in Triton's interpreter.

    Args:
        x: as there.
        rows: as there.
        offsets: as there.
        weights: as there.
        biases: as there.
        across: columns of a tile, one of `TILE_COLUMNS`; chosen if None.
    """
    columns, inner = weights[0].shape
    choices = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_empty(choices, columns)
    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
    if across is None:
        across = TILE_COLUMNS[0 if aligned and _has_room(x, columns) else 1]
    prefix, task, height = task_map(offsets, columns, across)
    programs = _programs(x.device)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
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
            wave=max(1, round(math.sqrt(programs * across / 128))),
            entries=prefix.shape[0],
            gathers=rows is not None,
            biased=bool(biases),
            aligned=aligned,
            columns_tile=across,
            inner_tile=128 // x.element_size(),
            num_warps=8,
            num_stages=3,
        )
    return out


def _pointers(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Addresses on the device; kept as long as the tensors are where they are."""
    return _addresses(tuple(tensor.data_ptr() for tensor in tensors), device)


@functools.lru_cache(maxsize=1024)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _has_room(x: Tensor, columns: int) -> bool:
    """Whether the wider tile fits, and is mostly filled."""
    if not x.is_cuda or x.element_size() != 2 or columns < TILE_COLUMNS[0]:
        return False
    properties = torch.cuda.get_device_properties(x.device)  # with ROCm it does not tell
    return bool(getattr(properties, "shared_memory_per_block_optin", 0) >= _SHARED_BYTES)


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
    aligned: tl.constexpr,
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
        if aligned:
            # Of a pointer that was loaded the compiler knows nothing, and loads 2 bytes at a time.
            weight = tl.multiple_of(weight, 16)
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
