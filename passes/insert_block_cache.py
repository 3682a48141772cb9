"""Make runs of blocks skippable: input plus the residual of the last full call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import (
    LAST,
    RESIDUAL,
    Blocks,
    CacheChange,
    Predictor,
    Signal,
    Site,
    Slot,
    change_at,
    layout_of,
    place_of,
)
from cachepass.ir.graph import add_guard, inputs_of, insert_conditional, outputs_of, same_shape
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertBlockCache:
    """Put each `Blocks` site under a conditional, inner ranges first.

    1. A stream that enters and leaves in one shape is replaced by input + residual; an output
       without such an input by its last value.
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
    pairs = _pair(nodes, outputs)
    # A change is measured on the main stream, which is the largest.
    main = max(range(len(pairs)), key=lambda i: pairs[i][0].meta["example_value"].numel())
    slots = []
    for i, (output, _, predictor) in enumerate(pairs):
        suffix = f".{i}" if len(pairs) > 1 else ""
        slot = Slot(
            name=f"{site.name}.{predictor.name}{suffix}",
            site=site.name,
            dtype=output.meta["example_value"].dtype,
        )
        layout.slots[slot.name] = slot
        slots.append(slot)

    def extend(
        graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]
    ) -> Sequence[fx.Node]:
        operands = list({mapping[n]: None for a, b, _ in pairs for n in (a, b)})

        def write(
            inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
        ) -> Sequence[fx.Node]:
            for i, (slot, (out, entering, predictor)) in enumerate(zip(slots, pairs, strict=True)):
                old = inner.call_function(
                    ops.cache_read, (inner_frame, slot.name, inside[mapping[out]])
                )
                value = inner.call_function(
                    predictor.store, (inside[mapping[out]], inside[mapping[entering]])
                )
                value.meta["example_value"] = out.meta["example_value"]
                if measured is not None and i == main:
                    sums = inner.call_function(ops.l1_sums, (value, old))
                    inner.call_function(ops.observe, (inner_frame, measured.name, slot.name, sums))
                inner.call_function(ops.cache_write, (inner_frame, slot.name, value))
            return ()

        add_guard(graph, frame, ops.When.FULL, operands, write)
        return ()

    def reuse(graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        results = []
        for slot, (out, entering, predictor) in zip(slots, pairs, strict=True):
            cached = graph.call_function(ops.cache_read, (frame, slot.name))
            cached.meta["example_value"] = out.meta["example_value"]
            value = graph.call_function(predictor.predict, (cached, mapping[entering]))
            value.meta["example_value"] = out.meta["example_value"]
            results.append(value)
        return results

    insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)


def _pair(
    nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> list[tuple[fx.Node, fx.Node, Predictor]]:
    """(output, the input it is predicted from, predictor) of each stream."""
    free = [n for n in inputs_of(nodes) if not n.meta.get("weight")]
    pairs = []
    for output in outputs:
        value = output.meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            raise PolicyError(
                f"{output.name} leaves a site and is no tensor ({type(value).__name__}): "
                "choose blocks that hand on tensors only"
            )
        match = next((n for n in free if _same(n, value)), None)
        if match is not None:
            free.remove(match)
            pairs.append((output, match, RESIDUAL))
        else:
            pairs.append((output, output, LAST))
    return pairs


def _same(node: fx.Node, value: torch.Tensor) -> bool:
    other = node.meta.get("example_value")
    return (
        isinstance(other, torch.Tensor) and same_shape(other, value) and other.dtype == value.dtype
    )
