"""The state of one running call: what `ir.ops` asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass.errors import PolicyError, SessionError
from cachepass.ir.boundary import Cfg, Layout, Site, Slot
from cachepass.ir.ops import Arm, When
from cachepass.ir.predictors import Moment
from cachepass.runtime.policy import COMPUTE, Facts, Measure, Policy
from cachepass.runtime.session import CallRecord, Kept, Observation, Session


class Frame:
    """Made for each call, handed to the rewritten graph as its first argument."""

    def __init__(
        self,
        session: Session,
        policy: Policy,
        sites: Mapping[str, Site],
        layout: Layout,
        *,
        step: int,
        branch: str,
        rows: int,
        first_call: bool,
        time: Tensor | None,
        call_cond: Callable[[Frame], None] | None = None,
    ) -> None:
        self.session, self.policy, self.sites, self.layout = session, policy, sites, layout
        self.step, self.branch, self.rows = step, branch, rows
        self.first_call = first_call
        self._time, self._call_cond = time, call_cond
        self._weights: dict[str, Tensor] = {}
        self.reused: list[frozenset[str]] = [COMPUTE] * rows
        self.full = [True] * rows
        self._active = [True] * rows
        self._writing = [True] * rows

    def of_branch(self, branch: str) -> Frame:
        """A frame of another call of the same step."""
        return Frame(
            self.session, self.policy, self.sites, self.layout,
            step=self.step, branch=branch, rows=self.rows, first_call=False, time=self._time,
        )  # fmt: skip

    # ------------------------------------------------------------------------ slots

    def read(self, slot: str, like: Tensor | None) -> Tensor:
        """See `ir.ops.cache_read`."""
        kept = self.session.slots.get(self.layout.slots[slot].key(self.branch))
        if kept is not None and (like is None or kept.value.shape == like.shape):
            return kept.value
        if like is None:
            raise SessionError(f"slot {slot!r} is cold and was read for reuse")
        declared = self.layout.slots[slot]
        cold = 0.0 if declared.age and declared.site else math.nan  # no weight, or no evidence
        return torch.full(like.shape, cold, dtype=declared.dtype, device=like.device)

    def write(self, slot: str, value: Tensor) -> None:
        """See `ir.ops.cache_write`. Rows that are not refreshed keep their old value."""
        steps = tuple(self.step if row else None for row in self._writing)
        self._put(slot, Kept(value, steps))

    def shift(self, newer: str, older: str) -> None:
        """See `ir.ops.cache_shift`. Rows that are not refreshed keep their older value."""
        kept = self.session.slots.get(self.layout.slots[newer].key(self.branch))
        if kept is not None:
            rows = zip(self._writing, kept.steps, strict=True)
            self._put(older, Kept(kept.value, tuple(step if w else None for w, step in rows)))

    def _put(self, slot: str, new: Kept) -> None:
        key, rows = self.layout.slots[slot].key(self.branch), self._writing
        old = self.session.slots.get(key)
        if not all(rows) and old is not None:
            if old.value.dtype != new.value.dtype or old.value.shape != new.value.shape:
                raise SessionError(
                    f"slot {slot!r} holds {old.value.dtype} {tuple(old.value.shape)} and is "
                    f"given {new.value.dtype} {tuple(new.value.shape)}: one request has one dtype "
                    "and shape"
                )
            value = torch.where(_mask(rows, new.value), new.value, old.value)
            steps = (n if w else o for w, n, o in zip(rows, new.steps, old.steps, strict=True))
            new = Kept(value, tuple(steps))
        self.session.slots[key] = new

    def weights(self, slot: str, count: int, like: Tensor) -> Tensor:
        """See `ir.ops.weights`."""
        newest = self.layout.slots[slot]
        assert newest.site is not None
        if newest.site not in self._weights:  # many sublayers may share them
            rows = [self._row_weights(newest, count, row) for row in range(self.rows)]
            self._weights[newest.site] = torch.tensor(rows, dtype=torch.float32)
        return self._weights[newest.site].to(like.device)

    def _row_weights(self, newest: Slot, count: int, row: int) -> tuple[float, ...]:
        session, predictor = self.session, self.sites[newest.site or ""].stand_in
        names = newest.ages(predictor.history)
        steps = (session.written(self.layout.slots[n], self.branch, row) for n in names)
        kept = tuple(step for step in steps if step is not None)
        newest_alone = (1.0,) + (0.0,) * (count - 1)
        if not kept or kept[0] == self.step:  # a row that is not reused: any finite numbers do
            return newest_alone
        # Signals are read from the device only where they are wanted.
        measures = self._measures(row) if predictor.needs_signal else {}
        moment = Moment(
            step=self.step,
            kept=kept,
            timesteps={step: times[row] for step, times in session.timesteps.items()},
            ratios={n: m.second for n, m in measures.items() if m.second is not None},
        )
        return predictor.weights(moment) or newest_alone

    # ---------------------------------------------------------------------- signals

    def observe(self, signal: str, slot: str, sums: Tensor) -> None:
        """See `ir.ops.observe`. Rows that are not refreshed keep their last observation."""
        reference = self.layout.slots[slot]
        key = reference.key(self.branch)
        kept = self.session.slots.get(key)
        compared = kept.steps if kept is not None else (None,) * self.rows
        observation = Observation(sums, self.step, compared)
        rows = self.session.signals.setdefault((key[0], signal), [None] * self.rows)
        for row, counts in enumerate(self._writing):
            if counts:
                rows[row] = observation

    def _measures(self, row: int) -> dict[str, Measure]:
        """Signals of this row; those of all branches together where they decide together."""
        found: dict[str, Measure] = {}
        for (branch, name), rows in self.session.signals.items():
            observation = rows[row]
            if observation is None:
                continue
            if branch not in (None, self.branch) and not self.policy.trigger.shared_by_branches:
                continue
            measure = observation.row(row)
            if observation.compared[row] is not None and math.isnan(measure.rel):
                self.session.note(
                    f"signal {name!r} was NaN, infinite or zero: no evidence for reuse"
                )
            other = found.get(name)
            if other is None or other.step < measure.step:
                found[name] = measure
            elif other.step == measure.step:
                ratios = [m for m in (other.second, measure.second) if m is not None]
                found[name] = dataclasses.replace(
                    measure,
                    diff=measure.diff + other.diff,
                    ref=measure.ref + other.ref,
                    second=sum(ratios) / len(ratios) if ratios else None,
                )
        return found

    # -------------------------------------------------------------------- decisions

    def decide(self) -> None:
        """See `ir.ops.decide`."""
        session, policy = self.session, self.policy
        if policy.trigger.needs_num_steps and session.num_steps is None:
            raise PolicyError(
                f"policy {policy.name!r} needs the number of steps of the request, which nothing "
                "here tells: call the model inside cachepass.session(model, "
                "num_inference_steps=N), or compile the whole diffusers pipeline"
            )
        if policy.needs_timestep and self._time is not None:
            times = self._time.flatten().tolist()
            if not session.timesteps:  # some models are given 1 to 0
                session.time_scale = 1000.0 if max(times) <= 1 else 1.0
            session.timesteps[self.step] = [
                session.time_scale * times[min(row, len(times) - 1)] for row in range(self.rows)
            ]
        shared = session.shared_choice
        if policy.trigger.shared_by_branches and shared is not None and shared[0] == self.step:
            choices = shared[1]
        else:
            choices = [self._choose(row) for row in range(self.rows)]
            session.shared_choice = (self.step, choices)
        for row, choice in enumerate(choices):
            taken, not_here = set(), set()
            for name in choice:
                site = self._site(name)
                if session.is_warm(site, self.layout, self.branch, row):
                    taken.add(name)
                elif isinstance(site, Cfg) and self.branch != "uncond":
                    not_here.add(name)
            self.reused[row] = frozenset(taken)
            self.full[row] = not (taken or not_here)

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            raise PolicyError(
                f"policy {self.policy.name!r} reuses site {name!r}, which it does not declare: "
                f"its sites are {', '.join(self.sites) or 'none'}"
            )
        return self.sites[name]

    def _choose(self, row: int) -> frozenset[str]:
        session, policy = self.session, self.policy
        shared = policy.trigger.shared_by_branches
        warm = frozenset(
            site.name
            for site in self.sites.values()
            if (
                session.could_reuse(site, self.layout, row)
                if shared
                else session.is_warm(site, self.layout, self.branch, row)
            )
        )
        times = session.timesteps.get(self.step)
        facts = Facts(
            self.step, session.num_steps, self.branch, warm, self._measures(row),
            frozenset(self.sites), times[row] if times is not None else math.nan,
        )  # fmt: skip
        key = (None if shared else self.branch, row)
        choice, session.states[key] = policy.decide(facts, session.states.get(key))
        return choice

    # ----------------------------------------------------------------- control flow

    def select(self, site: str, compute: Arm, reuse: Arm, operands: tuple[Any, ...]) -> Any:
        """See `ir.ops.conditional`."""
        wants = [site in self.reused[r] for r in range(self.rows) if self._active[r]]
        if not any(wants):
            return compute(self, *operands)
        if isinstance(self.sites[site], Cfg):
            self.session.skipped_uncond_at = self.step
            if "cond" not in self.session.branches_in_step:
                assert self._call_cond is not None  # else the site was not warm
                self._call_cond(self)
        if all(wants):
            return reuse(self, *operands)
        outer = self._active
        self._active = [a and site not in self.reused[r] for r, a in enumerate(outer)]
        computed = compute(self, *operands)
        self._active = outer
        kept = reuse(self, *operands)
        rows = [site in names for names in self.reused]
        return tuple(
            torch.where(_mask(rows, new), old, new) for new, old in zip(computed, kept, strict=True)
        )

    def guard(self, when: When, arm: Arm, operands: tuple[Any, ...]) -> None:
        """See `ir.ops.guard`."""
        # Independent sites refresh what computes, wherever else something is reused.
        refreshed = self._active if self.policy.trigger.independent else self.full
        if when is When.FIRST_CALL:
            runs = self.first_call
        elif when is When.COND:
            runs = self.branch == "cond"
        elif when is When.UNCOND_FIRST:
            runs = self.branch == "uncond" and "cond" not in self.session.branches_in_step
        else:
            runs = any(refreshed)
            there = self.session.branches_in_step
            if when is When.UNCOND_FULL:
                runs = runs and self.branch == "uncond" and "cond" in there
            elif when is When.COND_FULL:
                skipped = self.session.skipped_uncond_at == self.step
                runs = runs and self.branch == "cond" and "uncond" in there and not skipped
            elif when is When.FIRST_FULL:
                runs = runs and self.first_call
        if not runs:
            return
        if when not in (When.FIRST_CALL, When.COND, When.UNCOND_FIRST):
            self._writing = refreshed
        arm(self, *operands)
        self._writing = [True] * self.rows

    # ----------------------------------------------------------------------- report

    def record(self) -> CallRecord:
        """What this call did."""
        blocks = self.layout.blocks
        # Blocks run for the whole batch: a block is saved when no row needed it.
        common = frozenset.intersection(
            *(
                frozenset().union(*(self.layout.coverage[name] for name in names))
                for names in self.reused
            )
        )
        return CallRecord(self.step, self.branch, tuple(self.reused), blocks - len(common), blocks)


def _mask(rows: Sequence[bool], value: Tensor) -> Tensor:
    """A per-row condition that broadcasts against a value with rows in front.

    A model may fold another axis into the rows (frames): each row then stands for several.
    """
    size = value.shape[0] if value.ndim else 0
    if not size or size % len(rows):
        raise SessionError(
            f"rows decide differently, and a value of shape {tuple(value.shape)} has no "
            f"dimension of {len(rows)} rows in front to select along"
        )
    mask = torch.tensor(rows, dtype=torch.bool, device=value.device)
    return mask.repeat_interleave(size // len(rows)).view(-1, *(1,) * (value.ndim - 1))
