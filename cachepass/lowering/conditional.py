"""Inductor's conditional, with operands laid out as its arms were compiled for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx
from torch._inductor.ir import Conditional, ExternKernel
from torch._inductor.virtualized import V

_PATCHING = threading.Lock()


@contextlib.contextmanager
def exact_operands() -> Iterator[None]:
    """Let Inductor keep the strides that the operands of `torch.cond` have in the graph.

    It chooses layouts for values that it computes, and compiles the arms of a conditional for
    the layouts that the values had before: what comes out is then wrong, without a word (torch
    2.13: a sum of a channels-last convolution, transposed, as it enters a DiT's blocks). It does
    constrain what arms return; this does the same to what they are given.
    """
    create = Conditional.create

    def exact(predicate: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
        nodes: Any = V.graph.current_node.args[-1]
        laid_out = [_as_in_graph(n, o) for n, o in zip(nodes, operands, strict=True)]
        return create(predicate, true_fn, false_fn, laid_out)

    with _PATCHING:
        Conditional.create = exact  # type: ignore[method-assign]
        try:
            yield
        finally:
            Conditional.create = create  # type: ignore[method-assign]


def _as_in_graph(node: Any, operand: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return operand
    return ExternKernel.require_exact_strides(operand, value.stride(), allow_padding=False)
