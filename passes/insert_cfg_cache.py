"""Make the unconditional call of a guided step skippable."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch import fx

from cachepass.ir import ops
from cachepass.ir.boundary import (
    CacheChange,
    Cfg,
    Layout,
    Signal,
    Site,
    Slot,
    change_at,
    layout_of,
)
from cachepass.ir.graph import BuildArm, add_guard, call_nodes, insert_conditional, outputs_of
from cachepass.ir.rows import kept_along
from cachepass.ir.skippable import Stream, declare, keep, kept_before, main_stream, predict
from cachepass.pass_manager import PassResult

Nodes = dict[fx.Node, fx.Node]


@dataclasses.dataclass(frozen=True)
class InsertCfgCache:
    """Put all that follows `decide` under a conditional for the unconditional branch.

    1. Each output is a stream. Each conditional call keeps its output c for the rest of the step;
       a full unconditional call that comes first keeps its own, u.
    2. The second of two full calls keeps the difference, ``u - c`` (or u itself, if that is
       what the predictor wants).
    3. A reused unconditional call returns this step's c plus what the predictor makes of it. Where
       it comes first, the frame sees to it that c is there (`runtime.frame`).
    The decision never applies to the conditional branch (the frame sees to that, too).
    """

    sites: tuple[Site, ...]
    signals: tuple[Signal, ...]
    name: str = "insert-cfg-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        site = next((s for s in self.sites if isinstance(s, Cfg)), None)
        if site is None or site.name in layout.coverage:
            return PassResult(gm, modified=False)
        measured = change_at(site, self.signals)
        nodes = call_nodes(gm)
        sides = [_declare(layout, site, o, measured is not None) for o in _numbered(nodes)]
        main = main_stream([side.delta for side in sides])

        def extend(graph: fx.Graph, frame: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
            for side in sides:
                compared = measured if side.delta is main else None
                _keep_sides(graph, frame, mapping[side.delta.output], site, side, compared)
            return ()

        def reuse(graph: fx.Graph, frame: fx.Node, _: Nodes) -> list[fx.Node]:
            found = []
            for side in sides:
                c = None
                if site.keep == "residual":
                    c = graph.call_function(ops.cache_read, (frame, side.cond.name))
                found.append(predict(graph, frame, site.stand_in, side.delta, c))
            return found

        outputs = [side.delta.output for side in sides]
        insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)
        layout.coverage[site.name] = frozenset(range(layout.probed, layout.blocks))
        return PassResult(gm, modified=True)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """What is kept of one output: of both branches in a step, and their difference."""

    cond: Slot
    uncond: Slot
    delta: Stream


def _numbered(nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, str]]:
    """The outputs of a call, with what follows the names of their slots."""
    outputs = outputs_of(nodes)
    return [(o, f".{i}" if len(outputs) > 1 else "") for i, o in enumerate(outputs)]


def _declare(layout: Layout, site: Cfg, numbered: tuple[fx.Node, str], reference: bool) -> _Sides:
    output, number = numbered
    delta = declare(
        layout, site, output, output, f"{site.name}.delta{number}",
        across_branches=True, reference=reference,
    )  # fmt: skip
    value = output.meta["example_value"]
    cond, uncond = (
        Slot(
            name=f"{site.name}.{branch}{number}",
            site=site.name,
            dtype=value.dtype,
            rows=kept_along(layout, value),
            across_branches=True,
            within_step=True,
        )
        for branch in ("cond", "uncond")
    )
    layout.slots |= {cond.name: cond, uncond.name: uncond}
    return _Sides(cond, uncond, delta)


def _keep_sides(
    graph: fx.Graph, frame: fx.Node, out: fx.Node, site: Cfg, side: _Sides,
    measured: CacheChange | None,
) -> None:  # fmt: skip
    """After a computed call: cases 1 and 2."""

    def keep_in(slot: Slot) -> BuildArm:
        def build(inner: fx.Graph, inner_frame: fx.Node, inside: Nodes) -> list[fx.Node]:
            value = inner.call_function(ops.clone, (inside[out],))
            inner.call_function(ops.cache_write, (inner_frame, slot.name, value))
            return []

        return build

    def keep_difference(other: Slot) -> BuildArm:
        def build(inner: fx.Graph, inner_frame: fx.Node, inside: Nodes) -> list[fx.Node]:
            old = kept_before(inner, inner_frame, side.delta, inside[out]) if measured else None
            pair = {side.cond: inside[out], side.uncond: inside[out]}
            pair[other] = inner.call_function(ops.cache_read, (inner_frame, other.name))
            value = (
                inner.call_function(operator.sub, (pair[side.uncond], pair[side.cond]))
                if site.keep == "residual"
                else inner.call_function(ops.clone, (pair[side.uncond],))
            )
            keep(inner, inner_frame, site.stand_in, side.delta, value, measured, old)
            return []

        return build

    add_guard(graph, frame, ops.When.COND, [out], keep_in(side.cond))
    add_guard(graph, frame, ops.When.UNCOND_FIRST, [out], keep_in(side.uncond))
    add_guard(graph, frame, ops.When.UNCOND_FULL, [out], keep_difference(side.cond))
    add_guard(graph, frame, ops.When.COND_FULL, [out], keep_difference(side.uncond))
