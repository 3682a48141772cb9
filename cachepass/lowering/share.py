"""Which regions of a whole graph are one subgraph for all their calls: Inductor compiles them once.

Only those that are called more than once in one graph: arms do not share a subgraph (torch 2.13).
And only those whose results are memory of their own: a subgraph may return no views, and Inductor
does not say so.
"""

from __future__ import annotations

import collections

from torch import fx
from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
from torch._inductor.decomposition import select_decomp_table

from cachepass.ir.graph import memory_of, walk


def share_regions(gm: fx.GraphModule) -> set[str]:
    """Their names; each is left ready to be called by `invoke_subgraph`."""
    callers: dict[str, list[fx.GraphModule]] = collections.defaultdict(list)
    for part in walk(gm):
        for node in part.graph.find_nodes(op="call_module"):
            callers[str(node.target)].append(part)
    # Named, as the arms of a `torch.cond` are first traced without any, and a subgraph is traced
    # once (torch 2.13).
    options = NestedCompileRegionOptions(decompositions=select_decomp_table())
    shared = set()
    for name, parts in callers.items():
        region = getattr(parts[0], name)
        if len(parts) > 1 and len(set(parts)) == 1 and _returns_its_own(region):
            region.meta["nested_region_config"] = options
            shared.add(name)
    return shared


def _returns_its_own(region: fx.GraphModule) -> bool:
    """Whether no result of a region shares memory with another one, or with an input."""
    made = [memory_of(node) for node in region.graph.output_node().all_input_nodes]
    given = {memory_of(node) for node in region.graph.find_nodes(op="placeholder")}
    return None not in made and len(made) == len({*made} - given)
