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
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertBlockCache:
    """Put each `Blocks` site under a conditional, inner ranges first.

    1. Where residuals are kept (the usual), what leaves is predicted from where its stream enters
       (that of a skip connection, too). Where no stream can be followed, it is the first input of
       its shape; an output without any is predicted from itself.
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
    bases = _bases(outputs, inputs_of(nodes)) if site.keep == "residual" else {}
    streams = []
    for i, output in enumerate(outputs):
        base = bases.get(output)
        name, reference = kept_name(site, i, len(outputs)), measured is not None
        streams.append(declare(layout, site, output, base, name, reference=reference))
    make_skippable(gm, site, nodes, streams, measured=measured)


def _bases(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Where the streams of a site enter it, as far as they do: case 1."""
    inputs = [n for n in inputs if not n.meta.get("weight")]
    found: dict[fx.Node, fx.Node] = {}
    for output in outputs:
        stream = output.meta.get("stream")
        same = [n for n in inputs if stream is not None and n.meta.get("stream") == stream]
        if (base := base_for(output, same)) is not None:
            found[output] = base
    followed = bool(found)  # then what cannot be followed is no stream (a hint, a mask)
    # Text is not in every block's output: each residual needs an input of its own.
    free = [] if followed else list(inputs)
    for output in outputs:
        if output not in found and (base := base_for(output, free)) is not None:
            found[output] = base
            free.remove(base)
        elif output not in found and free_unbacked_symbols(output.meta["example_value"]):
            raise PolicyError(
                f"{output.name} leaves a run of blocks, and its size is known at run time only: it "
                "cannot be told from which input it goes on"
            )
    return found
