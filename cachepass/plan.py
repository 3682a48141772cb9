"""What a policy will keep of a request, in bytes, from shapes alone."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cachepass import capture
from cachepass.ir.boundary import layout_of
from cachepass.lowering.shapes import slots_of_a_row
from cachepass.moe.shadow import Shadow
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.storage import Storage


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """One slot of one row."""

    name: str
    site: str | None
    """The site that it serves; None for the reference of a signal."""

    shape: torch.Size
    dtype: torch.dtype
    across_branches: bool
    """Whether all branches of guidance share it."""

    @property
    def bytes(self) -> int:
        """Of one row, and of one branch unless these share it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """The slots of a policy on a model, for inputs of one size."""

    policy: str
    slots: tuple[SlotPlan, ...]

    def bytes(self, *, rows: int = 1, branches: int = 2) -> int:
        """The most that requests of so many rows in all keep.

        Args:
            rows: samples, of one request or of several.
            branches: calls of each in a step, 2 with guidance.
        """
        return rows * sum(s.bytes * (1 if s.across_branches else branches) for s in self.slots)

    def of_site(self, site: str | None, *, rows: int = 1, branches: int = 2) -> int:
        """`bytes` of one site; of the references of signals if None."""
        mine = tuple(s for s in self.slots if s.site == site)
        return Plan(self.policy, mine).bytes(rows=rows, branches=branches)

    def __str__(self) -> str:
        lines = [f"{self.policy}: {_shown(self.bytes())} for a row with two branches"]
        sites = list(dict.fromkeys(s.site for s in self.slots))
        for site in sorted(sites, key=lambda site: -self.of_site(site)):
            lines.append(f"  {f'site {site}' if site else 'signals'}: {_shown(self.of_site(site))}")
            alike: dict[str, list[str]] = collections.defaultdict(list)
            for slot in (s for s in self.slots if s.site == site):
                shape = ", ".join(map(str, slot.shape))
                once = ", once for all branches" if slot.across_branches else ""
                kind = str(slot.dtype).removeprefix("torch.")
                alike[f"({shape}) {kind}, {_shown(slot.bytes)}{once}"].append(slot.name)
            for what, (first, *others) in alike.items():
                more = f" and {len(others)} more, each" if others else ""
                lines.append(f"    {first}{more}: {what}")
        return "\n".join(lines)


def _shown(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.4g} {units[0]}"


def plan(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    policy: str | os.PathLike[str] | AnyPolicy = "mixcache",
    options: dict[str, Any] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """What a policy keeps on a model: nothing is computed, so both may be on the meta device.

    ::

        with torch.device("meta"):
            model = WanTransformer3DModel(...)  # 14B: no memory is taken
            inputs = {"hidden_states": torch.empty(1, 16, 21, 90, 160), ...}
        print(cachepass.plan(model, inputs, policy="mixcache"))

    Args:
        model: a diffusion transformer, not compiled.
        example_inputs: keyword arguments of one call.
        policy: as in `compile`.
        options: as in `compile`.
        cache_dtype: as in `compile`.

    Raises:
        CaptureError: the call cannot be captured.
    """
    chosen = for_model(resolve(policy, options), model)
    gm, args = capture.capture_call(Shadow(model).module, example_inputs, {})
    gm = run_passes(gm, default_pipeline(chosen.sites, chosen.signals())).graph_module
    layout, storage = layout_of(gm), Storage(dtype=cache_dtype)
    return Plan(
        chosen.name,
        tuple(
            SlotPlan(
                name=name,
                site=layout.slots[name].site,
                shape=shape,
                dtype=storage.dtype_of(layout.slots[name], dtype),
                across_branches=layout.slots[name].across_branches,
            )
            for name, (shape, dtype) in slots_of_a_row(gm, args).items()
        ),
    )
