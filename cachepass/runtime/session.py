"""One request: its slots, the state of its rows, its history."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from cachepass.errors import SessionError
from cachepass.ir.boundary import Cfg, Layout, Site, Slot
from cachepass.runtime.clock import Clock, Conditioning
from cachepass.runtime.policy import UNMEASURED, Measure
from cachepass.runtime.storage import Kept

Key = tuple[str | None, int, str]
"""Branch (None: of all), sample and name of something that is kept."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallRecord:
    """What happened in one call, for the report."""

    step: int
    branch: str
    reused: tuple[frozenset[str], ...]
    """Per row, the sites that were reused."""

    blocks_computed: float
    blocks: int


@dataclasses.dataclass(slots=True)
class History:
    """What a report says of a request; outlives its session and holds no tensors."""

    num_steps: int | None
    records: list[CallRecord] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0

    @property
    def reused(self) -> bool:
        """Whether any call reused anything."""
        return any(any(r.reused) for r in self.records)


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """An explicit answer to: which session, step, branch and sample?"""

    session: Session
    step: int | None = None
    branch: str | None = None
    sample: int = 0


ENTERED: contextvars.ContextVar[tuple[Location, ...]] = contextvars.ContextVar(
    "cachepass_entered", default=()
)


def check_num_steps(num_inference_steps: int | None) -> None:
    """Refuse a request without steps."""
    if num_inference_steps is not None and num_inference_steps < 1:
        raise SessionError(f"`num_inference_steps`={num_inference_steps}: must be at least 1")


