"""Where the parts of each row lie side by side, in models that fold another axis into their rows.

A model that looks at the frames of a video one by one has ``frames * rows`` in one dimension. If
what belongs to a row lies side by side there, the row can be gathered; if frames go around (the
first frames of all rows, then the second ones), it cannot. Sizes do not tell. How they come about
does: a reshape leaves the order of elements as it is.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from cachepass.ir.graph import called, module_paths, value_of
from cachepass.ir.rows import COUNTS_ROWS, symbols_in

_RESHAPES = frozenset({
    "reshape", "reshape_as", "view", "view_as", "_unsafe_view", "flatten", "unflatten", "of_shape",
})  # fmt: skip
_REORDERS = frozenset({
    "argsort", "sort", "msort", "topk", "unique", "nonzero", "flip", "flipud", "roll", "rot90",
    "gather", "take", "take_along_dim", "index_select", "index_add", "index_copy", "index_put",
    "scatter", "scatter_add", "scatter_reduce", "masked_select", "masked_scatter",
})  # fmt: skip
_REPEATS = frozenset({
    "expand", "expand_as", "repeat", "tile", "zeros", "ones", "full", "empty", "new_zeros",
    "new_ones", "new_full", "zeros_like", "ones_like", "full_like",
})  # fmt: skip
"""What gives each row the same, if it is given no rows."""

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})

Symbols = frozenset[Any]


def multiples(graph: fx.Graph, symbols: Symbols) -> tuple[frozenset[Any], dict[Any, str]]:
    """The multiples of the rows that occur as sizes.

    Args:
        graph: flat, as captured.
        symbols: that count rows.

    Returns:
        Those that have each row's parts side by side wherever they occur; and the others, each
        with the operation that puts them apart, or may.
    """
    made_of: dict[Any, set[Any]] = collections.defaultdict(set)
    mixed: dict[Any, str] = {}

    def mix(sizes: Iterable[Any], node: fx.Node) -> None:
        for size in sizes:
            if size not in symbols:
                where = "".join(f" in {path}" for path, _ in module_paths(node)[-1:] if path)
                mixed.setdefault(size, f"`{called(node) or node.name}`{where}")

    for node in graph.nodes:
        results = list(_sizes([node], symbols))
        reshapes = called(node) in _RESHAPES
        if _reorders(node, symbols) or (reshapes and results and not _keeps(node, symbols)):
            mix((*results, *_sizes(node.all_input_nodes, symbols)), node)
            continue
        for value in _tensors([node]):
            for dim, size in _sized_by(value, symbols):
                source = _source(node, dim, size, symbols)
                if source is None:
                    mix([size], node)
                else:
                    made_of[size].add(source)
    spreading = True
    while spreading:
        hit = [s for s, sources in made_of.items() if s not in mixed and sources & mixed.keys()]
        mixed |= {size: mixed[next(iter(made_of[size] & mixed.keys()))] for size in hit}
        spreading = bool(hit)
    return frozenset(made_of) - symbols - mixed.keys(), mixed


def mark_counting(graph: fx.Graph, symbols: Symbols) -> None:
    """Mark integers that are numbered over all rows (`ir.rows.COUNTS_ROWS`).

    An index of that kind says something else once a row has moved to another place.
    """
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
            continue
        inputs = node.all_input_nodes
        numbers = [n.meta.get("example_value") for n in inputs]
        starts = called(node) == "arange" and any(symbols_in(n) & symbols for n in numbers)
        if starts or any(n.meta.get(COUNTS_ROWS) for n in inputs):
            node.meta[COUNTS_ROWS] = True


def _source(node: fx.Node, dim: int, size: Any, symbols: Symbols) -> Any:
    """The size that a result has its order of rows from; None if that is not known."""
    if size in symbols:
        return size
    name, inputs = called(node), node.all_input_nodes
    if name in _RESHAPES:
        return _sized_by(value_of(inputs[0]), symbols)[0][1]
    given = [pair for leaf in _tensors(inputs) for pair in _sized_by(leaf, symbols)]
    if any(other == size for _, other in given):
        return size if _is_known(node) else None
    if not given and name in _REPEATS:
        return size
    if name == "repeat_interleave" and len(given) == 1 and given[0][0] == dim:
        return given[0][1]
    return None


def _keeps(node: fx.Node, symbols: Symbols) -> bool:
    """Whether a reshape leaves rows outermost in their dimension: as much lies before them."""
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    given, made = _sized_by(before, symbols), _sized_by(after, symbols)
    # Two dimensions of rows in one tensor (a mask among all of them) are beyond this.
    if len(given) != 1 or len(made) != 1:
        return False
    return bool(_product(before.shape[: given[0][0]]) == _product(after.shape[: made[0][0]]))


def _reorders(node: fx.Node, symbols: Symbols) -> bool:
    """Whether rows, or parts of them, may come out in another order."""
    name = called(node)
    if name in ("getitem", "setitem", "__getitem__", "__setitem__"):
        index = [n for n in pytree.tree_leaves(node.args[1]) if isinstance(n, fx.Node)]
        return any(True for _ in _sizes(index, symbols))
    return name.rstrip("_") in _REORDERS


def _is_known(node: fx.Node) -> bool:
    """Whether a node calls Python or torch; what else does (libraries' own operations) is open."""
    target = node.target
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    module = getattr(target, "__module__", None) or "torch"
    return isinstance(target, str) or module.partition(".")[0] in ("torch", "_operator", "builtins")


def _tensors(nodes: Iterable[fx.Node]) -> list[Tensor]:
    leaves = pytree.tree_leaves([node.meta.get("example_value") for node in nodes])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _sizes(nodes: Iterable[fx.Node], symbols: Symbols) -> Iterator[Any]:
    for value in _tensors(nodes):
        for _, size in _sized_by(value, symbols):
            yield size


def _sized_by(value: Tensor, symbols: Symbols) -> list[tuple[int, Any]]:
    """The dimensions of a tensor whose size depends on the rows, with that size."""
    return [
        (dim, cast(torch.SymInt, size).node.expr)
        for dim, size in enumerate(value.shape)
        if symbols_in(size) & symbols
    ]


def _product(sizes: Sequence[int | torch.SymInt]) -> Any:
    return math.prod(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
