"""How a value carries the rows of a batch: read off its symbolic shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.ir.boundary import Layout
from cachepass.ir.ops import COUNT, Carried


class UnknownRowsError(LookupError):
    """A value whose shape does not tell how it carries rows."""


def symbols_in(size: Any) -> frozenset[Any]:
    """The symbols of a size."""
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


def hint_of(size: int | torch.SymInt) -> int:
    """A size in the call that was captured; 0 where that depends on data."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def row_dim(layout: Layout, value: Any) -> int | None:
    """The dimension of a tensor along which rows lie; None if it carries none.

    Raises:
        UnknownRowsError: rows lie along several, or a row's parts lie apart (a repeated batch).
    """
    if not isinstance(value, Tensor):
        return None
    if not layout.row_symbols:
        sizes = [i for i, size in enumerate(value.shape[:1]) if size % layout.batch == 0]
        if sizes and value.shape[0] != layout.batch:
            raise UnknownRowsError(f"{layout.batch} rows in a value of shape {tuple(value.shape)}")
        return sizes[0] if sizes else None
    dims = [i for i, size in enumerate(value.shape) if symbols_in(size) & layout.row_symbols]
    if not dims:
        return None
    size: Any = value.shape[dims[0]]
    if len(dims) > 1 or size.node.expr not in layout.row_symbols | layout.row_multiples:
        raise UnknownRowsError(f"rows lie along {dims} of a value of shape {tuple(value.shape)}")
    return dims[0]


def kept_along(layout: Layout, value: Tensor) -> int | None:
    """The dimension along which what a slot holds is taken apart into rows.

    Where that cannot be told, the parts of a row are taken to lie side by side, in front: right
    for the rows of one request, which are put together again in the same order.
    """
    try:
        return row_dim(layout, value)
    except UnknownRowsError:
        layout.rows_mixed = layout.batch > 1
        return 0


def carried(layout: Layout, operands: Sequence[fx.Node], results: Sequence[fx.Node]) -> Carried:
    """How rows go into a conditional and come out of it; None if that cannot be told."""
    if not layout.row_symbols:
        return None
    try:
        given = tuple(_way(layout, node.meta.get("example_value")) for node in operands)
        returned = tuple(row_dim(layout, node.meta.get("example_value")) for node in results)
    except UnknownRowsError:
        return None
    return given, returned


def _way(layout: Layout, value: Any) -> int | str | None:
    if isinstance(value, torch.SymInt) and symbols_in(value) & layout.row_symbols:
        if not _is_multiple(layout, value):
            raise UnknownRowsError(f"a number {value} that is no multiple of the rows")
        return COUNT
    if not isinstance(value, Tensor | torch.SymInt | int | float | bool):
        raise UnknownRowsError("a value that capture left no example of")
    return row_dim(layout, value)


def _is_multiple(layout: Layout, size: Any) -> bool:
    """Whether a size is a number (or another size) times the number of rows."""
    expression = size.node.expr
    for symbol in expression.free_symbols & layout.row_symbols:
        share = expression / symbol
        if not share.free_symbols & layout.row_symbols and share.is_integer:
            return True
    return False
