"""Put a site under a conditional: slots, what is kept where it computes, what stands in.

The insertion passes find a site's nodes and streams; everything that follows from its
predictor is the same for all of them and stands here.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import CacheChange, Layout, Place, Site, Slot
from cachepass.ir.graph import add_guard, insert_conditional, same_shape
from cachepass.ir.predictors import Predictor, weighted_sum
from cachepass.ir.rows import kept_along

Nodes = dict[fx.Node, fx.Node]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A value that leaves a site, and what it is predicted from."""

    output: fx.Node
    base: fx.Node | None
    """The same stream where it enters, to which a residual is added; None: the output is kept."""

    slots: tuple[tuple[Slot, ...], ...]
    """Part by part, the newest first."""


def declare(
    layout: Layout, site: Site, output: fx.Node, base: fx.Node | None, name: str,
    *, across_branches: bool = False, reference: bool = False,
) -> Stream:  # fmt: skip
    """A stream of a site, with its slots in the layout; the newest part is called `name`.

    `reference` where a `CacheChange` is measured against what is kept.
    """
    value: object = output.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise PolicyError(
            f"{output.name} leaves site {site.name!r} and is no tensor "
            f"({type(value).__name__}): choose blocks that hand on tensors only"
        )
    slots = tuple(
        tuple(
            Slot(
                name=name + (f".{part}" if part else "") + (f".{age}" if age else ""),
                site=site.name,
                dtype=value.dtype,
                rows=kept_along(layout, value),
                reference=reference,
                across_branches=across_branches,
                age=age,
            )
            for age in range(site.stand_in.history)
        )
        for part in site.stand_in.parts
    )
    layout.slots |= {slot.name: slot for ages in slots for slot in ages}
    return Stream(output, base, slots)


def kept_name(site: Site, number: int, count: int) -> str:
    """``<site>.<residual or output>``, numbered where a site has several streams."""
    return f"{site.name}.{site.keep}" + (f".{number}" if count > 1 else "")


def base_for(output: fx.Node, candidates: Sequence[fx.Node]) -> fx.Node | None:
    """The first candidate of an output's shape and dtype."""
    value = output.meta.get("example_value")
    for node in candidates:
        other = node.meta.get("example_value")
        if (
            isinstance(value, Tensor) and isinstance(other, Tensor)
            and same_shape(value, other) and value.dtype == other.dtype
        ):  # fmt: skip
            return node
    return None


def main_stream(streams: Sequence[Stream]) -> Stream:
    """The one on which a change is measured: the largest."""
    return max(streams, key=lambda s: s.output.meta["example_value"].numel())


