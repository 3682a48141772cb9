"""Inductor's conditional, with operands laid out as its arms were compiled for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx
from torch._inductor.ir import Conditional, ExternKernel
from torch._inductor.virtualized import V

from cachepass.lowering.patch import replaced


def exact_operands() -> AbstractContextManager[None]:
    """Let Inductor keep the strides that the operands of `torch.cond` have in the graph.

    It chooses layouts for values that it computes, and compiles the arms of a conditional for
    the layouts that the values had before: what comes out is then wrong, without a word (torch
    2.13: a sum of a channels-last convolution, transposed, as it enters a DiT's blocks). It does
    constrain what arms return; this does the same to what they are given.
    """

    def make(create: Any) -> Any:
        def exact(predicate: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
            nodes: Any = V.graph.current_node.args[-1]
            laid_out = [_as_in_graph(n, o) for n, o in zip(nodes, operands, strict=True)]
            return create(predicate, true_fn, false_fn, laid_out)

        return exact

    return replaced(Conditional, "create", make)


def _as_in_graph(node: Any, operand: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return operand
    return ExternKernel.require_exact_strides(operand, value.stride(), allow_padding=False)
