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
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertCfgCache:
    """Put all that follows `decide` under a conditional for the unconditional branch.

    1. Each conditional call keeps its output for the rest of the step.
    2. A full unconditional call keeps the difference to it, ``u - c``.
    3. A reused unconditional call returns this step's ``c`` plus that difference.
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
        nodes = call_nodes(gm, site.name)
        outputs = outputs_of(nodes)
        if len(outputs) != 1:
            raise PolicyError(
                f"site {site.name!r} needs a model with one output, this one returns {len(outputs)}"
            )
        output = outputs[0]
        dtype = output.meta["example_value"].dtype
        cond = Slot(
            name=f"{site.name}.cond",
            site=site.name,
            dtype=dtype,
            across_branches=True,
            within_step=True,
        )
        delta = Slot(name=f"{site.name}.delta", site=site.name, dtype=dtype, across_branches=True)
        layout.slots |= {cond.name: cond, delta.name: delta}

        def extend(
            graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]
        ) -> Sequence[fx.Node]:
            out = mapping[output]

            def keep(
                inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
            ) -> Sequence[fx.Node]:
                value = inner.call_function(ops.clone, (inside[out],))
                inner.call_function(ops.cache_write, (inner_frame, cond.name, value))
                return ()

            def write(
                inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
            ) -> Sequence[fx.Node]:
                c = inner.call_function(ops.cache_read, (inner_frame, cond.name))
                old = inner.call_function(ops.cache_read, (inner_frame, delta.name, inside[out]))
                value = inner.call_function(operator.sub, (inside[out], c))
                if measured is not None:
                    sums = inner.call_function(ops.l1_sums, (value, old))
                    inner.call_function(ops.observe, (inner_frame, measured.name, delta.name, sums))
                inner.call_function(ops.cache_write, (inner_frame, delta.name, value))
                return ()

            add_guard(graph, frame, ops.When.COND, [out], keep)
            add_guard(graph, frame, ops.When.UNCOND_FULL, [out], write)
            return ()

        def reuse(graph: fx.Graph, frame: fx.Node, _: dict[fx.Node, fx.Node]) -> list[fx.Node]:
            c = graph.call_function(ops.cache_read, (frame, cond.name))
            d = graph.call_function(ops.cache_read, (frame, delta.name))
            value = graph.call_function(operator.add, (c, d))
            value.meta["example_value"] = output.meta["example_value"]
            return [value]

        insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)
        layout.coverage[site.name] = frozenset(range(layout.blocks))
        return PassResult(gm, modified=True)
