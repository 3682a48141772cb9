"""What `torch.cond` gets wrong in torch 2.13: operands under Inductor, open sizes under export."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
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


def equal_outputs() -> AbstractContextManager[None]:
    """Let arms that return equal sizes and strides return these.

    Where sizes are symbols, `torch.cond` derives strides from sizes anew, and compares them with
    those of contiguous memory: ``h // 2 * w`` is not found among ``max(1, h // 2) * w``, a
    KeyError. Ours need no deriving (`functionalize` closes both arms with contiguous copies).
    """

    def make(merge: Any) -> Any:
        def merged(a: Any, b: Any, mode: Any) -> Any:
            if isinstance(a, Tensor) and _layout(a) == _layout(b):
                with mode:
                    return torch.empty_strided(a.size(), a.stride(), dtype=a.dtype, device=a.device)
            return merge(a, b, mode)

        return merged

    # The package's own name for the module is taken by the operation.
    module = importlib.import_module("torch._higher_order_ops.cond")
    return replaced(module, "_merge_output", make)


def _layout(value: Tensor) -> tuple[Any, ...]:
    """Its dtype, sizes and strides, symbols by their expressions."""
    numbers = (*value.size(), *value.stride())
    return value.dtype, *(n if isinstance(n, int) else n.node.expr for n in numbers)
