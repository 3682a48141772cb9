"""Measure what the policy wants to know, and ask it: the `decide` of every call."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import (
    Against,
    BlockChange,
    CacheChange,
    Kind,
    LatentChange,
    Layout,
    OutputChange,
    Signal,
    Site,
    Slot,
    SublayerChange,
    Sublayers,
    TimestepChange,
    layout_of,
    place_of,
)
from cachepass.ir.graph import add_guard, frame_of, inputs_of, outputs_of, same_shape, value_of
from cachepass.ir.rows import kept_along
from cachepass.ir.skippable import latent_of
from cachepass.ir.streams import stream_origins
from cachepass.pass_manager import PassResult

_SELF = (Kind.SELF_ATTENTION, Kind.SPATIAL_ATTENTION, Kind.TEMPORAL_ATTENTION)
Nodes = dict[fx.Node, fx.Node]
Late = tuple[Sequence[Slot], fx.Node]
"""What is written at full calls, after the decision: slots and value."""


@dataclasses.dataclass(frozen=True)
class InsertSignals:
    """Insert the reads, sums and writes of each signal, then `decide` as early as they allow.

    1. `LatentChange` is measured at the first call of a step, before everything else; against the
       last full call, it is measured where that is refreshed, and serves later calls.
    2. `TimestepChange` is measured before the first block.
    3. `BlockChange` is measured after its blocks; its reference is refreshed after the decision.
    4. `SublayerChange` is measured inside its block, so that Inductor fuses it there; what it
       finds serves later calls. Where no self-attention is seen in the block (it may be linear),
       it is all that the block adds.
    5. `CacheChange` is measured where its site keeps its value, by the pass of that site.
    6. `OutputChange` is measured at the end.
    7. A policy without sites never decides: nothing is inserted.
    """

    sites: tuple[Site, ...]
    signals: tuple[Signal, ...]
    name: str = "insert-signals"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        graph = gm.graph
        if not self.sites or graph.find_nodes(op="call_function", target=ops.decide):
            return PassResult(gm, modified=False)  # case 7, or run before
        layout = layout_of(gm)
        frame = frame_of(gm)
        at = list(graph.find_nodes(op="placeholder"))[-1]
        late: list[Late] = []
        for signal in self.signals:
            if isinstance(signal, LatentChange) and signal.against is Against.STEP:
                latent = _latent(gm, layout)
                with graph.inserting_after(at if latent.op == "placeholder" else latent):
                    at = _measure_when(gm, frame, layout, signal, latent, ops.When.FIRST_CALL)
        for signal in self.signals:
            if isinstance(signal, TimestepChange):
                at = _measure_timestep(gm, frame, layout, signal)
        last = max((s.blocks for s in self.signals if isinstance(s, BlockChange)), default=0)
        if last:
            at = _block_nodes(graph, layout, last - 1)[-1]
        for signal in self.signals:
            if isinstance(signal, BlockChange):
                at, slots, value = _measure_blocks(gm, frame, layout, signal, at)
                if signal.against is Against.FULL:
                    late.append((slots, value))
        with graph.inserting_after(at):
            at = graph.call_function(ops.decide, (frame,))
        for slots, value in late:
            at = _write_when_full(gm, frame, at, slots, value)
        for signal in self.signals:
            if isinstance(signal, SublayerChange):
                _measure_sublayer(gm, frame, layout, signal)
            elif isinstance(signal, CacheChange):
                _check_site(signal, self.sites)
            elif isinstance(signal, LatentChange) and signal.against is Against.FULL:
                latent = _latent(gm, layout)
                with graph.inserting_after(at):
                    at = _measure_when(gm, frame, layout, signal, latent, ops.When.FIRST_FULL)
            elif isinstance(signal, OutputChange):
                output = _main_output(graph)
                with graph.inserting_before(graph.output_node()):
                    _measure_when(gm, frame, layout, signal, output, ops.When.FIRST_FULL)
        return PassResult(gm, modified=True)


def _declare(
    layout: Layout, signal: Signal, node: fx.Node, *, age: int = 0, across_branches: bool = False
) -> Slot:
    slot = Slot(
        name=signal.name + (f".{age}" if age else ""),
        site=None,
        dtype=value_of(node).dtype,
        rows=kept_along(layout, value_of(node)),
        reference=True,
        age=age,
        across_branches=across_branches,
    )
    layout.slots[slot.name] = slot
    return slot


def _latent(gm: fx.GraphModule, layout: Layout) -> fx.Node:
    """The latent, in the channels of the output where these can be told."""
    assert layout.latent is not None
    return latent_of(gm, layout, _main_output(gm.graph)) or layout.latent


def _main_output(graph: fx.Graph) -> fx.Node:
    """The largest tensor that the call returns."""
    outputs = [
        n for n in graph.output_node().all_input_nodes
        if isinstance(n.meta.get("example_value"), torch.Tensor)
    ]  # fmt: skip
    return max(outputs, key=lambda n: n.meta["example_value"].numel())


def _compare(graph: fx.Graph, frame: fx.Node, signal: Signal, slot: Slot, now: fx.Node) -> fx.Node:
    """Measure a value against what its slot holds, and keep a copy in its place."""
    old = graph.call_function(ops.cache_read, (frame, slot.name, now))
    pair = (old, now) if isinstance(signal, OutputChange) else (now, old)
    sums = graph.call_function(ops.l1_sums, (*pair, *slot.dim_argument))
    kept = graph.call_function(ops.clone, (now,))
    graph.call_function(ops.observe, (frame, signal.name, slot.name, sums))
    return graph.call_function(ops.cache_write, (frame, slot.name, kept))


def _measure_when(
    gm: fx.GraphModule, frame: fx.Node, layout: Layout, signal: Signal, value: fx.Node,
    when: ops.When,
) -> fx.Node:  # fmt: skip
    """A value that all branches share, under a condition, at the graph's insertion point."""
    slot = _declare(layout, signal, value, across_branches=True)

    def arm(graph: fx.Graph, inner: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
        _compare(graph, inner, signal, slot, mapping[value])
        return ()

    return add_guard(gm.graph, frame, when, (value,), arm, owner=gm)


def _measure_timestep(
    gm: fx.GraphModule, frame: fx.Node, layout: Layout, signal: TimestepChange
) -> fx.Node:
    embedding = layout.timestep_embedding
    if embedding is None:
        raise PolicyError(
            "the policy measures the timestep embedding, but no input of the first block depends "
            "on the timestep alone: use a policy with another trigger, such as 'firstblock'"
        )
    slot = _declare(layout, signal, embedding)
    graph = gm.graph
    first = next(n for n in graph.nodes if place_of(n))
    with graph.inserting_before(first):
        return _compare(graph, frame, signal, slot, embedding)


def _measure_blocks(
    gm: fx.GraphModule, frame: fx.Node, layout: Layout, signal: BlockChange, at: fx.Node
) -> tuple[fx.Node, Sequence[Slot], fx.Node]:
    """Measure before the decision. What the next call is compared with is kept at once."""
    graph = gm.graph
    first = _block_nodes(graph, layout, 0)
    nodes = first if signal.blocks == 1 else _block_nodes(graph, layout, signal.blocks - 1)
    layout.probed = max(layout.probed, signal.blocks)
    entering, _ = _stream(gm, first)
    _, leaving = _stream(gm, nodes)
    slots = [_declare(layout, signal, leaving, age=age) for age in range(2 if signal.trend else 1)]
    with graph.inserting_after(at):
        read = [graph.call_function(ops.cache_read, (frame, s.name, entering)) for s in slots]
    for node in read[1:]:  # after the first, in order
        read[0].append(node)
    with graph.inserting_after(read[-1]):
        value = (
            graph.call_function(torch.sub, (leaving, entering))
            if signal.keep == "residual"
            else graph.call_function(ops.clone, (leaving,))
        )
    value.meta["example_value"] = leaving.meta["example_value"]
    with graph.inserting_after(value):
        measure = ops.trend_sums if signal.trend else ops.l1_sums
        sums = graph.call_function(measure, (value, *read, *slots[0].dim_argument))
    with graph.inserting_after(sums):
        last = graph.call_function(ops.observe, (frame, signal.name, slots[0].name, sums))
    if signal.against is Against.STEP:
        with graph.inserting_after(last):
            last = graph.call_function(ops.cache_write, (frame, slots[0].name, value))
    return last, slots, value


def _write_when_full(
    gm: fx.GraphModule, frame: fx.Node, at: fx.Node, slots: Sequence[Slot], value: fx.Node
) -> fx.Node:
    def arm(graph: fx.Graph, inner: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
        mapping[value].meta["owned"] = True
        for older in slots[1:]:
            graph.call_function(ops.cache_shift, (inner, slots[0].name, older.name))
        graph.call_function(ops.cache_write, (inner, slots[0].name, mapping[value]))
        return ()

    with gm.graph.inserting_after(at):
        return add_guard(gm.graph, frame, ops.When.FULL, (value,), arm, owner=gm)


def _measure_sublayer(
    gm: fx.GraphModule, frame: fx.Node, layout: Layout, signal: SublayerChange
) -> None:
    index = signal.index(layout.blocks)
    graph, nodes = gm.graph, _block_nodes(gm.graph, layout, index)
    entering, leaving = _stream(gm, nodes)
    kinds = _SELF if signal.kind is Kind.SELF_ATTENTION else (signal.kind,)
    found = [
        s for s in layout.sublayers
        if s.block == index and s.kind in kinds
        and same_shape(value_of(s.cut or s.residual), value_of(entering))
    ]  # fmt: skip
    if found:
        residual, cut, place = found[0].residual, found[0].cut, place_of(found[0].residual)
    else:
        there = ", ".join(sorted({s.kind.value for s in layout.sublayers}) or ["none"])
        if signal.kind is not Kind.SELF_ATTENTION:
            raise PolicyError(
                f"the policy measures the {signal.kind.value} of block {index}, which was not "
                f"found; kinds of sublayers found in this model: {there}"
            )
        layout.missing[f"{signal.kind.value} of block {index}"] = (
            f"not found (kinds of sublayers in this model: {there}): what is measured is all that "
            "the block adds"
        )
        cut, place = None, place_of(leaving)
        with graph.inserting_after(leaving):
            residual = graph.call_function(operator.sub, (leaving, entering))
        residual.meta.update(place=place, example_value=leaving.meta["example_value"])
    if cut is not None:  # of the stream alone
        with graph.inserting_after(residual):
            residual = graph.call_function(operator.getitem, (residual, cut.args[1]))
        residual.meta.update(place=place, example_value=cut.meta["example_value"])
    slot = _declare(layout, signal, residual)
    frames: fx.Node | int | None = None
    if signal.motion and layout.patches is not None:
        size = layout.patches.meta["example_value"].shape[2]
        frames = size if isinstance(size, int) else None
        if frames is None:
            with graph.inserting_after(layout.patches):
                frames = graph.call_method("size", (layout.patches, 2))
            frames.meta["example_value"] = size
    elif signal.motion:
        layout.missing["motion"] = "no frame axis: the latent is not patched as a video"
    with graph.inserting_before(nodes[0]):
        old = graph.call_function(ops.cache_read, (frame, slot.name, entering))
    with graph.inserting_after(residual):
        kept = graph.call_function(ops.clone, (residual,))
    kept.meta.update(place=place, example_value=residual.meta["example_value"])
    with graph.inserting_after(kept):
        sums = (
            graph.call_function(ops.l1_sums, (residual, old, *slot.dim_argument))
            if frames is None
            else graph.call_function(ops.motion_sums, (residual, old, frames, *slot.dim_argument))
        )
    sums.meta["place"] = place

    def arm(inner_graph: fx.Graph, inner: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
        mapping[kept].meta["owned"] = True
        inner_graph.call_function(ops.observe, (inner, signal.name, slot.name, mapping[sums]))
        inner_graph.call_function(ops.cache_write, (inner, slot.name, mapping[kept]))
        return ()

    # What was added behind the last node of the block is its end now.
    with graph.inserting_after(nodes[-1] if found or leaving is not nodes[-1] else sums):
        guard = add_guard(graph, frame, ops.When.FULL, (sums, kept), arm, owner=gm)
    guard.meta["place"] = place


def _check_site(signal: CacheChange, sites: Sequence[Site]) -> None:
    fit = [site.name for site in sites if not isinstance(site, Sublayers)]
    if signal.site not in fit:
        raise PolicyError(
            f"signal {signal.name!r} measures what site {signal.site!r} caches: it must be one of "
            f"the policy's sites that keep one value ({', '.join(fit) or 'it has none'})"
        )


def _block_nodes(graph: fx.Graph, layout: Layout, index: int) -> list[fx.Node]:
    nodes = [n for n in graph.nodes if (p := place_of(n)) is not None and p.block == index]
    if not nodes:
        raise PolicyError(
            f"the policy looks at block {index} of a model with {layout.blocks} blocks: "
            f"the last one is {layout.blocks - 1}"
        )
    return nodes


def _stream(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The main stream of a block, where it enters and leaves: the largest.

    An output that is a sum over an input of its shape, else just of the shape of one.
    """
    entering = [n for n in inputs_of(nodes) if not n.meta.get("weight")]
    leaving = outputs_of(nodes)
    pairs = [
        (a, b)
        for b in leaving
        for a in entering
        if isinstance(va := a.meta.get("example_value"), torch.Tensor)
        and isinstance(vb := b.meta.get("example_value"), torch.Tensor)
        and same_shape(va, vb)
        and va.dtype == vb.dtype
    ]
    if not pairs:
        raise PolicyError("a block has no stream: no output of the shape of one of its inputs")
    origins = stream_origins(gm, nodes, entering)
    told = [(a, b) for a, b in pairs if a is next(iter(origins.get(b, ())), None)]
    return max(told or pairs, key=lambda pair: pair[1].meta["example_value"].numel())
