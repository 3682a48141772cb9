"""One request: its slots, the state of its rows, its history."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from cachepass.errors import SessionError
from cachepass.ir.boundary import Cfg, Layout, Site, Slot
from cachepass.runtime.policy import UNMEASURED, Measure


@dataclasses.dataclass(slots=True)
class Kept:
    """The content of a slot."""

    value: Tensor
    steps: tuple[int | None, ...]
    """Per row, the step whose value it holds; None where it holds nothing to reuse."""


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
    """An explicit answer to: which session, step and branch?"""

    session: Session
    step: int | None = None
    branch: str | None = None


ENTERED: contextvars.ContextVar[tuple[Location, ...]] = contextvars.ContextVar(
    "cachepass_entered", default=()
)


class Session:
    """The state of one request on one model. Made by `cachepass.session`.

    Enter it around calls (it may be left and entered again); `at` names step and branch.
    """

    def __init__(self, owner: object, num_inference_steps: int | None = None) -> None:
        if num_inference_steps is not None and num_inference_steps < 1:
            raise SessionError(f"`num_inference_steps`={num_inference_steps}: must be at least 1")
        self.owner = owner
        self.num_steps = num_inference_steps
        self.slots: dict[tuple[str | None, str], Kept] = {}
        self.signals: dict[tuple[str | None, str], list[Observation | None]] = {}
        """The last observation of each row."""
        self.tensors: dict[tuple[str | None, str], Tensor] = {}
        """All state of a program that decides itself (`lowering.graph`), in place of the above."""
        self.states: dict[tuple[str | None, int], Any] = {}
        self.timesteps: dict[int, list[float]] = {}
        """Of each step so far, per row; kept for policies that look at them."""
        self.time_scale = 1.0
        self.shared_choice: tuple[int, list[frozenset[str]]] | None = None
        self.conditional: tuple[Tensor, ...] | None = None
        """What told the last conditional call from the unconditional one: its text."""
        self.ahead: Ahead | None = None
        self.skipped_uncond_at = -1
        """The last step at which some row's unconditional output was made up."""

        self.signature: object = None
        self.weights: object = None
        self.step = -1
        self.branches_in_step: list[str] = []
        self.branches: list[str] = []
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
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            rule = "at least 0" if self.num_steps is None else f"from 0 to {self.num_steps - 1}"
            raise SessionError(f"`step`={step}: must be {rule}")
        location = self._enter(Location(self, step, branch))
        try:
            yield self
        finally:
            self._leave(location)

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

    def begin(self, step: int, branch: str, signature: object) -> bool:
        """Enter a call; returns whether it is the first of its step."""
        if self.signature != signature:
            if self.signature is not None:
                self.note("shapes, dtype, device or weights changed: caches dropped")
            self.drop()
            self.signature = signature
        if step != self.step:
            if step < self.step:
                self.note(f"step {step} follows step {self.step}: caches dropped")
                self.drop()
                self.signature = signature
            self.step, self.branches_in_step = step, []
        elif branch in self.branches_in_step:
            self.note(f"branch {branch!r} was called twice in step {step}: caches dropped")
            self.drop()
            self.signature, self.step = signature, step
        first = not self.branches_in_step
        self.branches_in_step.append(branch)
        if branch not in self.branches:
            self.branches.append(branch)
        return first

    def drop(self) -> None:
        """Forget all that was cached and decided; the history stays."""
        self.slots.clear()
        self.signals.clear()
        self.tensors.clear()
        self.states.clear()
        self.timesteps.clear()
        self.skipped_uncond_at = -1
        self.shared_choice = self.conditional = self.ahead = None
        self.signature = None
        self.step, self.branches_in_step, self.branches = -1, [], []

    def note(self, text: str) -> None:
        """Remember something the report should say, once."""
        if text not in self.history.notes:
            self.history.notes.append(text)

    def record(self, call: CallRecord) -> None:
        """Add a call to the history."""
        self.history.records.append(call)
        if not all(call.reused):  # a row that computed filled slots
            self.history.peak_bytes = max(self.history.peak_bytes, self.cache_bytes)

    def is_warm(self, site: Site, layout: Layout, branch: str, row: int) -> bool:
        """Whether a call of a branch could reuse a site for a row now."""
        if isinstance(site, Cfg) and (branch != "uncond" or not self._knows_cond()):
            return False
        return self._holds(site, layout, branch, row)

    def _knows_cond(self) -> bool:
        """Whether this step's conditional output is there, or can be had before its call."""
        return "cond" in self.branches_in_step or self.conditional is not None

    def could_reuse(self, site: Site, layout: Layout, row: int) -> bool:
        """Whether a decision for the whole step may name the site."""
        if isinstance(site, Cfg):
            cond_first = not self.branches or self.branches[0] == "cond"
            known = cond_first or self.conditional is not None
            return known and self._holds(site, layout, "uncond", row)
        return all(self.is_warm(site, layout, branch, row) for branch in self.branches)

    def _holds(self, site: Site, layout: Layout, branch: str, row: int) -> bool:
        """Whether what a site keeps from step to step is there for a row."""
        lasting = layout.lasting(site.name)
        return bool(lasting) and all(
            self.written(slot, branch, row) is not None for slot in lasting
        )

    def written(self, slot: Slot, branch: str, row: int) -> int | None:
        """The step whose value a slot holds for a row."""
        kept = self.slots.get(slot.key(branch))
        return kept.steps[row] if kept is not None else None

    @property
    def all_branches_called(self) -> bool:
        """Whether each branch known so far was called in this step."""
        return len(self.branches_in_step) >= len(self.branches)

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the slots now; a value that has moved to an older slot counts once."""
        values = [*(kept.value for kept in self.slots.values()), *self.tensors.values()]
        return sum({id(v): v.numel() * v.element_size() for v in values}.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """A conditional call that was made before its turn, for an unconditional one to stand on."""

    step: int
    inputs: tuple[Tensor, ...]
    output: Any
    record: CallRecord


@dataclasses.dataclass(slots=True)
class Observation:
    """Sums of a signal; read to the host only when a rule asks."""

    sums: Tensor | list[list[float]]
    step: int
    compared: tuple[int | None, ...]
    """Per row, the step of the value it was compared with; None where there was none."""

    def row(self, index: int) -> Measure:
        """The measure of one row.

        One row of sums serves all (an embedding of one timestep); where a model folds another
        axis into the rows (frames), those of a row are added up.
        """
        if isinstance(self.sums, Tensor):
            self.sums = self.sums.tolist()
        before = self.compared[index]
        if before is None:
            return dataclasses.replace(UNMEASURED, step=self.step)
        share = max(len(self.sums) // len(self.compared), 1)
        own = self.sums[index * share : (index + 1) * share] or self.sums
        diff, ref, *moves = (sum(column) for column in zip(*own, strict=True))
        second = moves[0] / moves[1] if moves and moves[1] > 0 else None
        return Measure(diff, ref, self.step, max(self.step - before, 1), second)


class Clock:
    """Steps and branches read off the calls alone, where nothing better is known.

    A timestep that differs from the one before starts a step; one that turns back starts a
    request. Within a step, calls with other conditioning are other branches, named by their
    order; the same conditioning again at the same timestep is a further step (Heun).
    """

    def __init__(self) -> None:
        self.step = -1
        self._time: float | None = None
        self._direction = 0.0
        self._seen: list[object] = []

    def tick(self, time: float, conditioning: object) -> tuple[int, str, bool]:
        """(step, branch, whether a new request started) of a call.

        `conditioning` is kept until the timestep changes and compared by ``==``.
        """
        restarted = False
        if self._time is None or time != self._time:
            move = 0.0 if self._time is None else time - self._time
            if self._direction and move * self._direction < 0:
                self.__init__()  # type: ignore[misc]
                restarted = True
            elif move:
                self._direction = move
            self.step, self._time, self._seen = self.step + 1, time, []
        elif conditioning in self._seen:
            self.step, self._seen = self.step + 1, []
        self._seen.append(conditioning)
        return self.step, f"call{len(self._seen) - 1}", restarted


class Conditioning:
    """The tensors that tell the branches of a step apart, equal if they are the same memory.

    Holds them: an address that is free again could belong to another branch's.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conditioning) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]
