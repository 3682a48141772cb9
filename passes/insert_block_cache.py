"""Make runs of blocks skippable: input plus the residual of the last full call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import (
    Blocks,
    CacheChange,
    Signal,
    Site,
    change_at,
    layout_of,
    place_of,
)
from cachepass.ir.graph import inputs_of, outputs_of
from cachepass.ir.skippable import base_for, declare, kept_name, make_skippable
from cachepass.ir.streams import stream_origins
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertBlockCache:
    """Put each `Blocks` site under a conditional, inner ranges first.

    1. Where residuals are kept (the usual), a stream that enters and leaves in one shape is
       predicted from where it enters; an output without such an input from itself. What leaves
       as a sum over what enters is one stream with it (`ir.streams`); where nothing does,
       the first input of its shape counts.
    2. The slots are written at full calls only; a `CacheChange` is measured just before.
    3. Ranges may lie inside each other, but may not overlap.
    """

    sites: tuple[Site, ...]
    signals: tuple[Signal, ...]
    name: str = "insert-block-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        ranges = [
            (site, *site.range(layout.blocks))
            for site in self.sites
            if isinstance(site, Blocks) and site.name not in layout.coverage
        ]
        for site, start, stop in sorted(ranges, key=lambda r: r[2] - r[1]):
            for other, low, high in ranges:
                if start < low < stop < high:
                    raise PolicyError(
                        f"sites {site.name!r} [{start}:{stop}] and {other.name!r} [{low}:{high}] "
                        "overlap: one must hold the other, or they must be apart"
                    )
            _wrap(gm, site, start, stop, change_at(site, self.signals))
            layout.coverage[site.name] = frozenset(range(start, stop))
        return PassResult(gm, modified=bool(ranges))


def _wrap(
    gm: fx.GraphModule,
    site: Blocks,
    start: int,
    stop: int,
    measured: CacheChange | None,
) -> None:
    layout = layout_of(gm)
    everything = list(gm.graph.nodes)
    placed = [i for i, n in enumerate(everything) if (p := place_of(n)) and start <= p.block < stop]
    nodes = everything[placed[0] : placed[-1] + 1]
    if any(n.target is ops.decide for n in nodes):
        raise PolicyError(
            f"site {site.name!r} starts at block {start}, before the policy has measured what it "
            "decides on: let it start after the block of the signal"
        )
    outputs = outputs_of(nodes)
    bases = _bases(gm, nodes, outputs) if site.keep == "residual" else {}
    streams = []
    for i, output in enumerate(outputs):
        name, reference = kept_name(site, i, len(outputs)), measured is not None
        streams.append(declare(layout, site, output, bases.get(output), name, reference=reference))
    make_skippable(gm, site, nodes, streams, measured=measured)


def _bases(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Where each stream that leaves a run enters it, in the same shape."""
    free = [n for n in inputs_of(nodes) if not n.meta.get("weight")]
    origins = stream_origins(gm, nodes, free)
    found = {o: base for o in outputs if (base := base_for(o, origins.get(o, ()))) is not None}
    if found:  # an output that is no sum is no stream: a hint, a mask
        return found
    # Nothing is told by sums. Text is not in every block's output: each needs an input of its own.
    for output in outputs:
        base = base_for(output, free)
        if base is not None:
            free.remove(base)
            found[output] = base
        elif free_unbacked_symbols(output.meta["example_value"]):
            raise PolicyError(
                f"{output.name} leaves a run of blocks, and its size is known at run time only: it "
                "cannot be told from which input it goes on"
            )
    return found
