"""How a value carries the rows of a batch: read off its symbolic shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Layout
from cachepass.ir.ops import COUNT, Carried

COUNTS_ROWS = "counts_rows"
"""In the `meta` of a node: integers that are numbered over all rows, and mean nothing to some."""


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
        by = layout.mixed_by.get(size.node.expr)
        raise UnknownRowsError(
            f"rows lie along {dims} of a value of shape {tuple(value.shape)}"
            + (f", and {by} may put a row's parts apart" if by else "")
        )
    return dims[0]


def kept_along(layout: Layout, value: Tensor) -> int | None:
    """The dimension along which what a slot holds is taken apart into rows.

    Where that cannot be told, the parts of a row are taken to lie side by side, in front: what is
    kept of the rows of one request is put together again in the same order.

    Raises:
        PolicyError: they seem to lie along another dimension, of a batch that has one size only.
    """
    batch = layout.batch
    if not layout.row_symbols and batch > 1:
        first, *others = map(hint_of, value.shape) if value.ndim else (1,)
        if first not in (1, batch) and batch in others:
            raise PolicyError(
                f"a value of shape {(first, *others)} is to be kept, and its {batch} rows do not "
                "lie in front: call this model with one row at a time (where it does not fix the "
                "size of its batch, lowering='regions' takes several)"
            )
    try:
        return row_dim(layout, value)
    except UnknownRowsError as error:
        if batch > 1:
            layout.rows_mixed = layout.rows_mixed or str(error)
        return 0


def carried(layout: Layout, operands: Sequence[fx.Node], results: Sequence[fx.Node]) -> Carried:
    """How rows go into a conditional and come out of it, as far as that can be told."""
    if not layout.row_symbols:
        return None
    try:
        returned = tuple(row_dim(layout, node.meta.get("example_value")) for node in results)
    except UnknownRowsError:
        return None
    try:
        return tuple(_way(layout, node) for node in operands), returned
    except UnknownRowsError:
        return None, returned


def _way(layout: Layout, node: fx.Node) -> int | str | None:
    value = node.meta.get("example_value")
    if node.meta.get(COUNTS_ROWS):
        raise UnknownRowsError(f"{node.name} is numbered over all rows")
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
