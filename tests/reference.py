"""What a cached request should do, by hand, on a Wan model that nobody rewrote.

`Reference` runs the model's own modules piece by piece and replaces the pieces that are
reused; `Rule` subclasses transcribe the published rules in plain floats. Nothing here
knows cachepass: this is the other side of every comparison in tests/runtime.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

NAN = math.nan


def rel(now: Tensor, before: Tensor | None) -> float:
    """Relative L1 change of everything together; NaN without a value before."""
    if before is None:
        return NAN
    size = float(before.double().abs().sum())
    return float((now.double() - before.double()).abs().sum()) / size if size > 0 else NAN


@dataclasses.dataclass
class Change:
    """A measured change: sums, so that those of two branches can be added."""

    diff: float
    ref: float
    step: int
    gap: int
    motion: float | None = None

    @property
    def rel(self) -> float:
        return self.diff / self.ref if math.isfinite(self.diff) and self.ref > 0 else NAN


class Rule:
    """A policy in plain floats: one row, told what it may know, says what to reuse."""

    shared = False
    """Whether the first call of a step decides for all calls of the step."""

    ranges: tuple[tuple[str, tuple[int, int]], ...] = ()
    """Sites that are runs of blocks; "cfg", "attention" and "mlp" go by their names."""

    whole_call: str | None = None
    """The site that is the output of the whole call."""

    probe: int | None = None
    """A block whose residual is measured before the decision."""

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        raise NotImplementedError

    def computed(self, ref: Reference, step: int, branch: str) -> None:
        """After a full call."""


class Reference:
    """A request of `num_steps` steps, separate calls for the branches of guidance."""

    def __init__(self, model: Any, rule: Rule, num_steps: int) -> None:
        self.model, self.rule, self.num_steps = model, rule, num_steps
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.changes: dict[tuple[str, str], Change] = {}
        self.decisions: list[tuple[int, str, list[str]]] = []
        self.branches: list[str] = []
        self.step = -1
        self.latent: Tensor | None = None
        self.timestep_embedding: Tensor | None = None
        self.conditional: Tensor | None = None
        self.choice: set[str] = set()

    # ------------------------------------------------------------------ one call

    @torch.no_grad()
    def call(self, step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        model, rule = self.model, self.rule
        first = step != self.step
        if first:
            self.step, self.conditional = step, None
            self._observe("latent", "", latent, step)
        if branch not in self.branches:
            self.branches.append(branch)
        rope = model.rope(latent)
        h = model.patch_embedding(latent).flatten(2).transpose(1, 2).contiguous()
        temb, projection, context, _ = model.condition_embedder(time, text, None)
        projection = projection.unflatten(1, (6, -1))
        self.arguments = (context, projection, rope)
        self._observe("timestep", branch, projection, step)
        start = 0
        if rule.probe is not None:
            assert rule.probe == 0
            entering, h, start = h, self.block(0, h, branch, set(), False), 1
            probe = h - entering
            self._change("probe", branch, probe, step)
        if first or not rule.shared:
            self.choice = rule.decide(self, step, branch)
        asked = self.choice
        reused = {name for name in asked if self.warm(name, branch)}
        full = not reused and not ("cfg" in asked and branch != "uncond")
        self.decisions.append((step, branch, sorted(reused)))
        out = self._body(h, start, temb, latent, branch, reused, full, step)
        if full:
            if rule.probe is not None:
                self.kept["probe", branch] = probe
            rule.computed(self, step, branch)
        return out

    def _body(
        self, h: Tensor, start: int, temb: Tensor, latent: Tensor, branch: str,
        reused: set[str], full: bool, step: int,
    ) -> Tensor:  # fmt: skip
        if "cfg" in reused:
            assert self.conditional is not None
            return self.conditional + self.kept["cfg", ""]
        whole = self.rule.whole_call
        if whole in reused:
            assert whole is not None
            out = self.kept[whole, branch].clone()
        else:
            ranges = sorted(self.rule.ranges, key=lambda r: r[1][0] - r[1][1])
            h = self._run(h, start, len(self.model.blocks), ranges, branch, reused, full, step)
            out = self._epilogue(h, temb, latent)
            if full and whole is not None:
                self._observe(whole, branch, out, step)
        if branch == "cond":
            self.conditional = out.clone()
        elif full and self.conditional is not None:
            delta = out - self.conditional
            self._observe("cfg", "", delta, step)
        return out

    def _run(
        self, h: Tensor, start: int, stop: int, ranges: list[tuple[str, tuple[int, int]]],
        branch: str, reused: set[str], full: bool, step: int,
    ) -> Tensor:  # fmt: skip
        if not ranges:
            for i in range(start, stop):
                h = self.block(i, h, branch, reused, full)
            return h
        name, (low, high) = ranges[0]
        entering = h = self._run(h, start, low, [], branch, reused, full, step)
        if name in reused:
            h = h + self.kept[name, branch]
        else:
            h = self._run(h, low, high, ranges[1:], branch, reused, full, step)
            if full:
                self._observe(name, branch, h - entering, step)
        return self._run(h, high, stop, [], branch, reused, full, step)

    def block(self, i: int, h: Tensor, branch: str, reused: set[str], full: bool) -> Tensor:
        """`WanTransformerBlock.forward`, its three residual branches apart."""
        block = self.model.blocks[i]
        context, projection, rope = self.arguments
        table = (block.scale_shift_table + projection.float()).chunk(6, dim=1)
        shift, scale, gate, c_shift, c_scale, c_gate = table

        def branch_of(kind: str, part: str, value: Any) -> Tensor:
            if kind in reused:
                return self.kept[f"{kind}.{i}.{part}", branch]
            out: Tensor = value()
            if full:
                self.kept[f"{kind}.{i}.{part}", branch] = out.clone()
            return out

        h = h + branch_of(
            "attention", "self",
            lambda: block.attn1(block.norm1(h) * (1 + scale) + shift, None, None, rope) * gate,
        )  # fmt: skip
        h = h + branch_of(
            "attention", "cross", lambda: block.attn2(block.norm2(h), context, None, None)
        )
        return h + branch_of(
            "mlp", "", lambda: block.ffn(block.norm3(h) * (1 + c_scale) + c_shift) * c_gate
        )

    def attention_residual(self, i: int, branch: str) -> Tensor | None:
        """Of the last full call."""
        return self.kept.get((f"attention.{i}.self", branch))

    def _epilogue(self, h: Tensor, temb: Tensor, latent: Tensor) -> Tensor:
        model = self.model
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        h = model.proj_out(model.norm_out(h) * (1 + scale) + shift)
        rows, _, frames, height, width = latent.shape
        h = h.reshape(rows, frames, height // 2, width // 2, 1, 2, 2, -1)
        out: Tensor = h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return out

    # --------------------------------------------------------------- what is kept

    def warm(self, name: str, branch: str) -> bool:
        """Whether a site has what it takes to be reused at this call."""
        if name == "cfg":
            ready = self.conditional is not None and ("cfg", "") in self.kept
            return branch == "uncond" and ready
        if name in ("attention", "mlp"):
            return any(k.startswith(f"{name}.") and b == branch for k, b in self.kept)
        return (name, branch) in self.kept

    def _change(self, name: str, branch: str, now: Tensor, step: int) -> None:
        old = self.kept.get((name, branch))
        before = self.changes.get((name, branch))
        self.changes[name, branch] = Change(
            NAN if old is None else float((now.double() - old.double()).abs().sum()),
            NAN if old is None else float(old.double().abs().sum()),
            step,
            max(step - before.step, 1) if before else 1,
        )

    def _observe(self, name: str, branch: str, now: Tensor, step: int) -> None:
        self._change(name, branch, now, step)
        self.kept[name, branch] = now.clone()

    def change(self, name: str, branch: str | None = None) -> Change | None:
        """The latest measure; of all branches together where none is named."""
        found = [
            c for (n, b), c in self.changes.items() if n == name and branch in (None, b)
        ]  # fmt: skip
        latest = [c for c in found if c.step == max(c.step for c in found)]
        if not latest:
            return None
        motions = [c.motion for c in latest if c.motion is not None]
        return Change(
            sum(c.diff for c in latest),
            sum(c.ref for c in latest),
            latest[0].step,
            latest[0].gap,
            sum(motions) / len(motions) if motions else None,
        )


# ----------------------------------------------------------------------- the rules


class ScheduleRule(Rule):
    """Reuse what a table says."""

    whole_call = "step"

    def __init__(self, table: dict[int, tuple[str, ...]], middle: tuple[int, int]) -> None:
        self.table = table
        self.ranges = (("stack", (0, 4)), ("block", middle))

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        return set(self.table.get(step, ()))


class FirstBlockRule(Rule):
    """The residual of block 0 against that of the last full call."""

    probe = 0
    ranges = (("tail", (1, 4)),)

    def __init__(self, threshold: float, warmup_steps: int = 0) -> None:
        self.threshold, self.warmup_steps = threshold, warmup_steps

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        measured = ref.changes["probe", branch].rel
        return {"tail"} if step >= self.warmup_steps and measured <= self.threshold else set()


class TeaCacheRule(Rule):
    """Equation 7: add up poly(rel change of the modulation) until it passes the threshold."""

    ranges = (("stack", (0, 4)),)

    def __init__(
        self, threshold: float, coefficients: tuple[float, ...] = (1.0, 0.0), warmup: int = 1
    ) -> None:
        self.threshold, self.coefficients, self.warmup = threshold, coefficients, warmup
        self.sums: dict[str, float] = {}

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        x = ref.changes["timestep", branch].rel
        powers = range(len(self.coefficients) - 1, -1, -1)
        estimate = math.fsum(c * x**p for c, p in zip(self.coefficients, powers, strict=True))
        total = self.sums.get(branch, 0.0) + estimate
        small = self.warmup <= step < ref.num_steps - 1 and total < self.threshold
        self.sums[branch] = total if small else 0.0
        return {"stack"} if small else set()


class AdaCacheRule(Rule):
    """The attention residual of a middle block says how many steps may pass."""

    shared = True
    ranges = (("stack", (0, 4)),)

    def __init__(
        self, codebook: tuple[tuple[float, int], ...], *, motion: bool, scale: float = 0.385,
        power: float = 8.0, gradient: float = 10.0, window: tuple[float, float] = (0, 1),
        block: int = 2, frames: int = 2,
    ) -> None:  # fmt: skip
        self.codebook, self.motion, self.block, self.frames = codebook, motion, block, frames
        self.scale, self.power, self.gradient, self.window = scale, power, gradient, window
        self.last, self.rate, self.moved = 0, 1, 1.0
        self.before: dict[str, Tensor] = {}
        self.seen = -1

    def computed(self, ref: Reference, step: int, branch: str) -> None:
        now = ref.attention_residual(self.block, branch)
        assert now is not None
        if branch in self.before:
            ref.kept["residual", branch] = self.before[branch]
        ref._observe("residual", branch, now, step)
        self.before[branch] = now
        video = now.double().unflatten(1, (self.frames, -1))
        later, earlier = video[:, 1:], video[:, :-1]
        size = (later.abs() + earlier.abs()).sum()
        ref.changes["residual", branch].motion = float((later - earlier).abs().sum() / size)

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        measured = ref.change("residual")
        if measured is not None and measured.step > self.seen and not math.isnan(measured.rel):
            self.seen = measured.step
            diff = measured.rel / measured.gap
            low, high = (share * ref.num_steps for share in self.window)
            if self.motion and low < measured.step + 1 < high:
                assert measured.motion is not None
                moved = (measured.motion / self.scale) ** self.power
                diff *= moved + abs(self.gradient * (moved - self.moved) / self.rate)
                self.moved = moved
            self.rate = self.codebook[-1][1]
            for bound, rate in reversed(self.codebook):
                if diff < bound:
                    self.rate = rate
        edge = step == 0 or step >= ref.num_steps - 2
        if edge or step - self.last >= self.rate:
            self.last = step
            return set()
        return {"stack"}


MIXCACHE: dict[str, Any] = {
    "interval": (2, 5), "start_interval": 3, "trigger": 0.06, "warmup": 0.1,
    "latest_start": 0.3, "shorten": 0.15, "lengthen": 0.05, "repeat_penalty": 5.0,
    "influence": (0.3, 0.3, 1.0),
}  # fmt: skip
"""Numbers under which a short request has runs of every granularity; not the defaults."""


class MixCacheRule(Rule):
    """One full step, then some cached ones, each at the granularity that costs least."""

    shared = True
    whole_call = "step"

    def __init__(
        self, *, interval: tuple[int, int], start_interval: int, trigger: float, warmup: float,
        latest_start: float, shorten: float, lengthen: float, repeat_penalty: float,
        influence: tuple[float, float, float], middle: tuple[int, int] = (1, 3),
    ) -> None:  # fmt: skip
        self.bounds, self.interval = interval, start_interval
        self.trigger, self.warmup, self.latest_start = trigger, warmup, latest_start
        self.shorten, self.lengthen = shorten, lengthen
        self.influence = dict(zip(("step", "cfg", "block"), influence, strict=True))
        self.penalty = repeat_penalty
        self.ranges = (("block", middle),)
        self.on, self.last_full = False, 0
        self.chosen: str | None = None
        self.in_run = self.ended_run = False

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        n = ref.num_steps
        moved = ref.change("step")
        settled = moved is not None and moved.rel / moved.gap < self.trigger
        if step >= max(5, math.ceil(self.warmup * n)) and (
            settled or step >= self.latest_start * n
        ):
            self.on = True
        if self.ended_run and self.chosen is not None:  # the call before was full, after a run
            q = ref.change(self.chosen)
            self.ended_run = False
            if q is not None and q.step == self.last_full:
                if q.rel > self.shorten or math.isnan(q.rel):
                    self.interval = max(self.bounds[0], self.interval - 1)
                elif q.rel < self.lengthen:
                    self.interval = min(self.bounds[1], self.interval + 1)
        possible = [g for g in ("step", "cfg", "block") if self._ready(ref, g)]
        full = step - self.last_full >= self.interval or step == n - 1 or not possible
        if full or not self.on:
            self.last_full = step
            self.in_run, self.ended_run = False, self.in_run
            return set()
        self.in_run = True
        costs = {}
        for g in possible:
            measured = ref.change(g)
            cost = NAN if measured is None else measured.rel / measured.gap * self.influence[g]
            cost *= self.penalty if g == self.chosen else 1.0
            costs[g] = math.inf if math.isnan(cost) else cost
        self.chosen = min(possible, key=lambda g: costs[g])
        return {self.chosen}

    @staticmethod
    def _ready(ref: Reference, granularity: str) -> bool:
        if granularity == "cfg":
            return ref.branches[:1] == ["cond"] and ("cfg", "") in ref.kept
        return all((granularity, b) in ref.kept for b in ref.branches)
