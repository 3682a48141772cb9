"""Find out which inputs carry the rows of the batch. Analysis only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from cachepass.ir.boundary import layout_of
from cachepass.ir.graph import value_of
from cachepass.ir.row_order import mark_counting, multiples
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
    4. Integers that are numbered over all rows (an index of tokens) are marked.
    5. Without a symbol (one row, or a model that fixes its batch) nothing is written.
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
        layout.row_multiples, layout.mixed_by = multiples(gm.graph, layout.row_symbols)
        mark_counting(gm.graph, layout.row_symbols)
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
