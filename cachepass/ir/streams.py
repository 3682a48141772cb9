"""Follow streams through a run of blocks: what leaves is a sum over what enters.

Shapes do not tell streams apart: a condition, a hint or a text may well have the shape of the
image. But a block adds to its stream, so from where the stream leaves a way back over
sums ends where it enters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, fx

from cachepass.ir import ops
from cachepass.ir.graph import called, is_item, same_shape

Ways = dict[fx.Node, int]
"""From where a value is reached over sums alone, and over how many at most."""

_SUMS = frozenset({"add", "iadd", "add_"})
_SAME = frozenset({"float", "half", "bfloat16", "to", "type_as", "contiguous", "clone", "dropout"})
_PLUS = frozenset({"addcmul", "addcmul_"})


def stream_origins(
    gm: fx.GraphModule, nodes: Iterable[fx.Node], entering: Sequence[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """For each node of a run that is a sum over what enters: over what, the longest way first.

    What is added on the way (a residual from outside) is nearer than the stream itself. Outlined
    blocks and the computing arms of conditionals are looked into.
    """
    ways = _ways(gm, nodes, entering)
    return {node: sorted(found, key=lambda n: -found[n]) for node, found in ways.items() if found}


def _ways(
    gm: fx.GraphModule, nodes: Iterable[fx.Node], entering: Sequence[fx.Node]
) -> dict[fx.Node, Ways]:
    ways: dict[fx.Node, Ways] = {node: {node: 0} for node in entering}
    parts: dict[fx.Node, list[Ways]] = {}
    for node in nodes:
        if node in ways:
            continue
        if node.op == "call_module" or node.target is ops.conditional:
            parts[node] = _through(gm, node, ways)
        elif is_item(node):
            source, index = node.args[0], node.args[1]
            ways[node] = parts[source][index] if source in parts else {}  # type: ignore[index]
        else:
            found: Ways = {}
            for term, length in _terms(node):
                for origin, before in ways.get(term, {}).items():
                    found[origin] = max(found.get(origin, 0), before + length)
            ways[node] = found
    return ways


def _through(gm: fx.GraphModule, call: fx.Node, ways: dict[fx.Node, Ways]) -> list[Ways]:
    """Of each result of a region or of a conditional that computes."""
    if call.op == "call_module":
        target, operands = str(call.target), list(call.args)
    else:
        arm = call.args[2]
        assert isinstance(arm, fx.Node)
        target, operands = str(arm.target), [call.args[0], *call.args[4]]  # type: ignore[misc]
    part = gm.get_submodule(target)
    assert isinstance(part, fx.GraphModule)
    taken = list(part.graph.find_nodes(op="placeholder"))
    inner = _ways(part, part.graph.nodes, taken)
    outer = dict(zip(taken, operands, strict=True))
    results = []
    for output in part.graph.output_node().args[0]:  # type: ignore[union-attr]
        found: Ways = {}
        for placeholder, length in inner.get(output, {}).items():  # type: ignore[arg-type]
            for origin, before in ways.get(outer[placeholder], {}).items():
                found[origin] = max(found.get(origin, 0), before + length)
        results.append(found)
    return results


def _terms(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """What a node goes on from, and 1 where it adds to it."""
    name = called(node)
    first = node.args[0] if node.args else None
    if name in _SUMS:
        terms = [(n, 1) for n in node.all_input_nodes]
    elif name in _PLUS or name in _SAME:
        terms = [(first, int(name in _PLUS))] if isinstance(first, fx.Node) else []
    else:
        return []
    return [(n, length) for n, length in terms if _alike(n, node)]


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("example_value"), b.meta.get("example_value")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and same_shape(x, y)
