"""What a cached request should do, by hand, on a Wan model that nobody rewrote.

`Reference` runs the model's own modules piece by piece and replaces the pieces that are
reused, as a `Rule` says (tests/rules.py has the published ones). Nothing here knows
cachepass: this is the other side of every comparison in tests/runtime.
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

    probe: int = 0
    """How many blocks run before the decision; what they did is measured as "probe"."""

    independent = False
    """Whether a sublayer that computes is kept whatever else is reused."""

    def decide(self, ref: Reference, step: int, branch: str) -> set[str]:
        raise NotImplementedError

    def computed(self, ref: Reference, step: int, branch: str) -> None:
        """After a full call."""

    def stand_in(self, ref: Reference, name: str, branch: str, base: Tensor | None) -> Tensor:
        """In place of a skipped value; `base` is what a residual is added to."""
        value = ref.kept[name, branch]
        return value.clone() if base is None else base + value


class Reference:
    """A request of `num_steps` steps, separate calls for the branches of guidance."""

    def __init__(self, model: Any, rule: Rule, num_steps: int) -> None:
        self.model, self.rule, self.num_steps = model, rule, num_steps
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.history: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        """All values that were kept, newest first, with their steps."""
        self.changes: dict[tuple[str, str], Change] = {}
        self.decisions: list[tuple[int, str, list[str]]] = []
        self.branches: list[str] = []
        self.step = -1
        self.texts: dict[str, Tensor] = {}
        self.unconditional: Tensor | None = None
        self.ahead: Tensor | None = None
        self.ahead_reused: list[str] = []
        self.now = torch.empty(0)
        self.time = 0.0
        self.timestep_embedding: Tensor | None = None
        self.conditional: Tensor | None = None
        self.choice: set[str] = set()

    # ------------------------------------------------------------------ one call

    @torch.no_grad()
    def call(self, step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        model, rule = self.model, self.rule
        if branch == "cond" and self.ahead is not None:  # was made for the unconditional call
            out, self.ahead = self.ahead, None
            self.decisions.append((step, branch, self.ahead_reused))
            return out
        first = step != self.step
        self.now, self.time = latent, float(time[0])
        if first:
            self.step, self.conditional, self.unconditional = step, None, None
            self._observe("latent", "", latent, step)
        if branch not in self.branches:
            self.branches.append(branch)
        rope = model.rope(latent)
        h = model.patch_embedding(latent).flatten(2).transpose(1, 2).contiguous()
        temb, projection, context, _ = model.condition_embedder(time, text, None)
        projection = projection.unflatten(1, (6, -1))
        self.arguments = (context, projection, rope)
        self._observe("timestep", branch, projection, step)
        start, entering = rule.probe, h
        for i in range(start):
            h = self.block(i, h, branch, set(), False)
        self.probed, probe = h, h - entering
        self.probe_residual = probe
        if start:
            self._change("probe", branch, probe, step)
        if first or not rule.shared:
            self.choice = rule.decide(self, step, branch)
        asked, self.texts[branch] = self.choice, text
        reused = {name for name in asked if self.warm(name, branch)}
        full = not reused and not ("cfg" in asked and branch != "uncond")
        self.decisions.append((step, branch, sorted(reused)))
        if "cfg" in reused and self.conditional is None:  # one step's conditional call, ahead of it
            mine = self.arguments
            self.decisions.pop()
            self.conditional = self.call(step, "cond", latent, time, self.texts["cond"])
            self.ahead, self.arguments = self.conditional, mine
            _, _, self.ahead_reused = self.decisions.pop()
            self.decisions.append((step, branch, sorted(reused)))
        out = self._body(h, start, temb, latent, branch, reused, full, step)
        if full:
            if rule.probe:
                self._keep("probe", branch, probe, step)
            rule.computed(self, step, branch)
        return out

    def _body(
        self, h: Tensor, start: int, temb: Tensor, latent: Tensor, branch: str,
        reused: set[str], full: bool, step: int,
    ) -> Tensor:  # fmt: skip
        if "cfg" in reused:
            return self.rule.stand_in(self, "cfg", "", self.conditional)
        whole = self.rule.whole_call
        if whole in reused:
            assert whole is not None
            out = self.rule.stand_in(self, whole, branch, None)
        else:
            ranges = sorted(self.rule.ranges, key=lambda r: r[1][0] - r[1][1])
            h = self._run(h, start, len(self.model.blocks), ranges, branch, reused, full, step)
            out = self._epilogue(h, temb, latent)
            if full and whole is not None:
                self._observe(whole, branch, out, step)
        if branch == "cond":
            self.conditional = out.clone()
            if full and self.unconditional is not None:
                self._observe("cfg", "", self.unconditional - out, step)
        elif self.conditional is None:
            self.unconditional = out.clone()
        elif full or self.rule.independent:
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
            h = self.rule.stand_in(self, name, branch, h)
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
            name = f"{kind}.{i}.{part}"
            if kind in reused or f"{part}-{kind}" in reused:
                return self.rule.stand_in(self, name, branch, None)
            out: Tensor = value()
            if full or self.rule.independent:
                self._keep(name, branch, out, self.step)
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
            known = self.conditional is not None or "cond" in self.texts
            ready = known and ("cfg", "") in self.kept
            return branch == "uncond" and ready
        if name == "mlp" or name.endswith("attention"):
            kind = name.rpartition("-")[2]
            return any(k.startswith(f"{kind}.") and b == branch for k, b in self.kept)
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
        self._keep(name, branch, now, step)

    def _keep(self, name: str, branch: str, now: Tensor, step: int) -> None:
        self.kept[name, branch] = now.clone()
        self.history.setdefault((name, branch), []).insert(0, (step, now.clone()))

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
