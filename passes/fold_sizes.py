"""Put numbers in the place of sizes that the model reads from tensors which it made of numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from cachepass.ir.graph import acts, call_target, drop_unused, value_of
from cachepass.pass_manager import PassResult

_MOST = 1024
"""Elements of a tensor that is followed."""


@dataclasses.dataclass(frozen=True)
class FoldSizes:
    """Make shapes known that capture takes for data.

    HiDream keeps the sizes of its images in a tensor and reshapes by its entries: what comes out
    has a shape that nobody knows before it runs, and no region can be compiled for it. But
    nothing of that depends on an input.

    1. What is made of numbers alone is computed, as long as it is integers, few of them, and not
       drawn at random.
    2. Where an entry of such a tensor serves as a number, it becomes one, and the shapes that
       follow from it are computed anew.
    3. A size that was a symbol, and that capture has found to be one number (a model may fix its
       batch), is put in as that number.
    4. A graph without sizes of either kind is left alone.
    """

    name: str = "fold-sizes"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        known: dict[fx.Node, Any] = {
            node: number
            for node in gm.graph.nodes
            if node.users and (number := _settled(node.meta.get("example_value"))) is not None
        }
        unknown = any(_unknown(node.meta.get("example_value")) for node in gm.graph.nodes)
        if not (known or unknown):
            return PassResult(gm, modified=False)
        modified = False
        for node in list(gm.graph.nodes):
            if not node.op.startswith("call") or node in known:
                continue
            if unknown and all(used in known for used in node.all_input_nodes):
                value = _computed(node, known)
                if value is not None:
                    known[node] = value
                    continue
            given = fx.map_arg((node.args, node.kwargs), lambda n: _number(known.get(n), n))
            if given != (node.args, node.kwargs):
                node.args, node.kwargs = given
                modified = True
            if node.target is torch.ops.aten._assert_scalar.default and node.args[0] is True:
                gm.graph.erase_node(node)
            elif _unknown(node.meta.get("example_value")):
                node.meta["example_value"] = value = _example(node)
                if isinstance(value, int):
                    known[node] = value
        drop_unused(gm.graph, acts)
        return PassResult(gm, modified)


def _number(value: Any, node: fx.Node) -> Any:
    """What stands for a node: the number that it is, if it is one."""
    if isinstance(value, Tensor) and not value.ndim:
        return value.item()
    return value if isinstance(value, int) else node


def _settled(value: Any) -> int | None:
    """The number that a symbol has come to be."""
    if not isinstance(value, torch.SymInt) or not value.node.expr.is_Integer:
        return None
    return int(value.node.expr)


def _unknown(value: Any) -> bool:
    """Whether a shape, or a number, depends on data."""
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return any(
        isinstance(s, torch.SymInt | torch.SymBool) and free_unbacked_symbols(s) for s in sizes
    )


def _computed(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on numbers alone; None if it is not followed."""
    example = node.meta.get("example_value")
    if isinstance(example, Tensor) and (example.is_floating_point() or example.is_complex()):
        return None
    if "rand" in str(node.target) or (isinstance(example, Tensor) and example.numel() > _MOST):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    value = call_target(node.target, args, kwargs)
    if isinstance(value, Tensor):
        return None if value.is_floating_point() else value
    return value if isinstance(value, int) else None


def _example(node: fx.Node) -> Any:
    """What a node gives, on the examples of what it is given."""
    for used in node.all_input_nodes:
        if "example_value" not in used.meta and used.op.startswith("call"):
            used.meta["example_value"] = _example(used)  # dynamo leaves out those of `tolist`
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    tensors = [value_of(n) for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
    if not tensors:
        return call_target(node.target, args, kwargs)
    with tensors[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return call_target(node.target, args, kwargs)
