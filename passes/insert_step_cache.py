"""Make the whole call skippable: its last output once more."""

from __future__ import annotations

import dataclasses

from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Signal, Site, WholeCall, change_at, layout_of
from cachepass.ir.graph import call_nodes, outputs_of
from cachepass.ir.skippable import declare, latent_of, make_skippable
from cachepass.pass_manager import PassResult


@dataclasses.dataclass(frozen=True)
class InsertStepCache:
    """Put all that follows `decide` under a conditional.

    1. Each output is a stream; a `CacheChange` is measured on the largest.
    2. Where residuals are kept, an output is predicted from the latent, of which it must have the
       shape (but for further channels of the latent, which are left out).
    """

    sites: tuple[Site, ...]
    signals: tuple[Signal, ...]
    name: str = "insert-step-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        layout = layout_of(gm)
        site = next((s for s in self.sites if isinstance(s, WholeCall)), None)
        if site is None or site.name in layout.coverage:
            return PassResult(gm, modified=False)
        nodes = call_nodes(gm)
        outputs, measured = outputs_of(nodes), change_at(site, self.signals)
        streams = []
        for i, output in enumerate(outputs):
            base = latent_of(gm, layout, output) if site.keep == "residual" else None
            if base is None and site.keep == "residual":
                raise PolicyError(
                    f"site {site.name!r} keeps residuals, and output {i} of the model has not the "
                    "shape of its latent: choose a predictor that keeps the output"
                )
            name, reference = f"{site.name}.{site.keep}.{i}", measured is not None
            streams.append(declare(layout, site, output, base, name, reference=reference))
        make_skippable(gm, site, nodes, streams, measured=measured)
        layout.coverage[site.name] = frozenset(range(layout.probed, layout.blocks))
        return PassResult(gm, modified=True)
