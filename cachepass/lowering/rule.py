"""What the host does between regions, as tensor code: signals, masks by row, the decision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass.ir.boundary import Cfg, Layout
from cachepass.ir.ops import When
from cachepass.ir.predictors import Predictor, traced_weights
from cachepass.runtime.policy import Policy
from cachepass.runtime.traced import Dtypes, TracedFacts, TracedMeasure, any_of

BRANCHES = ("cond", "uncond", "other")
"""Kinds of branches, by the number that a program is given for them."""

COND, UNCOND = 0, 1
ANY = len(BRANCHES)
"""The place in `seen` of any branch."""


def where_it_stands(step: int, num_steps: int | None, branch: str) -> dict[str, int]:
    """The three numbers that a program is given for a call, by name and in order."""
    kind = branch if branch in BRANCHES else BRANCHES[-1]
    steps = -1 if num_steps is None else num_steps
    return {"step": step, "num_steps": steps, "branch": BRANCHES.index(kind)}


# ----------------------------------------------------------------------------- rows


def rows_of(value: Tensor, latent: Tensor) -> Tensor:
    """A () tensor, or one row for all, as (rows,)."""
    return value.reshape(-1)[: latent.shape[0]].expand(latent.shape[0])


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Row by row; a row of (rows,) may stand for several of the values (frames folded in)."""
    each = new.shape[0] // rows.shape[0] if new.ndim else 1
    if each != 1:
        rows = rows.repeat_interleave(each)
    return torch.where(rows.view(-1, *(1,) * (new.ndim - 1)), new, old)


def told(value: Tensor, tag: Tensor) -> Tensor:
    """What a slot holds, NaN in rows that are cold."""
    if value.shape[0] < tag.shape[0]:  # one row for all
        tag = tag[: value.shape[0]]
    return where_rows(tag > 0, value, torch.full_like(value, torch.nan))


def tag_of(step: Tensor, latent: Tensor) -> Tensor:
    """(rows,) a step as it is kept: plus one."""
    return rows_of(step + 1, latent)


def own(value: Tensor) -> Tensor:
    """Contiguous memory of its own; a size is what it is."""
    if not isinstance(value, Tensor):
        return value
    return value.clone(memory_format=torch.contiguous_format)


def contiguous(value: Tensor) -> Tensor:
    """The value in contiguous memory; a size is what it is."""
    return value.contiguous() if isinstance(value, Tensor) else value


def set_number(value: Tensor, index: Any, number: float) -> None:
    """``value[index] = number``, which makes a constant of it: an arm has no room for any."""
    places = index if isinstance(index, tuple) else (index,)
    if any(isinstance(place, Tensor) for place in places):  # what that gives is no view
        value[index] = value.new_full((), number)
    else:
        value[index].fill_(number)


def every(taken: Tensor, active: Tensor | None) -> Tensor:
    """() whether all rows that compute here may be reused."""
    return (taken if active is None else taken | ~active).all()


def but(taken: Tensor, active: Tensor | None) -> Tensor:
    """(rows,) those that compute within an arm."""
    return ~taken if active is None else active & ~taken


# --------------------------------------------------------------------------- branches


def called(seen: Tensor, step: Tensor, branch: Tensor) -> Tensor:
    """`seen` after a call."""
    places = torch.arange(ANY + 1, device=seen.device)
    return torch.where((places == branch) | (places == ANY), step + 1, seen)


def lets(
    when: When, step: Tensor, branch: Tensor, seen: Tensor, latent: Tensor, mask: Tensor | None
) -> Tensor:
    """(rows,) the rows in which a guard's arm writes; `mask` holds those that are full."""
    here = seen == step + 1
    first, cond, uncond = ~here[ANY], branch == COND, branch == UNCOND
    allowed = {
        When.FIRST_CALL: first,
        When.FIRST_FULL: first,
        When.COND: cond,
        When.COND_FULL: cond & here[UNCOND],
        When.UNCOND_FIRST: uncond & ~here[COND],
        When.UNCOND_FULL: uncond & here[COND],
    }[when]
    rows = rows_of(allowed, latent)
    return rows if mask is None else rows & mask


# ---------------------------------------------------------------------------- signals


def observe(sums: Tensor, step: Tensor, compared: Tensor, old: Tensor) -> Tensor:
    """The sums of a signal as they are kept, added to those of another branch of this step.

    Args:
        sums: (rows * k or 1, 2 or 4), see `ir.ops.l1_sums`.
        step: ().
        compared: (rows,) the tag of what it was compared with.
        old: what was kept before.

    Returns:
        (rows, 6) float64: diff, ref, sum and number of second ratios, step plus one, gap.
    """
    rows, columns = compared.shape[0], sums.shape[1]
    value = sums.double()
    if value.shape[0] != rows:
        one = value.shape[0] == 1
        value = value.expand(rows, columns) if one else value.view(rows, -1, columns).sum(1)
    nothing = torch.zeros_like(value[:, 0])
    ratio, count = nothing, nothing
    if columns > 2:
        there = value[:, 3] > 0
        ratio = torch.where(there, value[:, 2] / value[:, 3], 0.0)
        count = there.double()
    cold = compared == 0
    diff, ref = (torch.where(cold, torch.nan, value[:, i]) for i in (0, 1))
    tag = nothing + (step + 1)
    gap = torch.where(cold, 1, (step + 1 - compared).clamp(min=1)).double()
    same = old[:, 4] == tag
    sums = torch.stack([diff, ref, ratio, count], dim=1)
    sums = torch.where(same[:, None], old[:, :4] + sums, sums)
    return torch.cat([sums, tag[:, None], torch.where(same, old[:, 5], gap)[:, None]], dim=1)


