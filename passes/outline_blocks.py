"""Turn the operations of each block into a call; equal blocks become one region."""

from __future__ import annotations

import dataclasses

from torch import fx

from cachepass.ir.boundary import place_of
from cachepass.ir.graph import is_frame_op
from cachepass.ir.outline import Outliner
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class OutlineBlocks:
    """Replace each run of operations of one block by a call of a shared region.

    1. Blocks of equal structure, constants, shapes, strides, dtypes and devices share ONE
       region and differ in the weights they are called with.
    2. Operations that only the driver can run (reads, conditionals) end a run, so a block with
       sites or signals inside becomes several regions.
    """

    name: str = "outline-blocks"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        outliner = Outliner()
        runs: list[list[fx.Node]] = []
        current: list[fx.Node] = []
        for node in gm.graph.nodes:
            place = place_of(node)
            fits = place is not None and not is_frame_op(node) and node.op in (
                "call_function", "call_method",
            )  # fmt: skip
            fits = fits and not outliner.is_item(node)
            if current and (not fits or place_of(current[-1]) != place):
                runs.append(current)
                current = []
            if fits:
                current.append(node)
        if current:
            runs.append(current)
        for run in runs:
            place = place_of(run[0])
            assert place is not None
            outliner.outline(gm, run, place.stack.rpartition(".")[2])
        return PassResult(gm, modified=bool(runs))
