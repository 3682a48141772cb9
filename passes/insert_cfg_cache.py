"""Make the unconditional call of a guided step skippable."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import Cfg, Signal, Site, Slot, change_at, layout_of
from cachepass.ir.graph import add_guard, call_nodes, insert_conditional, outputs_of
from cachepass.ir.skippable import declare, keep, predict
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertCfgCache:
    """Put all that follows `decide` under a conditional for the unconditional branch.

    1. Each conditional call keeps its output for the rest of the step.
    2. A full unconditional call keeps the difference to it, ``u - c`` (the predictor may want
       u itself).
    3. A reused unconditional call returns this step's ``c`` plus what the predictor makes of it.
    The decision never applies to the conditional branch (the frame sees to it).
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
        cond = Slot(
            name=f"{site.name}.cond",
            site=site.name,
            dtype=output.meta["example_value"].dtype,
            across_branches=True,
            within_step=True,
        )
        layout.slots[cond.name] = cond
        delta = declare(layout, site, output, output, f"{site.name}.delta", across_branches=True)

        def extend(
            graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]
        ) -> Sequence[fx.Node]:
            out = mapping[output]

            def keep_cond(
                inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
            ) -> Sequence[fx.Node]:
                value = inner.call_function(ops.clone, (inside[out],))
                inner.call_function(ops.cache_write, (inner_frame, cond.name, value))
                return ()

            def write(
                inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
            ) -> Sequence[fx.Node]:
                if site.keep == "residual":
                    c = inner.call_function(ops.cache_read, (inner_frame, cond.name))
                    value = inner.call_function(operator.sub, (inside[out], c))
                else:
                    value = inner.call_function(ops.clone, (inside[out],))
                keep(inner, inner_frame, site.stand_in, delta, value, measured)
                return ()

            add_guard(graph, frame, ops.When.COND, [out], keep_cond)
            add_guard(graph, frame, ops.When.UNCOND_FULL, [out], write)
            return ()

        def reuse(graph: fx.Graph, frame: fx.Node, _: dict[fx.Node, fx.Node]) -> list[fx.Node]:
            c = graph.call_function(ops.cache_read, (frame, cond.name))
            return [
                predict(graph, frame, site.stand_in, delta, c if site.keep == "residual" else None)
            ]

        insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)
        layout.coverage[site.name] = frozenset(range(layout.probed, layout.blocks))
        return PassResult(gm, modified=True)
