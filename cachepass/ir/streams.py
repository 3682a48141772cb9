"""Follow streams through a run of blocks: what leaves is a sum over what enters.

Shapes do not tell streams apart: a condition, a hint or a text may well have the shape of the
image. But a block adds to its stream, so from where the stream leaves a way back over
sums ends where it enters. Text and image may run as one on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from cachepass.ir import ops
from cachepass.ir.graph import called, is_item, joins, same_shape

Ways = dict[fx.Node, int]
"""From where a value is reached over sums alone, and over how many at most."""

Joined = list[tuple[fx.Node, Ways]]
"""The parts of a concatenation, each with its ways."""

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
    results: dict[fx.Node, list[Ways]] = {}
    joined: dict[fx.Node, Joined] = {}
    for node in nodes:
        if node in ways:
            continue
        source = node.args[0] if node.args else None
        if node.op == "call_module" or node.target is ops.conditional:
            results[node] = _through(gm, node, ways)
        elif is_item(node):
            ways[node] = results[source][node.args[1]] if source in results else {}  # type: ignore[index]
        elif joins(node):
            joined[node] = [(part, ways.get(part, {})) for part in node.all_input_nodes]
        elif node.target is operator.getitem and source in joined:
            ways[node] = _part(node, joined[source])  # type: ignore[index]
        else:
            terms = _terms(node)
            ways[node] = _longest((ways.get(term, {}), length) for term, length in terms)
            for term, length in terms:
                if term in joined:
                    joined[node] = [(p, _longest([(w, length)])) for p, w in joined[term]]
    return ways


def _longest(found: Iterable[tuple[Ways, int]]) -> Ways:
    """Ways that go on, each by some length."""
    ways: Ways = {}
    for before, length in found:
        for origin, way in before.items():
            ways[origin] = max(ways.get(origin, 0), way + length)
    return ways


def _part(node: fx.Node, parts: Joined) -> Ways:
    """Of the first or the last of several that run as one, where a slice takes it out again."""
    index: Any = node.args[1]
    cuts = [i for i in (index if isinstance(index, tuple) else (index,)) if i != slice(None)]
    if len(cuts) != 1 or not isinstance(cuts[0], slice):
        return {}
    part, ways = parts[0] if cuts[0].start in (None, 0) else parts[-1]
    return ways if _alike(part, node) else {}


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
        lengths = inner.get(output, {}).items()  # type: ignore[arg-type]
        results.append(_longest((ways.get(outer[p], {}), length) for p, length in lengths))
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
