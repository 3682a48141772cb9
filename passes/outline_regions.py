"""Turn the operations between blocks and conditionals into regions, too."""

from __future__ import annotations

import dataclasses

from torch import fx

from cachepass.ir import ops
from cachepass.ir.boundary import place_of
from cachepass.ir.graph import is_frame_op, is_item, walk
from cachepass.ir.outline import Outliner
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class OutlineRegions:
    """Leave only calls of regions and frame operations, in the graph and in all its arms.

    Everything that computes is then in some region, and a region is all that Inductor
    ever sees. Runs before the first block are called `prologue`, after the last `epilogue`.
    """

    name: str = "outline-regions"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        taken = {
            str(n.target) for part in walk(gm) for n in part.graph.find_nodes(op="call_module")
        }
        outliner = Outliner(taken)
        modified = False
        for part in list(walk(gm)):
            for run, hint in _runs(part):
                outliner.outline(part, run, hint)
                modified = True
        return PassResult(gm, modified)


def _runs(gm: fx.GraphModule) -> list[tuple[list[fx.Node], str]]:
    """Runs of computing nodes between regions and frame operations, with names for them."""
    runs: list[tuple[list[fx.Node], str]] = []
    body = [n.op == "call_module" or n.target is ops.conditional for n in gm.graph.nodes]
    last: fx.Node | None = None
    seen = False
    for node, is_body in zip(gm.graph.nodes, body, strict=True):
        seen |= is_body
        if node.op not in ("call_function", "call_method") or is_frame_op(node) or is_body:
            last = None if node.op in ("call_function", "call_module") else last
            continue
        if is_item(node):
            continue
        if last is not None and place_of(last) == place_of(node):
            runs[-1][0].append(node)
        elif place_of(node) is not None:
            runs.append(([node], "sublayer"))
        else:
            hint = ("epilogue" if seen else "prologue") if any(body) else "glue"
            runs.append(([node], hint))
        last = node
    return runs
