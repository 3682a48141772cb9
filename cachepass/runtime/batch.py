"""Rows in tensors: take them apart, gather some, put them back together.

A tensor carries rows along one dimension (`ir.rows` finds it). Where a model folds another axis
into its rows (frames), it holds a multiple of them there: a row is then that many neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass.errors import SessionError
from cachepass.ir.boundary import Slot
from cachepass.ir.ops import COUNT


def in_front(value: Any, rows: int) -> bool:
    """Whether an argument is a tensor with so many rows in front: all that its size tells."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def shape_of_one(shape: torch.Size, dim: int | None, rows: int) -> torch.Size:
    """The shape of one row's part."""
    if dim is None:
        return shape
    return torch.Size(size // rows if i == dim else size for i, size in enumerate(shape))


def part(value: Tensor, dim: int | None, row: int, rows: int) -> Tensor:
    """What belongs to one row, in memory of its own where there are several."""
    if dim is None or rows == 1:
        return value
    share = value.shape[dim] // rows
    return value.narrow(dim, row * share, share).clone(memory_format=torch.contiguous_format)


def join(parts: Sequence[Tensor], slot: Slot) -> Tensor:
    """The parts of all rows of a slot as one tensor."""
    if len(parts) == 1 or slot.rows is None:
        return parts[0]
    kinds = {(p.dtype, p.shape) for p in parts}
    if len(kinds) > 1:
        shown = " and ".join(sorted(f"{dtype} {tuple(shape)}" for dtype, shape in kinds))
        raise SessionError(f"slot {slot.name!r} holds {shown}: rows of one call have to be alike")
    return torch.cat(list(parts), slot.rows)


def times(time: Tensor, rows: int) -> list[float]:
    """The timestep of each row; the latest of its tokens where each of them has one."""
    numbers: Tensor = time.detach().flatten().double()
    if len(numbers) % rows:
        return [float(numbers[0])] * rows
    of_rows: list[float] = numbers.view(rows, -1).amax(1).tolist()
    return of_rows


def gather(
    operands: Sequence[Any], dims: Sequence[int | str | None], chosen: Tensor, rows: int
) -> list[Any]:
    """Operands as they are for some of the rows; `chosen` has their indices."""
    taken = []
    for operand, dim in zip(operands, dims, strict=True):
        if isinstance(dim, int):
            each = operand.unflatten(dim, (rows, operand.shape[dim] // rows))
            operand = each.index_select(dim, chosen.to(operand.device)).flatten(dim, dim + 1)
        elif dim == COUNT:
            operand = operand // rows * len(chosen)
        taken.append(operand)
    return taken


def scatter(
    made: Sequence[tuple[Tensor, Sequence[Tensor]]], dims: Sequence[int | None], rows: int
) -> tuple[Tensor, ...]:
    """Results of several groups of rows, each with its indices, as those of all rows, in order."""
    results = []
    for place, dim in enumerate(dims):
        values = [(chosen, values[place]) for chosen, values in made]
        some, whole = values[0]
        if dim is not None:
            share = whole.shape[dim] // len(some)
            shape = (rows * share if i == dim else size for i, size in enumerate(whole.shape))
            whole = whole.new_empty(tuple(shape))
            each = whole.unflatten(dim, (rows, share))
            for chosen, value in values:
                parts = value.unflatten(dim, (len(chosen), share))
                each.index_copy_(dim, chosen.to(whole.device), parts)
        results.append(whole)
    return tuple(results)


def mask(rows: Tensor, value: Tensor, dim: int) -> Tensor:
    """A condition (rows,) that broadcasts against a value with rows along a dimension."""
    size = value.shape[dim] if value.ndim else 0
    if not size or size % len(rows):
        raise SessionError(
            f"rows decide differently, and a value of shape {tuple(value.shape)} has no "
            f"dimension of {len(rows)} rows to select along"
        )
    chosen = rows.to(value.device).repeat_interleave(size // len(rows))
    return chosen.view([-1 if i == dim else 1 for i in range(value.ndim)])
