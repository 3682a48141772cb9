"""Drop slots that nobody reads, with the work that filled them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from cachepass.ir import ops
from cachepass.ir.boundary import layout_of
from cachepass.ir.graph import walk
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class EliminateDeadCache:
    """Remove dead writes, then what fed them, then guards that became empty.

    1. A write to a slot without a read goes, and so does the slot.
    2. A read without users goes.
    3. Operations that frame operations alone used go with them; the model's own
       operations are left for Inductor, which knows what is dead.
    4. A guard whose arm does nothing goes.
    """

    name: str = "eliminate-dead-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        modified = False
        while _sweep(gm):
            modified = True
        layout.reads = tuple(dict.fromkeys(_reads(gm)))
        for name in [n for n in layout.slots if n not in layout.reads]:
            del layout.slots[name]
            modified = True
        return PassResult(gm, modified)


def _reads(gm: fx.GraphModule) -> Iterator[str]:
    """The slots that are read, as a call comes by them."""
    for node in gm.graph.nodes:
        arm = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if node.target is ops.cache_read:
            yield str(node.args[1])
        elif isinstance(arm, fx.GraphModule):
            yield from _reads(arm)


def _of(gm: fx.GraphModule, target: Callable[..., Any]) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def _sweep(gm: fx.GraphModule) -> bool:
    parts = list(walk(gm))
    read = {n.args[1] for part in parts for n in _of(part, ops.cache_read) if n.users}
    changed = False
    for part in parts:
        for node in reversed(part.graph.nodes):
            if node.op != "call_function":
                continue
            dead = (
                (node.target is ops.cache_write and node.args[1] not in read)
                or (node.target is ops.cache_shift and node.args[2] not in read)
                or (node.target in (ops.cache_read, ops.weights) and not node.users)
            )
            if node.target is ops.guard:
                attribute = node.args[2]
                assert isinstance(attribute, fx.Node)
                arm = getattr(part, str(attribute.target))
                dead = not any(n.target in ops.EFFECTS for n in arm.graph.nodes)
            if dead:
                _erase(part.graph, node)
                changed = True
    return changed


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for used in inputs:
        ours = used.target in (ops.clone, ops.l1_sums, ops.motion_sums, ops.cache_read)
        if not used.users and (ours or used.op == "get_attr"):
            _erase(graph, used)