def make_skippable(
    gm: fx.GraphModule,
    site: Site,
    nodes: Sequence[fx.Node],
    streams: Sequence[Stream],
    *,
    measured: CacheChange | None = None,
    place: Place | None = None,
) -> fx.Node:
    """Put `nodes` under a conditional that stands in for `streams` where it is reused.

    Args:
        gm: the owning graph, edited in place.
        site: what the decision is asked for.
        nodes: what is skipped.
        streams: all values of `nodes` that are used outside.
        measured: the signal that measures what is kept, on the largest stream.
        place: of nodes inside a block: what is kept is then made there, at every computed call,
            so that Inductor fuses it with what made the value.
    """
    outputs = [s.output for s in streams]
    bases = list({s.base: None for s in streams if s.base is not None})
    main = main_stream(streams)

    def extend(graph: fx.Graph, frame: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
        values = {}
        if place is not None:
            for stream in streams:
                node = mapping[stream.output]
                values[stream.output] = _value(graph, stream, node, mapping)
                values[stream.output].meta["place"] = place
        given = values or {n: mapping[n] for n in (*outputs, *bases)}

        def write(inner: fx.Graph, inner_frame: fx.Node, inside: Nodes) -> Sequence[fx.Node]:
            for stream in streams:
                value = inside[given[stream.output]]
                compared = measured if stream is main else None
                old = kept_before(inner, inner_frame, stream, value) if compared else None
                if values:
                    value.meta["owned"] = True
                else:
                    own = {n: inside[g] for n, g in given.items()}
                    value = _value(inner, stream, value, own)
                keep(inner, inner_frame, site.stand_in, stream, value, compared, old)
            return ()

        add_guard(graph, frame, ops.When.FULL, list(given.values()), write)
        return ()

    def reuse(graph: fx.Graph, frame: fx.Node, mapping: Nodes) -> list[fx.Node]:
        return [
            predict(graph, frame, site.stand_in, s, mapping[s.base] if s.base else None)
            for s in streams
        ]

    return insert_conditional(
        gm, site.name, nodes, outputs, extra=bases, extend=extend, reuse=reuse
    )


def _value(graph: fx.Graph, stream: Stream, output: fx.Node, mapping: Nodes) -> fx.Node:
    """What is kept: the residual, or a copy of the output, which goes to others as well."""
    if stream.base is None:
        value = graph.call_function(ops.clone, (output,))
    else:
        value = graph.call_function(operator.sub, (output, mapping[stream.base]))
    value.meta["example_value"] = stream.output.meta["example_value"]
    return value


def kept_before(graph: fx.Graph, frame: fx.Node, stream: Stream, like: fx.Node) -> fx.Node:
    """What a stream's first part was: read before the new value is made, to fuse with that."""
    return graph.call_function(ops.cache_read, (frame, stream.slots[0][0].name, like))


def keep(
    graph: fx.Graph, frame: fx.Node, predictor: Predictor, stream: Stream, value: fx.Node,
    measured: CacheChange | None, old: fx.Node | None,
) -> None:  # fmt: skip
    """Measure a value against what was kept before, then keep it, part by part."""
    parts = [value]
    if len(stream.slots) > 1:
        split = graph.call_function(predictor.split, (value,))
        parts = [
            graph.call_function(operator.getitem, (split, i)) for i in range(len(stream.slots))
        ]
    for part, ages in zip(parts, stream.slots, strict=True):
        if measured is not None and part is parts[0]:
            sums = graph.call_function(ops.l1_sums, (part, old, *ages[0].dim_argument))
            graph.call_function(ops.observe, (frame, measured.name, ages[0].name, sums))
        for newer, older in reversed(list(itertools.pairwise(ages))):
            graph.call_function(ops.cache_shift, (frame, newer.name, older.name))
        graph.call_function(ops.cache_write, (frame, ages[0].name, part))


def predict(
    graph: fx.Graph, frame: fx.Node, predictor: Predictor, stream: Stream, base: fx.Node | None
) -> fx.Node:
    """What stands in for a stream."""
    newest = stream.slots[0][0]
    first = graph.call_function(ops.cache_read, (frame, newest.name))
    first.meta["example_value"] = stream.output.meta["example_value"]
    if not predictor.weighted:
        if base is None:
            value = graph.call_function(ops.clone, (first,))
        else:
            value = graph.call_function(operator.add, (first, base))
    else:
        count = len(stream.slots) * predictor.history
        weights = graph.call_function(ops.weights, (frame, newest.name, count, first))
        kept = [
            first if slot is newest
            else graph.call_function(ops.cache_read, (frame, slot.name, first))
            for ages in stream.slots for slot in ages
        ]  # fmt: skip
        value = graph.call_function(
            weighted_sum, (weights, tuple(kept), base, *newest.dim_argument)
        )
    value.meta["example_value"] = stream.output.meta["example_value"]
    return value


def latent_of(gm: fx.GraphModule, layout: Layout, output: fx.Node) -> fx.Node | None:
    """The latent in the shape of an output.

    It is cut to the output's channels, or filled up with zeros where the output has more of them
    (variances, say): these are kept as they are.
    """
    latent = layout.latent
    assert latent is not None
    if (found := base_for(output, [latent])) is not None:
        return found
    x: torch.Tensor = latent.meta["example_value"]
    y: torch.Tensor = output.meta["example_value"]
    fits = x.ndim == y.ndim and all(
        str(a) == str(b) for d, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if d != 1
    )
    if not fits or x.dtype != y.dtype:
        return None
    further = y.shape[1] - x.shape[1]
    with gm.graph.inserting_after(list(gm.graph.find_nodes(op="placeholder"))[-1]):
        if further < 0:
            part = gm.graph.call_method("narrow", (latent, 1, 0, y.shape[1]))
        else:
            sides = [0, 0] * (x.ndim - 2) + [0, further]
            part = gm.graph.call_function(torch.nn.functional.pad, (latent, sides))
    part.meta["example_value"] = y
    return part
