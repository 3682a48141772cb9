"""The grouped linear layer as one Triton kernel over tiles of unequal tasks.

Static batching of irregular work, arXiv 2501.16103: the rows of each expert are cut into tiles, a
map tells a program which tile it works on, and a fixed number of programs takes the tiles in turns.
So one launch serves every load, and an empty expert costs nothing. Rows of `x` are gathered through
their index, never permuted in memory, and weights are read where they lie, through a list of
pointers: no stacked copy.

Each program computes the map for itself, from where the rows of experts end. Computed before the
launch, by a dozen of small operations, it took as long as the products of 64 experts.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work is cut, and how it is fetched."""

    columns: int
    """Of a tile. Its rows are 128; of the last tile of an expert, as few as hold its rows."""

    stages: int
    """Of the pipeline between memory and products."""

    blocks: bool
    """Whether weights, and rows that are sorted, are fetched as blocks, by the tensor memory
    accelerator of Hopper and later. Then the first of a tile are on their way while the tile before
    is written."""

    shared: int
    """Bytes of shared memory that this takes, as compiled for sm_90."""


CHOICES = (
    Tiles(columns=256, stages=4, blocks=True, shared=229_408),
    Tiles(columns=256, stages=4, blocks=False, shared=196_608),
    Tiles(columns=256, stages=3, blocks=False, shared=147_456),
    Tiles(columns=128, stages=4, blocks=True, shared=163_872),
    Tiles(columns=128, stages=3, blocks=False, shared=98_304),
    Tiles(columns=128, stages=2, blocks=False, shared=65_536),
)
"""The first that fits is taken."""


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
    columns, inner = weights[0].shape
    choices = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_empty(choices, columns)
    tiles = tiles or _tiles_for(x, weights)
    programs = _programs(x.device)
    inner_tile = 128 // x.element_size()
    launch = functools.partial(
        _kernel[(programs,)],
        x,
        rows if rows is not None else offsets,  # not looked at without rows
        _pointers(weights, x.device),
        _pointers(biases, x.device) if biases else offsets,
        out,
        offsets,
        len(weights),
        choices,
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
        aligned=_aligned(weights),
        blocks=tiles.blocks,
        even=inner % inner_tile == 0,
        columns_tile=tiles.columns,
        inner_tile=inner_tile,
        stages=tiles.stages,
        num_warps=8,
    )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        contextvars.copy_context().run(_with_room, launch)
    return out


def _with_room(launch: functools.partial[None]) -> None:
    """Triton asks for memory to describe blocks in; who asks elsewhere is not to notice."""
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    launch()


