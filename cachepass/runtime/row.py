"""One row of a running call, and what a report says of all of them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from cachepass.ir.boundary import Layout
from cachepass.runtime.policy import COMPUTE
from cachepass.runtime.session import CallRecord, Session


@dataclasses.dataclass(slots=True)
class Row:
    """One row of a running call: whose it is, and what was decided for it."""

    session: Session
    step: int
    branch: str
    sample: int
    before: tuple[str, ...]
    """Branches of its sample that were called before in this step."""

    first: bool
    """Whether it is the first of its sample in this step."""

    time: float = math.nan
    reused: frozenset[str] = COMPUTE
    full: bool = True
    """Whether it computes everything: caches are refreshed."""


def records(
    rows: Sequence[Row], layout: Layout, *, apart: bool
) -> list[tuple[Session, CallRecord]]:
    """What a call did, for each session and branch in it.

    Args:
        rows: those of the call.
        layout: of its graph.
        apart: whether rows that decided differently went their own ways.
    """
    of: dict[tuple[Session, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        of[row.session, row.branch].append(row)
    skipped = {
        id(row): frozenset().union(*(layout.coverage[name] for name in row.reused)) for row in rows
    }
    # Computed together, a block is saved when no row needed it.
    common = len(frozenset.intersection(*skipped.values()))
    found = []
    for (session, branch), mine in of.items():
        alone = sum(len(skipped[id(row)]) for row in mine) / len(mine)
        saved = alone if apart else common
        reused = tuple(row.reused for row in mine)
        blocks = layout.blocks
        found.append((session, CallRecord(mine[0].step, branch, reused, blocks - saved, blocks)))
    return found
