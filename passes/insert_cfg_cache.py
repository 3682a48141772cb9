"""Make the unconditional call of a guided step skippable."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import Cfg, Signal, Site, Slot, change_at, layout_of
from cachepass.ir.graph import BuildArm, add_guard, call_nodes, insert_conditional, outputs_of
from cachepass.ir.rows import kept_along
from cachepass.ir.skippable import declare, keep, kept_before, predict
from cachepass.pass_manager import PassResult

Nodes = dict[fx.Node, fx.Node]


@dataclasses.dataclass(frozen=True)
class InsertCfgCache:
    """Put all that follows `decide` under a conditional for the unconditional branch.

    1. Each conditional call keeps its output c for the rest of the step; a full unconditional call
       that comes first keeps its own, u.
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
        outputs = outputs_of(nodes)
        if len(outputs) != 1:
            raise PolicyError(
                f"site {site.name!r} needs a model with one output, this one returns {len(outputs)}"
            )
        output = outputs[0]
        cond, uncond = (
            Slot(
                name=f"{site.name}.{branch}",
                site=site.name,
                dtype=output.meta["example_value"].dtype,
                rows=kept_along(layout, output.meta["example_value"], weighed=False),
                across_branches=True,
                within_step=True,
            )
            for branch in ("cond", "uncond")
        )
        layout.slots |= {cond.name: cond, uncond.name: uncond}
        delta = declare(
            layout, site, output, output, f"{site.name}.delta",
            across_branches=True, reference=measured is not None,
        )  # fmt: skip
        relative = site.keep == "residual"

        def extend(graph: fx.Graph, frame: fx.Node, mapping: Nodes) -> Sequence[fx.Node]:
            out = mapping[output]

            def keep_in(slot: Slot) -> BuildArm:
                def build(inner: fx.Graph, inner_frame: fx.Node, inside: Nodes) -> list[fx.Node]:
                    value = inner.call_function(ops.clone, (inside[out],))
                    inner.call_function(ops.cache_write, (inner_frame, slot.name, value))
                    return []

                return build

            def keep_difference(other: Slot) -> BuildArm:
                def build(inner: fx.Graph, inner_frame: fx.Node, inside: Nodes) -> list[fx.Node]:
                    old = kept_before(inner, inner_frame, delta, inside[out]) if measured else None
                    pair = {cond: inside[out], uncond: inside[out]}
                    pair[other] = inner.call_function(ops.cache_read, (inner_frame, other.name))
                    value = (
                        inner.call_function(operator.sub, (pair[uncond], pair[cond]))
                        if relative
                        else inner.call_function(ops.clone, (pair[uncond],))
                    )
                    keep(inner, inner_frame, site.stand_in, delta, value, measured, old)
                    return []

                return build

            add_guard(graph, frame, ops.When.COND, [out], keep_in(cond))
            add_guard(graph, frame, ops.When.UNCOND_FIRST, [out], keep_in(uncond))
            add_guard(graph, frame, ops.When.UNCOND_FULL, [out], keep_difference(cond))
            add_guard(graph, frame, ops.When.COND_FULL, [out], keep_difference(uncond))
            return ()

        def reuse(graph: fx.Graph, frame: fx.Node, _: Nodes) -> list[fx.Node]:
            c = graph.call_function(ops.cache_read, (frame, cond.name)) if relative else None
            return [predict(graph, frame, site.stand_in, delta, c)]

        insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)
        layout.coverage[site.name] = frozenset(range(layout.probed, layout.blocks))
        return PassResult(gm, modified=True)
