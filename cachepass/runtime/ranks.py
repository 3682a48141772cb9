"""Several processes that work on one request: they decide alike, on what all of them measured.

Tokens may be split among them, or the branches of guidance. Before it decides, each tells the
others what it would have decided on, in one table of numbers; each then puts the tables of all
together in the same way, and so comes to the same decision.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cachepass.errors import CachePassError, SessionError
from cachepass.ir.boundary import LatentChange, OutputChange, Signal
from cachepass.runtime.policy import UNMEASURED, Measure

_FIRST = zlib.crc32(b"cond")
_OF_ONE_CALL = (LatentChange, OutputChange)
"""Signals that a step's first call measures for all branches."""


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What is known of a row before its decision."""

    step: int
    branch: str
    fresh: bool
    """Whether nothing was decided for it yet, or all that was is forgotten."""

    warm: frozenset[str]
    """Sites that could be reused."""

    signals: Mapping[str, Measure]


@dataclasses.dataclass(frozen=True, slots=True)
class _Told:
    """One row of one rank's table."""

    step: float
    branch: float
    fresh: float
    warm: Sequence[float]
    measures: Sequence[Measure]


class Ranks:
    """The processes of a group, as one of them sees it."""

    def __init__(self, group: object) -> None:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise CachePassError(
                f"`group`={group!r}: must be a torch.distributed.ProcessGroup that this process "
                "belongs to, of all that work on one request"
            )
        self._group = group
        self.count = dist.get_world_size(group)
        self.exchanges, self.bytes = 0, 0
        """How often tables were exchanged, and what this rank has sent."""

    def agree(
        self,
        rows: Sequence[Known],
        sites: Sequence[str],
        signals: Sequence[Signal],
        device: torch.device,
    ) -> list[Known]:
        """What all ranks know of the same rows, in one collective; the same on each of them.

        A site is warm where it is on all ranks. A row that is fresh on one rank is fresh on all.
        A signal that one rank has not, has as NaN or has of another step is no evidence.

        Raises:
            SessionError: the ranks are not at the same step.
        """
        own = [[*_numbers(known, sites, signals)] for known in rows]
        tables = self._exchange(torch.tensor(own, dtype=torch.float64), device)
        agreed = []
        for i, known in enumerate(rows):
            told = [_told(table[i], len(sites)) for table in tables]
            steps = [int(one.step) for one in told]
            if len(set(steps)) > 1:
                raise SessionError(
                    f"the ranks of `group` are at steps {', '.join(map(str, steps))}: they decide "
                    "together, so each makes the same calls in the same order"
                )
            warm = [s for j, s in enumerate(sites) if all(one.warm[j] for one in told)]
            found = {s.name: _sum(s, told, j) for j, s in enumerate(signals)}
            agreed.append(
                dataclasses.replace(
                    known,
                    fresh=any(one.fresh for one in told),
                    warm=frozenset(warm),
                    signals={name: m for name, m in found.items() if m.step >= 0},
                )
            )
        return agreed

    def _exchange(self, own: Tensor, device: torch.device) -> list[list[list[float]]]:
        on_host = dist.get_backend(self._group) == dist.Backend.GLOO
        own = own if on_host else own.to(device)
        tables = [torch.empty_like(own) for _ in range(self.count)]
        # Gathered and not reduced: so a rank that lacks something shows, and all add up in the
        # same order.
        dist.all_gather(tables, own, group=self._group)
        self.exchanges += 1
        self.bytes += own.nbytes
        gathered: list[list[list[float]]] = torch.stack(tables).tolist()
        return gathered


def _numbers(known: Known, sites: Sequence[str], signals: Sequence[Signal]) -> Sequence[float]:
    """A row of a table: as long on each rank, whatever is known there."""
    numbers: list[float] = [known.step, zlib.crc32(known.branch.encode()), known.fresh]
    numbers += [site in known.warm for site in sites]
    for signal in signals:
        m = known.signals.get(signal.name, UNMEASURED)
        numbers += [m.diff, m.ref, m.step, m.gap, *(m.moves or (0.0, 0.0))]
    return numbers


def _told(row: Sequence[float], sites: int) -> _Told:
    step, branch, fresh, *rest = row
    values = iter(rest[sites:])
    measures = [
        Measure(diff, ref, int(of), int(gap), moves=(moved, size) if size > 0 else None)
        for diff, ref, of, gap, moved, size in zip(*[values] * 6, strict=True)
    ]
    return _Told(step, branch, fresh, rest[:sites], measures)


def _sum(signal: Signal, told: Sequence[_Told], j: int) -> Measure:
    """A signal of all ranks.

    What is whole on each rank (a latent, an embedding, an output) is counted as often as there are
    ranks. That leaves its ratio as it is, as well as a ratio to another one that is whole.
    """
    branches = [one.branch for one in told]
    if isinstance(signal, _OF_ONE_CALL):  # in one process the conditional call comes first
        first = _FIRST if _FIRST in branches else branches[0]
        told = [one for one in told if one.branch == first]
    parts = [one.measures[j] for one in told]
    if len({(m.step, m.gap) for m in parts}) > 1:
        return UNMEASURED
    # Of each branch a ratio, then their mean: as where one process makes the calls of all.
    moves: dict[float, tuple[float, float]] = {}
    for one, m in zip(told, parts, strict=True):
        if m.moves is not None:
            moved, size = moves.get(one.branch, (0.0, 0.0))
            moves[one.branch] = moved + m.moves[0], size + m.moves[1]
    ratios = [moved / size for moved, size in moves.values()]
    return Measure(
        diff=math.fsum(m.diff for m in parts),
        ref=math.fsum(m.ref for m in parts),
        step=parts[0].step,
        gap=parts[0].gap,
        second=sum(ratios) / len(ratios) if ratios else None,
    )
