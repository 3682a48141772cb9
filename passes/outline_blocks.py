"""Turn the operations of blocks into calls; equal stretches become one region."""

from __future__ import annotations

import dataclasses

from torch import fx

from cachepass.ir.boundary import Blocks, Place, Site, layout_of, place_of
from cachepass.ir.graph import is_frame_op, is_item
from cachepass.ir.outline import Outliner
from cachepass.pass_manager import PassResult

BLOCKS_PER_REGION = 2
"""With one, the sum that ends a block and the norm that starts the next are compiled apart and
every call is 3 % slower than plain torch.compile; with two it is 1 to 2 %, and more do not help
beyond that but cost compile time (measured on the shapes example, 12 blocks of width 192)."""


@dataclasses.dataclass(frozen=True)
class OutlineBlocks:
    """Replace runs of operations of up to `BLOCKS_PER_REGION` blocks by calls of regions.

    1. Runs of equal structure, constants, shapes, strides, dtypes and devices share ONE
       region and differ in the weights they are called with.
    2. A run ends where a site begins or ends, so that `InsertBlockCache` finds its edges.
    3. Operations that only the driver can run (reads, conditionals) end a run, so a block with
       sublayer sites or signals inside becomes several regions.
    """

    sites: tuple[Site, ...]
    name: str = "outline-blocks"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        blocks = layout_of(gm).blocks
        ranges = [site.range(blocks) for site in self.sites if isinstance(site, Blocks)]
        runs = _runs(gm, edges={edge for pair in ranges for edge in pair})
        outliner = Outliner()
        for place, run in runs:
            outliner.outline(gm, run, place.stack.rpartition(".")[2])
        return PassResult(gm, modified=bool(runs))


def _runs(gm: fx.GraphModule, edges: set[int]) -> list[tuple[Place, list[fx.Node]]]:
    """Each run of operations with the place where it starts."""
    runs: list[tuple[Place, list[fx.Node]]] = []
    last: Place | None = None  # of the node before, if that may go on
    for node in gm.graph.nodes:
        if node.op == "get_attr":  # comes along with who uses it
            continue
        place = place_of(node)
        fits = node.op in ("call_function", "call_method")
        if place is None or not fits or is_frame_op(node) or is_item(node):
            last = None
            continue
        goes_on = last is not None and place.stack == last.stack and (
            place.block == last.block
            or (place.block not in edges and place.block < runs[-1][0].block + BLOCKS_PER_REGION)
        )  # fmt: skip
        if not goes_on:
            runs.append((place, []))
        runs[-1][1].append(node)
        last = place
    return runs
