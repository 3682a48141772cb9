"""Cut a run of nodes out as a *region*; equal runs share one.

Why not `torch.compiler.nested_compile_region` (`invoke_subgraph`): it needs marks in the
user's modules before capture, shares within one Inductor graph only, and cannot
have a Python conditional between two calls. Regions are plain GraphModules, compiled once
each. `lowering="graph"` makes an `invoke_subgraph` of those that are called more than once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from cachepass.ir.graph import acts, inputs_of, outputs_of, replace_outputs


class Outliner:
    """Replaces runs of nodes by calls of regions, and remembers regions to share them."""

    def __init__(self, taken: Collection[str] = ()) -> None:
        self._regions: dict[Any, tuple[str, fx.GraphModule]] = {}
        self._names: set[str] = set(taken)

    def outline(self, gm: fx.GraphModule, nodes: Sequence[fx.Node], hint: str) -> None:
        """Replace `nodes` (a run without frame operations) by one call, in place."""
        inputs = inputs_of(nodes)
        outputs = outputs_of(nodes)
        if not outputs and not any(map(acts, nodes)):
            for node in reversed(nodes):
                gm.graph.erase_node(node)
            return
        key = _key(nodes, inputs, outputs)
        if key not in self._regions:
            name, count = hint, 0
            while name in self._names:
                count += 1
                name = f"{hint}_{count}"
            self._names.add(name)
            self._regions[key] = (name, _region(gm, nodes, inputs, outputs))
        name, region = self._regions[key]
        if getattr(gm, name, None) is not region:
            gm.add_submodule(name, region)
        graph = gm.graph
        with graph.inserting_after(nodes[-1]):
            call = graph.call_module(name, tuple(inputs))
        call.meta["example_value"] = tuple(o.meta.get("example_value") for o in outputs)
        if "place" in nodes[0].meta:
            call.meta["place"] = nodes[0].meta["place"]
        replace_outputs(graph, call, outputs)
        for node in reversed(nodes):
            graph.erase_node(node)


def _region(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    """Canonical names, so that a compile cache finds the region in another process."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        mapping[node] = graph.placeholder(f"a{i}")
        mapping[node].meta = _value_of(node)
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            if used.op == "get_attr" and used not in mapping:
                mapping[used] = graph.get_attr(str(used.target))
        copied = graph.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, mapping.__getitem__),
            fx.map_arg(node.kwargs, mapping.__getitem__),
            name=f"n{i}",
        )
        copied.meta = _value_of(node)
        mapping[node] = copied
    graph.output(tuple(mapping[o] for o in outputs))
    attributes = {
        str(n.target): getattr(gm, str(n.target)) for n in graph.find_nodes(op="get_attr")
    }
    return fx.GraphModule(attributes or nn.Module(), graph)


def _value_of(node: fx.Node) -> dict[str, Any]:
    # Where a node comes from is of the first run of those that share the region.
    return {k: node.meta[k] for k in ("example_value", "stack_trace", "custom") if k in node.meta}


def _key(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> tuple[Any, ...]:
    """Equal for runs that compute the same function of their inputs."""
    index = {n: i for i, n in enumerate((*inputs, *nodes))}

    def freeze(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", index[value]) if value in index else ("attribute", value.target)
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(freeze, value))
        if isinstance(value, dict):
            return ("dict", *((k, freeze(v)) for k, v in sorted(value.items())))
        if isinstance(value, slice):
            return (
                "slice",
                freeze(value.start),
                freeze(value.stop),
                freeze(value.step),
            )
        return (type(value).__name__, repr(value))

    return (
        tuple(_signature(n.meta.get("example_value")) for n in inputs),
        tuple((n.op, n.target, freeze(n.args), freeze(n.kwargs)) for n in nodes),
        tuple(index[o] for o in outputs),
    )


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = tuple(map(str, value.stride()))
        return (
            tuple(map(str, value.shape)),
            strides,
            value.dtype,
            value.device,
            value.requires_grad,
        )
    return (type(value).__name__, str(value))
