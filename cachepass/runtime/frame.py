"""The state of one running call: what `ir.ops` asks for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass.errors import PolicyError, SessionError
from cachepass.ir.boundary import Cfg, Layout, Site, Slot
from cachepass.ir.ops import Arm, Carried, When
from cachepass.ir.predictors import Moment
from cachepass.runtime import batch
from cachepass.runtime.policy import Facts, Measure, Policy
from cachepass.runtime.ranks import Known, Ranks
from cachepass.runtime.row import Row, records
from cachepass.runtime.session import CallRecord, Observation, Session, Sums
from cachepass.runtime.storage import Kept, Prefetch, Storage, is_one_value


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What a call's frames have in common, besides rows."""

    policy: Policy
    sites: Mapping[str, Site]
    layout: Layout
    storage: Storage
    device: torch.device
    time: Tensor | None
    call_cond: Callable[[Frame], None] | None
    """Makes the conditional call of the step; where the rows belong to one session."""

    takes: Callable[[int], bool]
    """Whether arms take this many rows."""

    ranks: Ranks | None = None
    """The processes that decide alike, where there are several."""


class Frame:
    """Made for each call, handed to the rewritten graph as its first argument."""

    def __init__(
        self,
        rows: Sequence[Row],
        around: Surroundings,
        root: Frame | None = None,
        live: Sequence[bool] | None = None,
    ) -> None:
        self.rows, self.around = rows, around
        self.policy, self.layout = around.policy, around.layout
        self._root = root or self
        self._live = live or [True] * len(rows)
        """Rows that count: others are computed along, and nothing of them is kept or looked at."""

        self._weights: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor] = {}
        self.prefetch: Prefetch | None = None
        self.apart = True
        """Whether rows that decided differently went their own ways."""

    @functools.cached_property
    def sessions(self) -> list[Session]:
        """Those of its rows."""
        return list(dict.fromkeys(row.session for row in self.rows))

    def of_branch(self, branch: str) -> Frame:
        """A frame of another call of the same step, as if it were the first."""
        others = [
            dataclasses.replace(row, branch=branch, before=(), first=False) for row in self.rows
        ]
        return Frame(others, dataclasses.replace(self.around, call_cond=None))

    # ------------------------------------------------------------------------ slots

    def read(self, slot: str, like: Tensor | None) -> Tensor:
        """See `ir.ops.cache_read`."""
        declared = self.layout.slots[slot]
        kept, live = self._kept(declared, self.rows), self._live
        if declared.rows is None:  # one value for all rows; none where they remember others
            looked_at = [k for k, lives in zip(kept, live, strict=True) if lives]
            kept, live = (looked_at[:1] if self._agree(looked_at) else [None]), [True]
        values = [self._value(k, declared) if k is not None else None for k in kept]
        if like is not None:
            shape = batch.shape_of_one(like.shape, declared.rows, len(self.rows))
            values = [v if v is not None and v.shape == shape else None for v in values]
            cold = 0.0 if declared.age and declared.site else math.nan  # no weight, or no evidence
            made = torch.full(shape, cold, dtype=declared.dtype, device=like.device)
            return batch.join([made if v is None else v for v in values], declared)
        # Rows that nothing is written for, and that nobody looks at, may be cold.
        there = next((v for v in values if v is not None), None)
        cold_rows = [w for w, v in zip(live, values, strict=True) if v is None]
        if there is None or any(cold_rows):
            raise SessionError(f"slot {slot!r} is cold and was read for reuse")
        return batch.join([torch.zeros_like(there) if v is None else v for v in values], declared)

    def write(self, slot: str, value: Tensor) -> None:
        """See `ir.ops.cache_write`. Rows that are not refreshed keep their old value."""
        declared, storage = self.layout.slots[slot], self.around.storage
        for_all: Kept | None = None
        for i, row in self._written():
            if declared.site in row.session.left_out:
                continue
            if for_all is not None:
                kept = dataclasses.replace(for_all, step=row.step)
            else:
                own = batch.part(value, declared.rows, i, len(self.rows))
                kept = storage.keep(declared, own, row.step)
                for_all = kept if declared.rows is None else None
            row.session.slots[declared.key(row.branch, row.sample)] = kept

    def _agree(self, kept: Sequence[Kept | None]) -> bool:
        # What is equal here need not be on another rank, and all of them decide alike.
        return is_one_value(kept, compared=self.around.ranks is None)

    def _kept(self, slot: Slot, rows: Sequence[Row]) -> list[Kept | None]:
        return [row.session.slots.get(slot.key(row.branch, row.sample)) for row in rows]

    def _value(self, kept: Kept, slot: Slot) -> Tensor:
        ahead = self._root.prefetch
        value = ahead.take(kept) if ahead is not None else None
        return self.around.storage.take(kept, slot, self.around.device) if value is None else value

    def shift(self, newer: str, older: str) -> None:
        """See `ir.ops.cache_shift`. Rows that are not refreshed keep their older value."""
        source, target = self.layout.slots[newer], self.layout.slots[older]
        for _, row in self._written():
            kept = row.session.slots.get(source.key(row.branch, row.sample))
            if kept is not None:
                row.session.slots[target.key(row.branch, row.sample)] = kept

    def _written(self) -> list[tuple[int, Row]]:
        return [(i, row) for i, row in enumerate(self.rows) if self._live[i]]

    def weights(self, slot: str, count: int, like: Tensor) -> Tensor:
        """See `ir.ops.weights`."""
        newest = self.layout.slots[slot]
        assert newest.site is not None
        if newest.site not in self._weights:  # many sublayers may share them
            numbers = [self._row_weights(newest, count, row) for row in self.rows]
            weights = torch.tensor(numbers, dtype=torch.float32, device=like.device)
            self._weights[newest.site] = weights
        return self._weights[newest.site].to(like.device)

    def _row_weights(self, newest: Slot, count: int, row: Row) -> tuple[float, ...]:
        predictor = self._site(newest.site or "").stand_in
        ages = [self.layout.slots[name] for name in newest.ages(predictor.history)]
        steps = (row.session.written(slot, row.branch, row.sample) for slot in ages)
        kept = tuple(step for step in steps if step is not None)
        newest_alone = (1.0,) + (0.0,) * (count - 1)
        if not kept or kept[0] == row.step:  # a row that is not reused: any finite numbers do
            return newest_alone
        # Signals are read from the device only where they are wanted.
        measures: Mapping[str, Measure] = {}
        if predictor.needs_signal:
            told = row.session.told.get(self._key(row))  # by all ranks: they predict alike
            measures = told if told is not None else self._measures(row)
        moment = Moment(
            step=row.step,
            kept=kept,
            timesteps=row.session.timesteps.get(row.sample, {}),
            ratios={n: m.second for n, m in measures.items() if m.second is not None},
        )
        return predictor.weights(moment) or newest_alone

    # ---------------------------------------------------------------------- signals

    def observe(self, signal: str, slot: str, sums: Tensor) -> None:
        """See `ir.ops.observe`. Rows that are not refreshed keep their last observation."""
        reference, seen = self.layout.slots[slot], Sums(sums, len(self.rows))
        for i, row in self._written():
            before = row.session.written(reference, row.branch, row.sample)
            branch, sample, _ = reference.key(row.branch, row.sample)
            row.session.signals[branch, sample, signal] = Observation(seen, i, row.step, before)

    def _key(self, row: Row) -> tuple[str | None, int]:
        """Whose decision it is: the row's branch and sample, or of all branches together."""
        return (None if self.policy.trigger.shared_by_branches else row.branch), row.sample

    def _measures(self, row: Row) -> dict[str, Measure]:
        return row.session.measures(*self._key(row))

    # -------------------------------------------------------------------- decisions

    def decide(self) -> None:
        """See `ir.ops.decide`."""
        trigger = self.policy.trigger
        if trigger.needs_num_steps and any(r.session.num_steps is None for r in self.rows):
            raise PolicyError(
                f"policy {self.policy.name!r} needs the number of steps of the request, which "
                "nothing here tells: call the model inside cachepass.session(model, "
                "num_inference_steps=N), or compile the whole diffusers pipeline"
            )
        if self.policy.needs_timestep and self.around.time is not None:
            self._tell_timesteps(self.around.time)
        # The first of a sample first: where branches decide together, it decides.
        rows = sorted(self.rows, key=lambda row: not row.first)
        known = self._known([row for row in rows if not self._is_chosen(row)])
        for row in rows:
            taken, not_here = set(), set()
            for name in self._choose(row, known):
                site = self._site(name)
                if self._is_warm(site, row):
                    taken.add(name)
                elif isinstance(site, Cfg) and row.branch != "uncond":
                    not_here.add(name)
            row.reused = frozenset(taken)
            row.full = not not_here
        self._settle_together()
        for row in rows:
            row.full = row.full and not row.reused
        if self.around.storage.on_host and self.around.device.type == "cuda":
            self._prefetch()

    def _settle_together(self) -> None:
        """Let rows compute a site together that keeps one value for all of them, or reuse it."""
        if len(self.rows) == 1:
            return
        for slot in self.layout.slots.values():
            if slot.rows is not None or slot.site is None:
                continue
            reusing = [row for row in self.rows if slot.site in row.reused]
            alike = (
                len(reusing) == len(self.rows)
                and not self._site(slot.site).stand_in.weighted  # each row has its own weights
                and self._agree(self._kept(slot, reusing))
            )
            for row in reusing if not alike else ():
                row.reused -= {slot.site}
                row.session.note(
                    f"site {slot.site!r} keeps a value that rows of a call share, and there was "
                    "none that would do for all of them: it was computed"
                )

    def _prefetch(self) -> None:
        """Send for what the rows are going to reuse."""
        slots = [self.layout.slots[name] for name in self.layout.reads]
        wanted = (
            (slot, kept)
            for slot in slots
            for kept in self._kept(slot, [row for row in self.rows if slot.site in row.reused])
            if kept is not None
        )
        self.prefetch = Prefetch(self.around.storage, self.around.device, wanted)

    def _tell_timesteps(self, time: Tensor) -> None:
        times = batch.times(time, len(self.rows))
        for row, now in zip(self.rows, times, strict=True):
            session = row.session
            if not session.timesteps:  # some models are given 1 to 0
                session.time_scale = 1000.0 if now <= 1 else 1.0
            row.time = session.time_scale * now
            session.timesteps.setdefault(row.sample, {})[row.step] = row.time

    def _site(self, name: str) -> Site:
        if name not in self.around.sites:
            raise PolicyError(
                f"policy {self.policy.name!r} reuses site {name!r}, which it does not declare: "
                f"its sites are {', '.join(self.around.sites) or 'none'}"
            )
        return self.around.sites[name]

    def _is_warm(self, site: Site, row: Row) -> bool:
        return row.session.is_warm(site, self.layout, row.branch, row.sample, row.before)

    def _is_chosen(self, row: Row) -> bool:
        """Whether another branch has decided for this one, too."""
        chosen = row.session.chosen.get(row.sample)
        shared = self.policy.trigger.shared_by_branches
        return shared and chosen is not None and chosen[0] == row.step

    def _known(self, rows: Sequence[Row]) -> dict[tuple[Session, str | None, int], Known]:
        """What is known for each decision that is to be made; by all ranks, where there are any."""
        known: dict[tuple[Session, str | None, int], Known] = {}
        for row in rows:
            key = (row.session, *self._key(row))
            if key not in known:  # where branches decide together, the first of them does
                known[key] = self._known_here(row)
        ranks, signals = self.around.ranks, self.policy.signals()
        if ranks is None or not signals or not known:
            return known
        agreed = ranks.agree([*known.values()], [*self.around.sites], signals, self.around.device)
        for (key, here), now in zip(known.items(), agreed, strict=True):
            session, branch, sample = key
            if now.fresh and not here.fresh:
                session.note("another rank has lost its caches: caches dropped")
                session.forget(branch, sample)
            session.told[branch, sample] = now.signals
        return dict(zip(known, agreed, strict=True))

    def _known_here(self, row: Row) -> Known:
        session, key = row.session, self._key(row)
        shared = self.policy.trigger.shared_by_branches
        warm = frozenset(
            site.name
            for site in self.around.sites.values()
            if (
                session.could_reuse(site, self.layout, row.sample, row.before)
                if shared
                else self._is_warm(site, row)
            )
        )
        return Known(row.step, row.branch, key not in session.states, warm, self._measures(row))

    def _choose(
        self, row: Row, known: Mapping[tuple[Session, str | None, int], Known]
    ) -> frozenset[str]:
        session, key = row.session, self._key(row)
        if self._is_chosen(row):
            return session.chosen[row.sample][1]
        told = known[session, *key]
        facts = Facts(
            row.step, session.num_steps, row.branch, told.warm, told.signals,
            frozenset(self.around.sites), row.time,
        )  # fmt: skip
        choice, session.states[key] = self.policy.decide(facts, session.states.get(key))
        session.chosen[row.sample] = row.step, choice
        return choice

    # ----------------------------------------------------------------- control flow

    def select(
        self, site: str, compute: Arm, reuse: Arm, operands: tuple[Any, ...], carried: Carried
    ) -> Any:
        """See `ir.ops.conditional`."""
        reusing = [site in row.reused for row in self.rows]
        wanted = [reuses for reuses, live in zip(reusing, self._live, strict=True) if live]
        if not any(wanted):
            return compute(self, *operands)
        if isinstance(self._site(site), Cfg):
            self._skip_uncond(reusing)
        if all(wanted):
            return reuse(self, *operands)
        groups = [[i for i, r in enumerate(reusing) if r is takes] for takes in (False, True)]
        apart = all(self._live) and all(self.around.takes(len(group)) for group in groups)
        given, returned = carried or (None, None)
        if given is None or returned is None or not apart:
            return self._both(reusing, compute, reuse, operands, returned)
        made = []
        for arm, group in zip((compute, reuse), groups, strict=True):
            chosen = self._on_device(group)
            own = batch.gather(operands, given, chosen, len(self.rows))
            made.append((chosen, arm(self._of(group), *own)))
        return batch.scatter(made, returned, len(self.rows))

    def _on_device(self, numbers: Sequence[int] | Sequence[bool]) -> Tensor:
        """Made once in a call: each time the host would wait for the device."""
        known, key = self._root._numbers, repr(numbers)
        if key not in known:
            known[key] = torch.tensor(numbers, device=self.around.device)
        return known[key]

    def _of(self, chosen: Sequence[int]) -> Frame:
        """A frame of some of the rows."""
        return Frame([self.rows[i] for i in chosen], self.around, self._root)

    def _where(self, live: Sequence[bool]) -> Frame:
        """A frame of all rows, of which these count."""
        return Frame(self.rows, self.around, self._root, live)

    def _both(
        self, reusing: Sequence[bool], compute: Arm, reuse: Arm, operands: tuple[Any, ...],
        returned: tuple[int | None, ...] | None,
    ) -> Any:  # fmt: skip
        """Both arms for all rows, where these cannot be told apart in all operands."""
        self._root.apart = False
        sides = [
            [live and reuses is takes for live, reuses in zip(self._live, reusing, strict=True)]
            for takes in (False, True)
        ]
        computed, kept = (
            arm(self._where(live), *operands)
            for arm, live in zip((compute, reuse), sides, strict=True)
        )
        dims, chosen = returned or (0,) * len(computed), self._on_device(reusing)
        return tuple(
            new if dim is None else torch.where(batch.mask(chosen, new, dim), old, new)
            for new, old, dim in zip(computed, kept, dims, strict=True)
        )

    def _skip_uncond(self, reusing: Sequence[bool]) -> None:
        """See to it that this step's conditional outputs are there."""
        skipping = [row for row, reuses in zip(self.rows, reusing, strict=True) if reuses]
        for row in skipping:
            row.session.skipped_uncond_at[row.sample] = row.step
        if any("cond" not in row.before for row in skipping):
            assert self.around.call_cond is not None  # else the site was not warm
            self.around.call_cond(self._root)
            for row in self._root.rows:
                row.before = (*row.before, "cond")

    def guard(self, when: When, arm: Arm, operands: tuple[Any, ...]) -> None:
        """See `ir.ops.guard`."""
        live = [
            live and self._runs(when, row) for live, row in zip(self._live, self.rows, strict=True)
        ]
        if any(live):
            arm(self._where(live), *operands)

    def _runs(self, when: When, row: Row) -> bool:
        # Independent sites refresh what computes, wherever else something is reused.
        full = row.full or self.policy.trigger.independent
        match when:
            case When.FULL:
                return full
            case When.FIRST_CALL:
                return row.first
            case When.FIRST_FULL:
                return full and row.first
            case When.COND:
                return row.branch == "cond"
            case When.UNCOND_FIRST:
                return row.branch == "uncond" and "cond" not in row.before
            case When.UNCOND_FULL:
                return full and row.branch == "uncond" and "cond" in row.before
            case When.COND_FULL:
                skipped = row.session.skipped_uncond_at.get(row.sample) == row.step
                return full and row.branch == "cond" and "uncond" in row.before and not skipped

    def record(self) -> list[tuple[Session, CallRecord]]:
        """What this call did, for each session and branch in it."""
        return records(self.rows, self.layout, apart=self.apart)