class Session:
    """The state of one request on one model. Made by `cachepass.session`.

    Enter it around calls (it may be left and entered again); `at` names step and branch.
    """

    def __init__(self, owner: object, num_inference_steps: int | None = None) -> None:
        check_num_steps(num_inference_steps)
        self.owner = owner
        self.num_steps = num_inference_steps
        self.slots: dict[Key, Kept] = {}
        self.signals: dict[Key, Observation] = {}
        """The last observation of each row."""
        self.tensors: dict[tuple[str | None, str], Tensor] = {}
        """All state of a program that decides itself (`lowering.graph`), in place of the above."""
        self.left_out: frozenset[str] = frozenset()
        """Sites that are not kept, for lack of room."""

        self.states: dict[tuple[str | None, int], Any] = {}
        self.told: dict[tuple[str | None, int], Mapping[str, Measure]] = {}
        """What all ranks measured, of the last decision; where several work on the request."""
        self.timesteps: dict[int, dict[int, float]] = {}
        """Of each sample, those of its steps so far; kept for policies that look at them."""
        self.time_scale = 1.0
        self.chosen: dict[int, tuple[int, frozenset[str]]] = {}
        """Of each sample, where branches decide together: a step, and what was chosen for it."""
        self.conditional: tuple[Tensor, ...] | None = None
        """What told the last conditional call from the unconditional one: its text."""
        self.conditional_of: tuple[int, ...] = ()
        """The samples of that call, in its order."""
        self.ahead: Ahead | None = None
        self.skipped_uncond_at: dict[int, int] = {}
        """Of each sample, the last step at which its unconditional output was made up."""

        self.signature: object = None
        self.called_as: dict[str, object] = {}
        """Of each branch: what computes it, and for which shapes of text."""
        self.weights: object = None
        self.step = -1
        self.branches_in_step: list[str] = []
        self.branches: list[str] = []
        self.unnamed: dict[str, Conditioning] = {}
        """Of each branch that goes by its place in a step, what it was last called with."""
        self._called: set[tuple[str, int]] = set()
        """(branch, sample) in this step."""
        self.upcoming = 0
        """The step after the last one that was called."""

        self.history = History(num_inference_steps)
        self.clock = Clock()
        self._locations: list[Location] = []
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0

    # ------------------------------------------------------------------ user's side

    def __enter__(self) -> Session:
        self._locations.append(self._enter(Location(self)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(self._locations.pop())

    @contextlib.contextmanager
    def at(self, *, step: int, branch: str = "cond") -> Iterator[Session]:
        """Say which step (from 0) and branch the calls inside belong to."""
        location = self._enter(self.row(step=step, branch=branch))
        try:
            yield self
        finally:
            self._leave(location)

    def row(
        self, *, branch: str | None = None, sample: int = 0, step: int | None = None
    ) -> Location:
        """A row of this request, for `cachepass.rows`.

        Args:
            branch: its place in guidance; what `cache_context` says of the call if None.
            sample: which of the request's samples, from 0.
            step: from 0; the one after the last step that was called if None.
        """
        if step is not None and (
            step < 0 or (self.num_steps is not None and step >= self.num_steps)
        ):
            rule = "at least 0" if self.num_steps is None else f"from 0 to {self.num_steps - 1}"
            raise SessionError(f"`step`={step}: must be {rule}")
        return Location(self, step, branch, sample)

    def _enter(self, location: Location) -> Location:
        me = threading.get_ident()
        with self._lock:
            if self._depth and self._thread != me:
                raise SessionError(
                    "this session is entered in another thread: one session is one request, and "
                    "its steps follow each other; make one session for each request"
                )
            self._thread, self._depth = me, self._depth + 1
        ENTERED.set((*ENTERED.get(), location))
        return location

    def _leave(self, location: Location) -> None:
        # By identity: generators may leave in another order than they entered.
        ENTERED.set(tuple(other for other in ENTERED.get() if other is not location))
        with self._lock:
            self._depth -= 1

    # --------------------------------------------------------------- runtime's side

    def begin(
        self,
        step: int,
        rows: Sequence[tuple[str, int]],
        signature: object,
        called_as: dict[str, object],
    ) -> list[tuple[str, ...]]:
        """Enter a call with rows (branch, sample); returns, for each, the branches before it."""
        known = self.called_as
        changed = any(known.get(how, what) != what for how, what in called_as.items())
        if self.signature not in (None, signature) or changed:
            self._drop_since("shapes, dtype, device or weights changed")
        elif step < self.step:
            self._drop_since(f"step {step} follows step {self.step}")
        if step != self.step:
            self.step, self.branches_in_step, self._called = step, [], set()
        elif twice := self._called & set(rows):
            self._drop_since(f"branch {min(twice)[0]!r} was called twice in step {step}")
            self.step = step
        self.signature, self.upcoming = signature, step + 1
        self.called_as |= called_as
        branches = tuple(self.branches_in_step)
        before = [tuple(b for b in branches if (b, sample) in self._called) for _, sample in rows]
        self._called.update(rows)
        for branch, _ in rows:
            for seen in (self.branches_in_step, self.branches):
                if branch not in seen:
                    seen.append(branch)
        return before

    def branch_by_order(self, step: int | None, conditioning: Conditioning | None = None) -> str:
        """What the branch of a step's next call is called where nobody names it.

        Its place in the step; but the same conditioning as before is the same branch also at a
        step that leaves another one out.
        """
        called = self.branches_in_step if step == self.step else []
        known = self.unnamed.items() if conditioning is not None else ()
        same = (branch for branch, c in known if branch not in called and c == conditioning)
        by_order = (f"call{i}" for i in range(len(called), 2 * len(called) + 1))
        free = (branch for branch in by_order if branch not in called)
        branch = next(itertools.chain(same, free))
        if conditioning is not None:
            self.unnamed[branch] = conditioning
        return branch

    def set_num_steps(self, num_steps: int) -> None:
        """Another number of steps than was thought."""
        self.num_steps = self.history.num_steps = num_steps

    def _drop_since(self, why: str) -> None:
        self.note(f"{why}: caches dropped")
        self.drop()

    def drop(self) -> None:
        """Forget all that was cached and decided; the history stays."""
        self.slots.clear()
        self.signals.clear()
        self.tensors.clear()
        self.states.clear()
        self.told.clear()
        self.timesteps.clear()
        self.chosen.clear()
        self.called_as.clear()
        self.unnamed.clear()
        self.skipped_uncond_at.clear()
        self.conditional = self.ahead = self.signature = None
        self.step, self.branches_in_step, self.branches, self._called = -1, [], [], set()
        self.left_out = frozenset()

    @property
    def samples(self) -> int:
        """How many were called in this step."""
        return len({sample for _, sample in self._called})

    def leave_out(self, site: str, layout: Layout) -> None:
        """Keep nothing of a site."""
        self.left_out |= {site}
        self.slots = {k: v for k, v in self.slots.items() if layout.slots[k[2]].site != site}

    def note(self, text: str) -> None:
        """Remember something the report should say, once."""
        if text not in self.history.notes:
            self.history.notes.append(text)

    def record(self, call: CallRecord) -> None:
        """Add a call to the history."""
        self.history.records.append(call)
        if not all(call.reused):  # a row that computed filled slots
            self.history.peak_bytes = max(self.history.peak_bytes, self.cache_bytes)

    def could_reuse(self, site: Site, layout: Layout, sample: int, before: Sequence[str]) -> bool:
        """Whether a decision for the whole step may name the site."""
        if isinstance(site, Cfg):
            cond_first = not self.branches or self.branches[0] == "cond"
            known = cond_first or self.conditional is not None
            return known and self._holds(site, layout, "uncond", sample)
        return all(self.is_warm(site, layout, b, sample, before) for b in self.branches)

    def is_warm(
        self, site: Site, layout: Layout, branch: str, sample: int, before: Sequence[str]
    ) -> bool:
        """Whether a row of a call could reuse a site, given the branches called before it."""
        if isinstance(site, Cfg):
            # The conditional output of the step is there, or can be had before its call.
            known = "cond" in before or self.conditional is not None
            if branch != "uncond" or not known:
                return False
        return self._holds(site, layout, branch, sample)

    def _holds(self, site: Site, layout: Layout, branch: str, sample: int) -> bool:
        """Whether what a site keeps from step to step is there for a row."""
        lasting = layout.lasting(site.name)
        return bool(lasting) and all(slot.key(branch, sample) in self.slots for slot in lasting)

    def written(self, slot: Slot, branch: str, sample: int) -> int | None:
        """The step whose value a slot holds for a row."""
        kept = self.slots.get(slot.key(branch, sample))
        return kept.step if kept is not None else None

    def measures(self, branch: str | None, sample: int) -> dict[str, Measure]:
        """Signals of a row; those of all branches together where `branch` is None."""
        found: dict[str, Measure] = {}
        for (of, whose, name), observation in self.signals.items():
            if whose != sample or (branch is not None and of not in (None, branch)):
                continue
            measure = observation.measure()
            if observation.before is not None and math.isnan(measure.rel):
                self.note(f"signal {name!r} was NaN, infinite or zero: no evidence for reuse")
            other = found.get(name)
            if other is None or other.step < measure.step:
                found[name] = measure
            elif other.step == measure.step:
                ratios = [m for m in (other.second, measure.second) if m is not None]
                pairs = [m for m in (other.moves, measure.moves) if m is not None]
                found[name] = dataclasses.replace(
                    measure,
                    diff=measure.diff + other.diff,
                    ref=measure.ref + other.ref,
                    second=sum(ratios) / len(ratios) if ratios else None,
                    moves=(sum(p[0] for p in pairs), sum(p[1] for p in pairs)) if pairs else None,
                )
        return found

    def forget(self, branch: str | None, sample: int) -> None:
        """Drop what is older than this step of a row; of all branches where `branch` is None."""

        def old(key: Key, step: int) -> bool:
            mine = key[1] == sample and (branch is None or key[0] in (None, branch))
            return mine and step != self.step

        self.slots = {k: v for k, v in self.slots.items() if not old(k, v.step)}
        self.signals = {k: v for k, v in self.signals.items() if not old(k, v.step)}
        self.states.pop((branch, sample), None)
        self.told.pop((branch, sample), None)

    @property
    def all_branches_called(self) -> bool:
        """Whether each branch known so far was called in this step."""
        return len(self.branches_in_step) >= len(self.branches)

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the slots now; a value that has moved to an older slot counts once."""
        slots = (tensor for kept in self.slots.values() for tensor in kept.tensors)
        values = [*slots, *self.tensors.values()]
        return sum({id(v): v.numel() * v.element_size() for v in values}.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """A conditional call that was made before its turn, for an unconditional one to stand on."""

    step: int
    inputs: tuple[Tensor, ...]
    output: Any
    record: CallRecord


class Sums:
    """The sums of a signal for all rows of a call; read to the host only when a rule asks.

    One row of sums serves all where the value carries no rows (an embedding of one timestep);
    where a model folds another axis into the rows (frames), those of a row are added up.
    """

    def __init__(self, sums: Tensor, rows: int) -> None:
        self._sums: Tensor | list[list[float]] = sums
        self._rows = rows

    def row(self, index: int) -> tuple[float, ...]:
        """The sums of one row."""
        if isinstance(self._sums, Tensor):
            self._sums = self._sums.tolist()
        share = max(len(self._sums) // self._rows, 1)
        own = self._sums[index * share : (index + 1) * share] or self._sums
        return tuple(sum(column) for column in zip(*own, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """A signal of one row."""

    sums: Sums
    index: int
    """Of the row in the call that measured it."""
    step: int
    before: int | None
    """The step of the value it was compared with; None where there was none."""

    def measure(self) -> Measure:
        """What a rule is told of it."""
        if self.before is None:
            return dataclasses.replace(UNMEASURED, step=self.step)
        diff, ref, *moves = self.sums.row(self.index)
        pair = (moves[0], moves[1]) if moves and moves[1] > 0 else None
        second = pair[0] / pair[1] if pair is not None else None
        return Measure(diff, ref, self.step, max(self.step - self.before, 1), second, pair)
