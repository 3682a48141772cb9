"""Make the whole call skippable: its last output once more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from cachepass.ir import ops
from cachepass.ir.boundary import Signal, Site, Slot, WholeCall, change_at, layout_of
from cachepass.ir.graph import add_guard, call_nodes, insert_conditional, outputs_of
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertStepCache:
    """Put all that follows `decide` under a conditional; each output has a slot.

    A `CacheChange` is measured at full calls, on the largest output.
    """

    sites: tuple[Site, ...]
    signals: tuple[Signal, ...]
    name: str = "insert-step-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        site = next((s for s in self.sites if isinstance(s, WholeCall)), None)
        if site is None or site.name in layout.coverage:
            return PassResult(gm, modified=False)
        measured = change_at(site, self.signals)
        nodes = call_nodes(gm, site.name)
        outputs = outputs_of(nodes)
        main = max(outputs, key=lambda o: o.meta["example_value"].numel())
        slots = {
            o: Slot(
                name=f"{site.name}.output.{i}",
                site=site.name,
                dtype=o.meta["example_value"].dtype,
            )
            for i, o in enumerate(outputs)
        }
        layout.slots |= {s.name: s for s in slots.values()}

        def extend(
            graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]
        ) -> Sequence[fx.Node]:
            def write(
                inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
            ) -> Sequence[fx.Node]:
                for output, slot in slots.items():
                    out = inside[mapping[output]]
                    # The output goes to the caller, who may write to it.
                    value = inner.call_function(ops.clone, (out,))
                    if measured is not None and output is main:
                        old = inner.call_function(ops.cache_read, (inner_frame, slot.name, out))
                        sums = inner.call_function(ops.l1_sums, (out, old))
                        inner.call_function(
                            ops.observe, (inner_frame, measured.name, slot.name, sums)
                        )
                    inner.call_function(ops.cache_write, (inner_frame, slot.name, value))
                return ()

            add_guard(graph, frame, ops.When.FULL, [mapping[o] for o in outputs], write)
            return ()

        def reuse(graph: fx.Graph, frame: fx.Node, _: dict[fx.Node, fx.Node]) -> list[fx.Node]:
            results = []
            for output, slot in slots.items():
                cached = graph.call_function(ops.cache_read, (frame, slot.name))
                value = graph.call_function(ops.clone, (cached,))
                value.meta["example_value"] = output.meta["example_value"]
                results.append(value)
            return results

        insert_conditional(gm, site.name, nodes, outputs, extend=extend, reuse=reuse)
        layout.coverage[site.name] = frozenset(range(layout.blocks))
        return PassResult(gm, modified=True)