def measure(kept: Tensor) -> TracedMeasure:
    """What `observe` kept, as a rule sees it."""
    diff, ref, ratio, count, tag, gap = kept.unbind(1)
    return TracedMeasure(
        diff=diff,
        ref=ref,
        step=tag.to(torch.int64) - 1,
        gap=gap.clamp(min=1),
        second=torch.where(count > 0, ratio / count, torch.nan),
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a predictor, (rows, count) float32."""

    predictor: Predictor
    __name__ = "weights"  # FX calls the nodes by it

    def __call__(self, step: Tensor, tags: Sequence[Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        ratios = {name: measure(value).second for name, value in kept.items()}
        return traced_weights(self.predictor, step, tags, ratios)


# --------------------------------------------------------------------------- decision


class Rule:
    """A policy's decision for all rows of a call, with what the frame makes of it."""

    __name__ = "decide"

    def __init__(self, policy: Policy, layout: Layout) -> None:
        self.trigger = policy.trigger
        self.sites = tuple(site.name for site in policy.sites)
        self.cfg = frozenset(site.name for site in policy.sites if isinstance(site, Cfg))
        self.needs_timestep = policy.needs_timestep
        self.lasting = {site: [slot.name for slot in layout.lasting(site)] for site in self.sites}
        self.state: Dtypes = dict(self.trigger.traced_state)
        """Names and dtypes of the state, (rows,) each."""
        if self.trigger.shared_by_branches:  # decided at a step's first call
            self.state |= {f"chosen.{site}": torch.bool for site in self.sites}
            self.state |= {"chosen": torch.int64}
        if self.needs_timestep:
            self.state |= {"timestep.scale": torch.float64}

    def __call__(
        self,
        step: Tensor,
        num_steps: Tensor,
        branch: Tensor,
        seen: Tensor,
        tags: Mapping[str, Sequence[Tensor]],
        signals: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        latent: Tensor,
        time: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """(rows that are full, for each site the rows that reuse it, the new state)."""
        nothing = torch.zeros(latent.shape[0], dtype=torch.bool, device=latent.device)
        uncond, cond_is_there = branch == UNCOND, seen[COND] == step + 1
        held = {site: self._held(tags[site], nothing) for site in self.sites}
        # What this call can reuse, and what a decision for the whole step may name.
        here = {s: h & uncond & cond_is_there if s in self.cfg else h for s, h in held.items()}
        known = (branch == COND) | cond_is_there
        in_step = {s: h & known if s in self.cfg else h for s, h in held.items()}

        new = dict(state)
        timestep = nothing.double() + torch.nan
        if self.needs_timestep and time is not None:
            times = rows_of(time.double(), latent)
            scale = state["timestep.scale"]
            usual = torch.where(times.max() <= 1, 1000.0, 1.0)  # some models are given 1 to 0
            new["timestep.scale"] = torch.where(scale > 0, scale, usual)
            timestep = times * new["timestep.scale"]
        shared = self.trigger.shared_by_branches
        facts = TracedFacts(
            step=step,
            num_steps=num_steps,
            uncond=uncond,
            warm=in_step if shared else here,
            signals={name: measure(kept) for name, kept in signals.items()},
            timestep=timestep,
            nothing=nothing,
        )
        choice, changed = self.trigger.traced(
            facts, {n: state[n] for n in self.trigger.traced_state}
        )
        choice = {site: choice.get(site, nothing) for site in self.sites}
        if shared:
            again = state["chosen"] == step + 1
            choice = {s: torch.where(again, state[f"chosen.{s}"], c) for s, c in choice.items()}
            changed = {n: torch.where(again, state[n], value) for n, value in changed.items()}
            new |= {f"chosen.{site}": c for site, c in choice.items()}
            new["chosen"] = tag_of(step, latent)
        new |= changed

        taken = {site: mask & here[site] for site, mask in choice.items()}
        not_here = {site: choice[site] & ~uncond for site in self.cfg}
        full = ~any_of(taken, any_of(not_here, nothing))
        return (full, *taken.values(), *(new[name].to(self.state[name]) for name in self.state))

    def _held(self, tags: Sequence[Tensor], nothing: Tensor) -> Tensor:
        held = ~nothing if tags else nothing
        for tag in tags:
            held = held & (tag > 0)
        return held
