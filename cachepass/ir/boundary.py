"""Boundaries, sites, signals and slots: what passes and policies talk about.

A *boundary* is a place in the graph found by `passes.mark_boundaries`: the edge of a step,
of a guidance call, of a block, of a sublayer. A *site* is a stretch between boundaries
that a policy may skip; a *signal* a change that it wants measured; a *slot* where a value
stays between calls. Sites and signals are declared by policies, slots by passes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import fx

from cachepass.errors import PolicyError
from cachepass.ir.predictors import LAST, RESIDUAL, Keep, Predictor

# ----------------------------------------------------------------------------- sites


class Kind(enum.StrEnum):
    """The kind of a sublayer, read off its dataflow."""

    SELF_ATTENTION = "self-attention"
    SPATIAL_ATTENTION = "spatial-attention"
    TEMPORAL_ATTENTION = "temporal-attention"
    CROSS_ATTENTION = "cross-attention"
    MLP = "mlp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A stretch of the graph that a decision may skip, by the name that decisions use."""

    name: str
    predictor: Predictor | None = None
    """What stands in for it; None for the usual of its kind."""

    usual: ClassVar[Predictor]

    @property
    def stand_in(self) -> Predictor:
        """Its predictor."""
        return self.usual if self.predictor is None else self.predictor

    @property
    def keep(self) -> Keep:
        """Whether outputs or residuals are kept."""
        keep = self.stand_in.keep or self.usual.keep
        assert keep is not None
        return keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeCall(Site):
    """The call from the decision on, as a rule all of it: its last output is returned again.

    What the policy measures in the call itself (`BlockChange`, `TimestepChange`) runs before.
    The residual of a call is its output less the latent.
    """

    name: str = "step"
    usual: ClassVar[Predictor] = LAST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cfg(Site):
    """The unconditional call: this step's conditional output plus the last difference."""

    name: str = "cfg"
    usual: ClassVar[Predictor] = RESIDUAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Site):
    """A run of blocks ``[start, stop)``, replaced by input + residual.

    An int counts blocks (from the end if negative), a float is a share of them; `stop` None
    is the end. The defaults are the whole stack.
    """

    name: str = "stack"
    start: int | float = 0
    stop: int | float | None = None
    usual: ClassVar[Predictor] = RESIDUAL

    def range(self, blocks: int) -> tuple[int, int]:
        """First and one-past-last block of a model with this many blocks."""
        start = _position(self.start, blocks)
        stop = blocks if self.stop is None else _position(self.stop, blocks)
        if not 0 <= start < stop <= blocks:
            raise PolicyError(
                f"site {self.name!r} asks for blocks [{self.start}:{self.stop}], which of a "
                f"model with {blocks} blocks is [{start}:{stop}]: it must hold at least one "
                f"block and lie within [0:{blocks}]"
            )
        return start, stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sublayers(Site):
    """The residual branch of every attention or MLP sublayer of these kinds."""

    kinds: tuple[Kind, ...]
    optional: bool = False
    """Whether a model without such sublayers is no error, if another site of the policy fits."""

    usual: ClassVar[Predictor] = LAST


def _position(where: int | float, blocks: int) -> int:
    if isinstance(where, float):
        return int(where * blocks)
    return where + blocks if where < 0 else where


# --------------------------------------------------------------------------- signals


