"""The published rules, transcribed in plain floats from their formulas.

Each says what to reuse, and what stands in, for one row of a `Reference`. Nothing here knows
cachepass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference import NAN, Reference, Rule, rel


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

    probe = 1
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


class DBCacheRule(Rule):
    """The residual of the first two blocks; the last block always runs."""

    probe = 2
    ranges = (("middle", (2, 3)),)

    def __init__(self, threshold: float, warmup: int, in_a_row: int, in_all: int) -> None:
        self.threshold, self.warmup, self.in_a_row, self.in_all = (
            threshold,
            warmup,
            in_a_row,
            in_all,
        )
        self.row: dict[str, int] = {}
        self.all: dict[str, int] = {}

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        row, total = self.row.get(branch, 0), self.all.get(branch, 0)
        small = step >= self.warmup and ref.changes["probe", branch].rel <= self.threshold
        if not small or row >= self.in_a_row or total >= self.in_all:
            self.row[branch] = 0
            return set()
        self.row[branch], self.all[branch] = row + 1, total + 1
        return {"middle"}


class TaylorSeerRule(Rule):
    """Full, then interval - 1 forecasts; derivatives by differences over the last interval."""

    whole_call = "step"

    def __init__(self, interval: int, order: int, first: int) -> None:
        self.interval, self.order, self.first = interval, order, first
        self.counter: dict[str, int] = {}
        self.derivatives: dict[str, list[Tensor]] = {}
        self.at: dict[str, int] = {}

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        counter = self.counter.get(branch, 0)
        last = step == ref.num_steps - 1
        if step < self.first or counter == self.interval - 1 or last:
            self.counter[branch] = 0
            return set()
        self.counter[branch] = counter + 1
        return {"step"}

    def computed(self, ref: Reference, step: int, branch: str) -> None:
        new, old = [ref.kept["step", branch].double()], self.derivatives.get(branch, [])
        for i in range(min(self.order, len(old))):
            new.append((new[i] - old[i]) / (step - self.at[branch]))
        self.derivatives[branch], self.at[branch] = new, step

    def stand_in(self, ref: Reference, name: str, branch: str, base: Tensor | None) -> Tensor:
        elapsed = ref.step - self.at[branch]
        terms = [d * elapsed**i / math.factorial(i) for i, d in enumerate(self.derivatives[branch])]
        return torch.stack(terms).sum(0).float()


class MagCacheRule(Rule):
    """Multiply calibrated ratios; the distance from 1 adds up."""

    ranges = (("stack", (0, 4)),)

    def __init__(
        self, ratios: dict[str, list[float]], threshold: float, k: int, retention: float
    ) -> None:
        self.ratios, self.threshold, self.k, self.retention = ratios, threshold, k, retention
        self.state: dict[str, tuple[float, float, int]] = {}

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        ratio, error, skipped = self.state.get(branch, (1.0, 0.0, 0))
        if step >= self.retention * ref.num_steps:
            ratio *= self.ratios[branch][step]
            error, skipped = error + abs(1 - ratio), skipped + 1
            if error < self.threshold and skipped <= self.k:
                self.state[branch] = (ratio, error, skipped)
                return {"stack"}
        self.state[branch] = (1.0, 0.0, 0)
        return set()


class EasyCacheRule(Rule):
    """k = |out change| / |in change| of the last computed pair; k |dx| / |out| adds up."""

    shared = True
    whole_call = "step"

    def __init__(self, threshold: float, warmup: int) -> None:
        self.threshold, self.warmup = threshold, warmup
        self.error, self.rate = 0.0, NAN
        self.previous: tuple[Tensor, Tensor] | None = None
        self.inputs: dict[str, Tensor] = {}

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        if self.previous is None or self.warmup > step or step == ref.num_steps - 1:
            self.error = 0.0
            return set()
        (_, before), (_, out) = ref.history["latent", ""][1], ("", self.previous[1])
        moved = float((ref.now - before).abs().mean())
        self.error += self.rate * moved / float(out.abs().mean())
        if self.error < self.threshold:
            return {"step"}
        self.error = 0.0
        return set()

    def computed(self, ref: Reference, step: int, branch: str) -> None:
        self.inputs[branch] = ref.now.clone()
        if branch != ref.branches[0]:
            return
        out = ref.kept["step", branch]
        if self.previous is not None:
            x, y = self.previous
            self.rate = float((out - y).abs().mean()) / float((ref.now - x).abs().mean())
        self.previous = (ref.now.clone(), out.clone())

    def stand_in(self, ref: Reference, name: str, branch: str, base: Tensor | None) -> Tensor:
        return ref.now + (ref.kept[name, branch] - self.inputs[branch])


class DiCacheRule(Rule):
    """The probe's output from call to call adds up; the last two residuals as anchors."""

    probe = 1
    ranges = (("tail", (1, 4)),)

    def __init__(self, threshold: float, warmup: int, bounds: tuple[float, float]) -> None:
        self.threshold, self.warmup, self.bounds = threshold, warmup, bounds
        self.error: dict[str, float] = {}
        self.before: dict[str, Tensor] = {}
        self.residual = torch.empty(0)

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        probe = ref.probed
        change = rel(probe, self.before.get(branch))
        self.before[branch] = probe
        error = self.error.get(branch, 0.0) + change
        if step < self.warmup or step == ref.num_steps - 1 or not error < self.threshold:
            self.error[branch] = 0.0
            return set()
        self.error[branch] = error
        return {"tail"}

    def stand_in(self, ref: Reference, name: str, branch: str, base: Tensor | None) -> Tensor:
        assert base is not None
        (_, r1), (_, r2) = ref.history[name, branch][:2]
        (_, p1), (_, p2) = ref.history["probe", branch][:2]
        p = ref.probe_residual
        gamma = float((p - p2).abs().mean() / (p1 - p2).abs().mean())
        low, high = self.bounds
        return base + r2 + min(max(gamma, low), high) * (r1 - r2)