def _pointers(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Addresses on the device; kept as long as the tensors are where they are."""
    return _addresses(tuple(tensor.data_ptr() for tensor in tensors), device)


@functools.lru_cache(maxsize=1024)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _aligned(weights: Sequence[Tensor]) -> bool:
    """Whether 16 bytes can be loaded at a time."""
    return all(weight.data_ptr() % 16 == 0 for weight in weights)


def _tiles_for(x: Tensor, weights: Sequence[Tensor]) -> Tiles:
    if not x.is_cuda:
        return CHOICES[-1]
    # Wider tiles spill where an element takes more than two bytes or loads less than sixteen.
    wide = x.element_size() == 2 and weights[0].shape[0] >= 256 and _aligned(weights)
    blocks = _are_blocks(x, weights)
    properties = torch.cuda.get_device_properties(x.device)  # with ROCm it does not tell
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    for tiles in CHOICES:
        if tiles.shared <= room and wide >= (tiles.columns > 128) and blocks >= tiles.blocks:
            return tiles
    return CHOICES[-1]


def _are_blocks(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the tensor memory accelerator is there and takes what lies so."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    steps = (x.stride(0), weights[0].stride(0))
    rows_apart = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    in_a_row = x.stride(1) == weights[0].stride(1) == 1
    return rows_apart and in_a_row and x.data_ptr() % 16 == 0 and _aligned(weights)


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
    blocks: tl.constexpr,
    even: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
    stages: tl.constexpr,
):
    numbers = tl.arange(0, entries)
    ends = tl.load(offsets + numbers, mask=numbers < experts, other=0)
    starts = tl.load(offsets + numbers - 1, mask=(numbers > 0) & (numbers < experts), other=0)
    sizes = ends - starts
    turn = tl.program_id(0)
    for halved in tl.static_range(4):
        turn = _tiles_of(
            turn,
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
            blocks,
            even,
            columns_tile,
            inner_tile,
            stages,
        )


@triton.jit
def _tiles_of(
    turn,
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
    blocks: tl.constexpr,
    even: tl.constexpr,
    columns_tile: tl.constexpr,
    inner_tile: tl.constexpr,
    stages: tl.constexpr,
):
    """The tiles of one height; returns which of the next ones is this program's first."""
    tiles_across = tl.cdiv(columns, columns_tile)
    counts = tl.cumsum(_tiles_down(sizes, high) * tiles_across, axis=0)
    total = tl.max(counts, axis=0)
    programs = tl.num_programs(0)
    if blocks and not gathers:
        x_blocks = tl.make_tensor_descriptor(
            x, shape=[choices, inner], strides=[x_row, 1], block_shape=[high, inner_tile]
        )
    for tile in tl.range(turn, total, programs, flatten=blocks):
        below = counts <= tile
        expert = tl.sum(below.to(tl.int32), axis=0)
        number = tile - tl.max(tl.where(below, counts, 0), axis=0)
        end = tl.load(offsets + expert)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        weight = tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty))
        if aligned:
            # Of a pointer that was loaded the compiler knows nothing, and loads 2 bytes at a time.
            weight = tl.multiple_of(weight, 16)
        # A wave of tiles shares columns of the weight, and its rows, in the cache.
        group = number // (wave * tiles_across)
        down = tl.minimum(_tiles_down(end - start, high) - group * wave, wave)
        row = start + (group * wave + number % (wave * tiles_across) % down) * high
        if high < 128:
            row += (end - start) // 128 * 128
        column = number % (wave * tiles_across) // down * columns_tile
        # Beyond the end lies somebody else's, or nothing: the last one is read again, and not kept.
        across = tl.minimum(column + tl.arange(0, columns_tile), columns - 1)
        if blocks:
            right = tl.make_tensor_descriptor(
                weight,
                shape=[columns, inner],
                strides=[w_row, 1],
                block_shape=[columns_tile, inner_tile],
            )
        else:
            right = weight + across.to(tl.int64)[None, :] * w_row
        if gathers or not blocks:
            source = tl.minimum(row + tl.arange(0, high), end - 1)
            if gathers:
                source = tl.load(rows + source)
            left = x + source.to(tl.int64)[:, None] * x_row
        sums = tl.zeros((high, columns_tile), dtype=tl.float32)
        for k in tl.range(0, inner, inner_tile, num_stages=stages):
            deep = k + tl.arange(0, inner_tile)
            if blocks and not gathers:
                a = x_blocks.load([row, k])
            elif even:
                a = tl.load(left + deep[None, :] * x_column)
            else:
                a = tl.load(
                    left + deep[None, :] * x_column, mask=(deep < inner)[None, :], other=0.0
                )
            if blocks:
                b = right.load([column, k]).T
            elif even:
                b = tl.load(right + deep[:, None] * w_column)
            else:
                b = tl.load(
                    right + deep[:, None] * w_column, mask=(deep < inner)[:, None], other=0.0
                )
            sums = tl.dot(a, b, sums, input_precision="ieee")
        if biased:
            bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
            sums += tl.load(bias + across).to(tl.float32)[None, :]
        to_row = row + tl.arange(0, high)
        to_column = column + tl.arange(0, columns_tile)
        to = out + to_row.to(tl.int64)[:, None] * columns + to_column[None, :]
        kept = (to_row < end)[:, None] & (to_column < columns)[None, :]
        tl.store(to, sums.to(x.dtype.element_ty), mask=kept)
    return (turn + programs - total % programs) % programs


@triton.jit
def _tiles_down(size, high: tl.constexpr):
    """How many tiles of this height an expert has: full ones, and one for the rest of its rows."""
    rest = size % 128
    lowest: tl.constexpr = high // 2 if high > 16 else 0
    count = ((rest > lowest) & (rest <= high)).to(tl.int32)
    if high == 128:
        count += size // 128
    return count