class Against(enum.StrEnum):
    """What a signal compares with."""

    STEP = "step"
    """The step before, or of signals per branch the branch's call before."""

    FULL = "full"
    """The last full call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signal:
    """A change to be measured in the graph: ``sum|now - kept|`` and ``sum|kept|`` per row."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentChange(Signal):
    """The noisy latent, once per step, against the one of the step before or of the last full call.

    Where the model takes more channels than it returns (image-to-video), those that are returned.
    """

    name: str = "latent"
    against: Against = Against.STEP


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputChange(Signal):
    """The output of a step's first call, at full calls, against the last full one.

    Its `ref` is the sum of the new output, not of the old one.
    """

    name: str = "output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepChange(Signal):
    """The embedding of the timestep that enters the blocks, against the call before."""

    name: str = "timestep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockChange(Signal):
    """What the first blocks did, before the decision, against the call before or the last full one.

    `second` of its measure, with `trend`: Σ|p − p2| / Σ|p1 − p2|, p1 and p2 the values at the last
    two full calls.
    """

    name: str = "probe"
    blocks: int = 1
    """How many blocks are run for it."""

    keep: Keep = "residual"
    against: Against = Against.FULL
    trend: bool = False
    """Only against full calls."""

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise PolicyError(f"BlockChange(`blocks`={self.blocks!r}): must be at least 1")
        if self.trend and self.against is not Against.FULL:
            raise PolicyError(
                f"BlockChange(`trend`=True, `against`={self.against.value!r}): a trend is taken "
                "against full calls, `against`=Against.FULL"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SublayerChange(Signal):
    """The residual of one sublayer, against the last full call.

    `second` of its measure, with `motion`: the change from video frame to frame over the size.
    """

    name: str = "sublayer"
    kind: Kind = Kind.SELF_ATTENTION
    block: int | float = 0.5
    motion: bool = False

    def index(self, blocks: int) -> int:
        """The block that is looked at, of this many."""
        return min(_position(self.block, blocks), blocks - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheChange(Signal):
    """The object that a site caches, against what it cached before, at full calls."""

    site: str


def change_at(site: Site, signals: Iterable[Signal]) -> CacheChange | None:
    """The signal that measures what a site caches, if a policy wants it."""
    return next((s for s in signals if isinstance(s, CacheChange) and s.site == site.name), None)


# ----------------------------------------------------------------------------- slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Named storage of one cached tensor."""

    name: str
    site: str | None
    """The site whose reuse reads it; None for the reference of a signal."""

    dtype: torch.dtype
    """Of the value that is kept; a cold read has it, too."""

    across_branches: bool = False
    """One value for all branches of a session instead of one for each."""

    within_step: bool = False
    """Only good within the step that wrote it."""

    age: int = 0
    """0 for the newest value, 1 for the one before it, ..."""

    rows: int | None = 0
    """The dimension of the value that carries rows, if one does."""

    reference: bool = False
    """Whether a signal is measured against it."""

    @property
    def dim_argument(self) -> tuple[int, ...]:
        """The `dim` for functions that measure or weigh rows; none for rows in front."""
        return (self.rows,) if self.rows else ()

    def key(self, branch: str, sample: int) -> tuple[str | None, int, str]:
        """Where a session keeps the value of a row."""
        return (None if self.across_branches else branch, sample, self.name)

    def ages(self, count: int) -> list[str]:
        """Of the newest value: the names of its slot and those of the values before it."""
        return [self.name, *(f"{self.name}.{age}" for age in range(1, count))]


# ---------------------------------------------------------------------------- layout


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a node belongs, stored as ``node.meta["place"]``."""

    stack: str
    block: int
    """Counted over all stacks, in execution order."""

    def __str__(self) -> str:
        return f"{self.stack}@{self.block}"


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """A residual branch of a block: ``stream = stream + residual``."""

    name: str
    kind: Kind
    block: int
    residual: fx.Node
    nodes: tuple[fx.Node, ...]
    """The nodes that feed the residual and nothing else, in graph order; none where other streams
    share it, so that it cannot be skipped."""
    cut: fx.Node | None = None
    """Where the stream is a slice of what the residual is added to: that slice."""


@dataclasses.dataclass
class Layout:
    """What was found in the captured graph; kept as ``gm.meta["layout"]``."""

    stacks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Name of each stack of blocks and its number of blocks, in execution order."""

    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    """Module lists that are no stacks, with the reason."""

    inputs: dict[str, fx.Node] = dataclasses.field(default_factory=dict)
    """The user's tensor arguments by name; every other placeholder is a weight or a number."""

    latent: fx.Node | None = None
    listed: bool = False
    """Whether the latent is an item of a list of samples: they are one row then."""

    timestep: fx.Node | None = None
    timestep_embedding: fx.Node | None = None
    """What the first block receives that depends on the timestep and not on the latent."""

    patches: fx.Node | None = None
    """(rows, channels, frames, height, width): the latent after patching, before it is
    flattened to the tokens that enter the first block."""

    batch: int = 1
    """Rows of the call that was captured."""

    row_symbols: frozenset[Any] = frozenset()
    """Sizes that count rows, as symbols; none where the batch has one size only."""

    row_multiples: frozenset[Any] = frozenset()
    """Sizes that are a multiple of the rows, each with its parts side by side (frames)."""

    mixed_by: dict[Any, str] = dataclasses.field(default_factory=dict)
    """The other multiples, each with the operation that puts a row's parts apart, or may."""

    rows_mixed: str = ""
    """Why requests may not share a call: what a slot holds, where its rows cannot be told."""

    probed: int = 0
    """Blocks that run before the decision, since the policy looks at them."""

    sublayers: list[Sublayer] = dataclasses.field(default_factory=list)
    slots: dict[str, Slot] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    """Slots in the order in which a call reads them (filled in by `eliminate-dead-cache`)."""

    coverage: dict[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    """Blocks that a site skips, by site name (filled in by the insertion passes)."""

    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    """Sites and signals that the model does not offer, with the reason."""

    def lasting(self, site: str) -> list[Slot]:
        """What a site keeps from step to step, the newest values."""
        slots = self.slots.values()
        return [s for s in slots if s.site == site and not s.within_step and not s.age]

    @property
    def blocks(self) -> int:
        """Blocks of all stacks together."""
        return sum(self.stacks.values())


def place_of(node: fx.Node) -> Place | None:
    """The block that a node belongs to; None outside the stacks."""
    place: Any = node.meta.get("place")
    return place if isinstance(place, Place) else None


def call_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """What a rewritten graph, or an arm of one, is given besides the frame, in order."""
    return [n for n in gm.graph.find_nodes(op="placeholder") if n.target != "frame"]


def layout_of(gm: fx.GraphModule) -> Layout:
    """The layout that `passes.mark_boundaries` left on a graph."""
    layout = gm.meta.get("layout")
    if not isinstance(layout, Layout):
        raise LookupError("this graph has no layout: run MarkBoundaries first")
    return layout