class PABRule(Rule):
    """Each kind of attention at its own pace, within a window of timesteps."""

    independent = True

    def __init__(self, ranges: dict[str, int], window: tuple[float, float]) -> None:
        self.periods, self.window = ranges, window

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        low, high = self.window
        if not low < ref.time < high:
            return set()
        return {f"{kind}-attention" for kind, n in self.periods.items() if step % n}


class FasterCacheRule(Rule):
    """Extrapolated self-attention every other step; guidance in two bands."""

    independent = True

    def __init__(self, start: int, period: int, growth: float) -> None:
        self.start, self.period, self.growth = start, period, growth
        self.skipped = 0
        self.bands: list[Tensor] = []
        self.factors = [1.0, 1.0]

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        names = set()
        if step >= self.start and ref.time < 681 and step % 2:
            names.add("self-attention")
        if branch == "uncond" and step >= self.start and ref.time < 641:
            if self.skipped < self.period - 1:
                names.add("cfg")
                self.skipped += 1
            else:
                self.skipped = 0
        return names

    def stand_in(self, ref: Reference, name: str, branch: str, base: Tensor | None) -> Tensor:
        if name != "cfg":
            (_, a1), (_, a2) = ref.history[name, branch][:2]
            return a1 + 0.5 * (a1 - a2)
        assert base is not None
        (at, delta), factors = ref.history["cfg", ""][0], [1.0, 1.0]
        for step in range(at + 1, ref.step + 1):
            t = 1000 * (1 - step / ref.num_steps)
            for band, (low, high) in enumerate([(99, 901), (-1, 301)]):
                factors[band] *= self.growth if low < t < high else 1.0
        height, width = base.shape[-2:]
        centre = (
            torch.fft.fftshift(torch.fft.fft2(base + delta)),
            torch.fft.fftshift(torch.fft.fft2(base)),
        )
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        low_mask = (y - height // 2) ** 2 + (x - width // 2) ** 2 <= (min(height, width) // 5) ** 2
        u, c = centre
        mixed = sum(
            c * mask + (u * mask - c * mask) * factor
            for mask, factor in zip([low_mask, ~low_mask], factors, strict=True)
        )
        out: Tensor = torch.fft.ifft2(torch.fft.ifftshift(torch.as_tensor(mixed))).real
        return out


MIXCACHE: dict[str, Any] = {
    "interval": (2, 5), "start_interval": 3, "trigger": 0.06, "warmup": 0.1,
    "latest_start": 0.3, "shorten": 0.15, "lengthen": 0.05, "repeat_penalty": 5.0,
    "influence": (0.3, 0.3, 1.0), "predictor": None,
}  # fmt: skip
"""Numbers under which a short request has runs of every granularity; not the defaults."""


class MixCacheRule(Rule):
    """One full step, then some cached ones, each at the granularity that costs least."""

    shared = True
    whole_call = "step"

    def __init__(
        self, *, interval: tuple[int, int], start_interval: int, trigger: float, warmup: float,
        latest_start: float, shorten: float, lengthen: float, repeat_penalty: float,
        influence: tuple[float, float, float], predictor: None, middle: tuple[int, int] = (1, 3),
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
