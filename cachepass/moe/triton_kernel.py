"""The grouped linear layer as one Triton kernel over tiles of unequal tasks.

Static batching of irregular work, arXiv 2501.16103: the rows of each expert are cut into tiles, a
map tells a program which tile it works on, and a fixed number of programs takes the tiles in turns.
So one launch serves every load, and an empty expert costs nothing. Rows of `x` are gathered through
their index, never permuted in memory, and weights are read where they lie, through a list of
pointers: no stacked copy.

Each program computes the map for itself, from where the rows of experts end: an operation before
the launch would take longer than that.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from cachepass.moe.tiles import Tiles, fitting

_INTERPRETED_PROGRAMS = 4


def triton_grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    tiles: Tiles | None = None,
) -> Tensor:
    """`cachepass::grouped_linear` on a CUDA device, or in Triton's interpreter.

    Args:
        x: as there.
        rows: as there.
        offsets: as there.
        weights: as there.
        biases: as there.
        tiles: chosen by device and layout if None.
    """
    choices = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_empty(choices, weights[0].shape[0])
    if not choices:
        return out
    pointers = tuple(weight.data_ptr() for weight in weights)
    aligned = all(pointer % 16 == 0 for pointer in pointers)
    launch = functools.partial(_launch, out, x, rows, offsets, weights, pointers, biases, aligned)
    if tiles is not None:
        launch(tiles)
        return out
    *first, last = fitting(x, weights, aligned=aligned, gathers=rows is not None)
    for tiles in first:
        # Shared memory was counted for one architecture and Triton: another may need more.
        with contextlib.suppress(OutOfResources):
            launch(tiles)
            return out
    launch(last)
    return out


def _launch(
    out: Tensor,
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    pointers: tuple[int, ...],
    biases: Sequence[Tensor],
    aligned: bool,
    tiles: Tiles,
) -> None:
    columns, inner = weights[0].shape
    inner_tile = 128 // x.element_size()
    programs = _programs(x.device)
    run = functools.partial(
        _kernel[(programs,)],
        x,
        rows if rows is not None else offsets,  # not looked at without rows
        _addresses(pointers, x.device),
        _addresses(tuple(b.data_ptr() for b in biases), x.device) if biases else offsets,
        out,
        offsets,
        len(weights),
        out.shape[0],
        columns,
        inner,
        x.stride(0),
        x.stride(1),
        weights[0].stride(0),
        weights[0].stride(1),
        wave=max(1, round(math.sqrt(programs * tiles.columns / 128))),
        entries=max(2, triton.next_power_of_2(len(weights))),
        gathers=rows is not None,
        biased=bool(biases),
        aligned=aligned,
        transposed=weights[0].stride(0) == 1,
        by_tma=tiles.by_tma,
        even=inner % inner_tile == 0,
        columns_tile=tiles.columns,
        inner_tile=inner_tile,
        stages=tiles.stages,
        num_warps=8,
    )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if tiles.by_tma:
            contextvars.copy_context().run(_with_allocator, run, x.device)
        else:
            run()


def _with_allocator(run: functools.partial[None], device: torch.device) -> None:
    """Descriptors that a kernel makes lie in memory that Triton asks an allocator for.

    To be called in a copy of the context: an allocator that somebody else has set stays.
    """
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
    )
    run()


@functools.lru_cache(maxsize=1024)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device; kept as long as the tensors are where they are."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


# Numbers of tokens differ from call to call: the code is to be the same for all.
@triton.jit(do_not_specialize=["choices", "experts"])
def _kernel(
    x,
    rows,
    weights,
    biases,
    out,
    offsets,
    experts,
    choices,
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
    transposed: tl.constexpr,
    by_tma: tl.constexpr,
    even: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
    stages: tl.constexpr,
):
    numbers = tl.arange(0, entries)
    ends = tl.load(offsets + numbers, mask=numbers < experts, other=0)
    starts = tl.load(offsets + numbers - 1, mask=(numbers > 0) & (numbers < experts), other=0)
    sizes = ends - starts
    first = tl.program_id(0)
    for halved in tl.static_range(4):
        first = _tiles_of(
            first,
            128 >> halved,
            sizes,
            x,
            rows,
            weights,
            biases,
            out,
            offsets,
            choices,
            columns,
            inner,
            x_row,
            x_column,
            w_row,
            w_column,
            wave,
            gathers,
            biased,
            aligned,
            transposed,
            by_tma,
            even,
            columns_tile,
            inner_tile,
            stages,
        )


@triton.jit
def _tiles_of(
    first,
    high: tl.constexpr,
    sizes,
    x,
    rows,
    weights,
    biases,
    out,
    offsets,
    choices,
    columns,
    inner,
    x_row,
    x_column,
    w_row,
    w_column,
    wave: tl.constexpr,
    gathers: tl.constexpr,
    biased: tl.constexpr,
    aligned: tl.constexpr,
    transposed: tl.constexpr,
    by_tma: tl.constexpr,
    even: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
    stages: tl.constexpr,
):
    """The tiles of one height, from the first of this program; returns its first of the next."""
    tiles_across = tl.cdiv(columns, columns_tile)
    programs = tl.num_programs(0)
    counts = tl.cumsum(_tiles_down(sizes, high) * tiles_across, axis=0)
    total = tl.max(counts, axis=0)
    if by_tma and not gathers:
        x_blocks = tl.make_tensor_descriptor(
            x, shape=[choices, inner], strides=[x_row, 1], block_shape=[high, inner_tile]
        )
    for tile in tl.range(first, total, programs, flatten=by_tma):
        before = counts <= tile
        expert = tl.sum(before.to(tl.int32), axis=0)
        number = tile - tl.max(tl.where(before, counts, 0), axis=0)
        end = tl.load(offsets + expert)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        weight = tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty))
        if aligned:
            # Of a loaded pointer the compiler knows nothing, and loads 2 bytes at a time.
            weight = tl.multiple_of(weight, 16)
        # A wave of tiles shares columns of the weight, and its rows, in the cache.
        group = number // (wave * tiles_across)
        down = tl.minimum(_tiles_down(end - start, high) - group * wave, wave)
        row = start + (group * wave + number % (wave * tiles_across) % down) * high
        if high < 128:
            row += (end - start) // 128 * 128
        column = number % (wave * tiles_across) // down * columns_tile
        across = column + tl.arange(0, columns_tile)
        inside = across < columns
        # Beyond the end is nothing to read: the last one is read again, and not kept. Where
        # columns lie side by side that would keep them from being loaded 16 bytes at a time.
        if not transposed:
            across = tl.minimum(across, columns - 1)
        if by_tma:
            right = tl.make_tensor_descriptor(
                weight,
                shape=[columns, inner],
                strides=[w_row, 1],
                block_shape=[columns_tile, inner_tile],
            )
        else:
            right = weight + across.to(tl.int64)[None, :] * w_row
        if gathers or not by_tma:
            source = tl.minimum(row + tl.arange(0, high), end - 1)
            if gathers:
                source = tl.load(rows + source)
            left = x + source.to(tl.int64)[:, None] * x_row
        sums = tl.zeros((high, columns_tile), dtype=tl.float32)
        for k in tl.range(0, inner, inner_tile, num_stages=stages):
            deep = k + tl.arange(0, inner_tile)
            if by_tma and not gathers:
                a = x_blocks.load([row, k])
            else:
                a_at = left + deep[None, :] * x_column
                if even:
                    a = tl.load(a_at)
                else:
                    a = tl.load(a_at, mask=(deep < inner)[None, :], other=0.0)
            if by_tma:
                b = right.load([column, k]).T
            else:
                b_at = right + deep[:, None] * w_column
                if transposed:
                    b = tl.load(b_at, mask=(deep < inner)[:, None] & inside[None, :], other=0.0)
                elif even:
                    b = tl.load(b_at)
                else:
                    b = tl.load(b_at, mask=(deep < inner)[:, None], other=0.0)
            sums = tl.dot(a, b, sums, input_precision="ieee")
        if biased:
            bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
            added = tl.load(bias + across, mask=inside, other=0.0)
            sums += added.to(tl.float32)[None, :]
        to_row = row + tl.arange(0, high)
        to_column = column + tl.arange(0, columns_tile)
        to = out + to_row.to(tl.int64)[:, None] * columns + to_column[None, :]
        kept = (to_row < end)[:, None] & (to_column < columns)[None, :]
        tl.store(to, sums.to(x.dtype.element_ty), mask=kept)
    # The next ones go on where the round of these ends.
    return (first + programs - total % programs) % programs


@triton.jit
def _tiles_down(size, high: tl.constexpr):
    """Tiles of this height: all full ones of 128 rows; of the least that takes the rest, one."""
    rest = size % 128
    lower: tl.constexpr = high // 2 if high > 16 else 0
    count = ((rest > lower) & (rest <= high)).to(tl.int32)
    if high == 128:
        count += size // 128
    return count
