"""Make the residual branches of attention and MLP sublayers skippable."""

from __future__ import annotations

import dataclasses

from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Site, Sublayer, Sublayers, layout_of, place_of
from cachepass.ir.skippable import declare, make_skippable
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
            skippable = [s for s in layout.sublayers if s.nodes]
            found = [s for s in skippable if s.kind in site.kinds]
            kinds = ", ".join(sorted({s.kind.value for s in skippable})) or "none"
            wanted = ", ".join(k.value for k in site.kinds)
            if not found and site.optional:
                layout.missing[f"site {site.name!r}"] = f"no {wanted} here; found: {kinds}"
                continue
            if not found:
                raise PolicyError(
                    f"site {site.name!r} asks for sublayers of kind {wanted}; this model offers "
                    f"{kinds}"
                )
            for sublayer in found:
                _wrap(gm, site, sublayer)
            layout.coverage[site.name] = frozenset()
            modified = True
        if self.sites and all(f"site {s.name!r}" in layout.missing for s in self.sites):
            raise PolicyError(
                "nothing to cache: the model has none of the policy's sites ("
                + "; ".join(f"{what}: {why}" for what, why in layout.missing.items())
                + ")"
            )
        return PassResult(gm, modified)


def _wrap(gm: fx.GraphModule, site: Sublayers, sublayer: Sublayer) -> None:
    layout = layout_of(gm)
    name = f"{site.name}.{sublayer.block}.{sublayer.name}"
    if name in layout.slots:  # two branches of one name in a block
        name = f"{name}.{len(layout.slots)}"
    stream = declare(layout, site, sublayer.residual, None, name)
    place = place_of(sublayer.residual)
    # The branch becomes one node: bring its nodes together where the last of them stands.
    for node in sublayer.nodes[:-1]:
        sublayer.nodes[-1].prepend(node)
    conditional = make_skippable(gm, site, sublayer.nodes, [stream], place=place)
    conditional.meta["place"] = place
