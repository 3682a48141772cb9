"""Make the residual branches of attention and MLP sublayers skippable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir import ops
from cachepass.ir.boundary import Site, Slot, Sublayer, Sublayers, layout_of
from cachepass.ir.graph import add_guard, insert_conditional
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertSublayerCache:
    """Put every sublayer of the wanted kinds under a conditional with a slot of its own.

    The residual itself is cached, so a reused sublayer is the stream plus the last residual.
    Runs before blocks are outlined, while their insides are still visible.
    """

    sites: tuple[Site, ...]
    name: str = "insert-sublayer-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        modified = False
        for site in self.sites:
            if not isinstance(site, Sublayers) or site.name in layout.coverage:
                continue
            found = [s for s in layout.sublayers if s.kind in site.kinds]
            if not found:
                kinds = sorted({s.kind.value for s in layout.sublayers}) or ["none"]
                raise PolicyError(
                    f"site {site.name!r} asks for sublayers of kind "
                    f"{', '.join(k.value for k in site.kinds)}; this model offers "
                    f"{', '.join(kinds)}"
                )
            for sublayer in found:
                _wrap(gm, site, sublayer)
            layout.coverage[site.name] = frozenset()
            modified = True
        return PassResult(gm, modified)


def _wrap(gm: fx.GraphModule, site: Sublayers, sublayer: Sublayer) -> None:
    layout = layout_of(gm)
    slot = Slot(
        name=f"{site.name}.{sublayer.block}.{sublayer.name}",
        site=site.name,
        dtype=sublayer.residual.meta["example_value"].dtype,
    )
    if slot.name in layout.slots:  # two branches of one name in a block
        slot = dataclasses.replace(slot, name=f"{slot.name}.{len(layout.slots)}")
    layout.slots[slot.name] = slot
    residual = sublayer.residual
    place = residual.meta["place"]
    # The branch becomes one node: bring its nodes together where the last of them stands.
    for node in sublayer.nodes[:-1]:
        sublayer.nodes[-1].prepend(node)

    def extend(
        graph: fx.Graph, frame: fx.Node, mapping: dict[fx.Node, fx.Node]
    ) -> Sequence[fx.Node]:
        kept = graph.call_function(ops.clone, (mapping[residual],))
        kept.meta.update(place=place, example_value=residual.meta["example_value"])

        def write(
            inner: fx.Graph, inner_frame: fx.Node, inside: dict[fx.Node, fx.Node]
        ) -> Sequence[fx.Node]:
            inside[kept].meta["owned"] = True
            inner.call_function(ops.cache_write, (inner_frame, slot.name, inside[kept]))
            return ()

        add_guard(graph, frame, ops.When.FULL, (kept,), write)
        return ()

    def reuse(graph: fx.Graph, frame: fx.Node, _: dict[fx.Node, fx.Node]) -> Sequence[fx.Node]:
        cached = graph.call_function(ops.cache_read, (frame, slot.name))
        cached.meta["example_value"] = residual.meta["example_value"]
        return (cached,)

    conditional = insert_conditional(
        gm, site.name, sublayer.nodes, (residual,), extend=extend, reuse=reuse
    )
    conditional.meta["place"] = place
