"""What slots may hold, in bytes."""

from __future__ import annotations

import collections
import dataclasses
import math

import torch

from cachepass.runtime.storage import SCALE_BYTES


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

    scaled: bool = False
    """Whether it is kept over a scale."""

    @property
    def bytes(self) -> int:
        """Of one row, and of one branch unless these share it."""
        scale = SCALE_BYTES if self.scaled else 0
        return math.prod(self.shape) * self.dtype.itemsize + scale


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
