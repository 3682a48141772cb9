"""Find out which inputs carry the rows of the batch. Analysis only."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from cachepass.ir.boundary import layout_of
from cachepass.ir.graph import called, value_of
from cachepass.ir.rows import hint_of, symbols_in
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class MarkRows:
    """Write into the layout which symbols count rows.

    1. The batch was captured with a symbol for its size (`compile` asks for that where there are
       several rows): the first dimension of the latent. What the model adds or multiplies with
       the latent has come to share the symbol.
    2. An input may have a symbol of its own, because it only ever broadcasts (a mask). It counts
       rows if the call fails when all others of its size have a row more than it has.
    3. A model may fold another axis into its rows (frames): a size is then a multiple of their
       number. It is noted if, wherever it occurs, the parts of each row lie side by side.
    4. Without a symbol (one row, or a model that fixes its batch) nothing is written.
    """

    name: str = "mark-rows"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        assert layout.latent is not None
        size: Any = 1 if layout.listed else value_of(layout.latent).shape[0]
        layout.batch = hint_of(size)
        own = symbols_in(size)
        if not own:
            return PassResult(gm, modified=False)
        others = frozenset(
            symbol
            for node in layout.inputs.values()
            for other in value_of(node).shape[:1]
            if isinstance(other, torch.SymInt) and hint_of(other) == layout.batch
            for symbol in symbols_in(other)
        )
        alike = own | others
        layout.row_symbols = own | {s for s in others - own if not _runs(gm, alike - {s})}
        layout.row_multiples = _multiples(gm.graph, layout.row_symbols)
        return PassResult(gm, modified=False)


def _runs(gm: fx.GraphModule, growing: frozenset[Any]) -> bool:
    """Whether the call goes through where these symbols are one more than they were."""

    def number(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression, hints = size.node.expr, size.node.shape_env.backed_var_to_val
        return int(expression.subs({s: hints[s] + (s in growing) for s in symbols_in(size)}))

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return number(value)
        shape, stride = (tuple(map(number, sizes)) for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    inputs = gm.graph.find_nodes(op="placeholder")
    try:
        with FakeTensorMode(), torch.no_grad():
            fx.Interpreter(gm).run(*(fake(node.meta.get("example_value")) for node in inputs))
    except RuntimeError:  # shapes that do not fit
        return False
    return True


# ----------------------------------------------------------------------------- multiples

_RESHAPES = frozenset({
    "reshape", "reshape_as", "view", "view_as", "_unsafe_view", "flatten", "unflatten", "of_shape",
})  # fmt: skip


def _multiples(graph: fx.Graph, symbols: frozenset[Any]) -> frozenset[Any]:
    """The multiples of rows that have the parts of each row side by side, wherever they occur.

    What keeps such a size keeps its order. What makes one has to be seen to make it so.
    """
    made_of: dict[Any, set[Any]] = collections.defaultdict(set)
    mixed: set[Any] = set()
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("example_value")):
            for dim, size in _sized_by(value, symbols):
                source = _source(node, value, dim, symbols)
                if source is None:
                    mixed.add(size)
                else:
                    made_of[size].add(source)
    found = frozenset(made_of) - symbols
    while any(made_of[size] & mixed for size in found - mixed):
        mixed |= {size for size in found if made_of[size] & mixed}
    return found - mixed


def _sized_by(value: Any, symbols: frozenset[Any]) -> list[tuple[int, Any]]:
    """The dimensions of a tensor whose size depends on the rows, with that size."""
    if not isinstance(value, Tensor):
        return []
    return [
        (dim, cast(torch.SymInt, size).node.expr)
        for dim, size in enumerate(value.shape)
        if symbols_in(size) & symbols
    ]


def _source(node: fx.Node, value: Tensor, dim: int, symbols: frozenset[Any]) -> Any:
    """The size that a node's result has its order of rows from; None if that is not known."""
    size: Any = value.shape[dim].node.expr  # type: ignore[attr-defined]
    if size in symbols:
        return size
    name, inputs = called(node), node.all_input_nodes
    if name not in _RESHAPES:
        leaves = pytree.tree_leaves([n.meta.get("example_value") for n in inputs])
        if any(size == other for leaf in leaves for _, other in _sized_by(leaf, symbols)):
            return size
    given = _sized_by(value_of(inputs[0]), symbols) if inputs else []
    # Two dimensions of rows in one tensor (a mask among all of them) are beyond this.
    if len(given) != 1 or len(_sized_by(value, symbols)) != 1:
        return None
    ((place, before),) = given
    if name == "repeat_interleave":
        return before if place == dim else None
    # A reshape leaves the order of elements: rows go on as they were if as much lies before them.
    ahead = _product(value_of(inputs[0]).shape[:place])
    return before if name in _RESHAPES and ahead == _product(value.shape[:dim]) else None


def _product(sizes: Sequence[int | torch.SymInt]) -> Any:
    return math.prod(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
