"""What reused sites should give, on a model that nobody rewrote: hooks on its own blocks.

For models that no reference was written for. Decisions are taken from a report and replayed: a
skipped run of blocks still computes, and what it returns is replaced. What stands in are the usual
predictors: the last output of a call, the last residual of blocks, the last difference of guidance.
Nothing here knows how cachepass rewrites a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Streams = list[Tensor]


class Replay:
    """A request on a plain model, told what is reused in each call."""

    def __init__(
        self,
        model: nn.Module,
        stacks: Sequence[str],
        sites: Mapping[str, tuple[int, int]],
    ) -> None:
        """Take a model.

        Args:
            model: not compiled.
            stacks: paths of its stacks, in the order of their execution.
            sites: runs of blocks ``[start, stop)`` by name, counted over all stacks.
        """
        self.model, self.sites = model, sites
        self.blocks = [b for path in stacks for b in model.get_submodule(path).children()]
        self.kept: dict[tuple[str, str], Any] = {}
        """(site, branch) -> what stands in."""
        self.step, self.now = -1, dict[str, Streams]()
        """Outputs of this step's calls by branch."""

    @torch.no_grad()
    def call(
        self, step: int, branch: str, given: Mapping[str, Any], reused: Collection[str]
    ) -> Streams:
        """The tensors that a call returns, where the sites `reused` are."""
        if step != self.step:
            self.step, self.now = step, {}
        if "step" in reused:
            kept: Streams = self.kept["step", branch]
            return kept
        if "cfg" in reused:
            pairs = zip(self.now["cond"], self.kept["cfg", ""], strict=True)
            return [c + delta for c, delta in pairs]
        runs = [_Run(self, branch, name, name in reused) for name in self.sites]
        try:
            out = tensors(self.model(**given))
        finally:
            for run in runs:
                run.remove()
        self.now[branch] = out
        if not reused:
            for run in runs:
                self.kept[run.name, branch] = run.residuals()
            self.kept["step", branch] = out
            if {"cond", "uncond"} <= self.now.keys():
                pairs = zip(self.now["cond"], self.now["uncond"], strict=True)
                self.kept["cfg", ""] = [u - c for c, u in pairs]
        return out


class _Run:
    """Hooks on the blocks of a site, for one call: what any of them returns may be used later."""

    def __init__(self, owner: Replay, branch: str, name: str, reuse: bool) -> None:
        start, stop = owner.sites[name]
        self.name, self._reuse = name, reuse
        self._kept = owner.kept.get((name, branch), [])
        self._entering: Streams = []
        self._leaving: list[Streams] = []
        blocks = owner.blocks[start:stop]
        self._hooks = [blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        self._hooks += [block.register_forward_hook(self._leave) for block in blocks]

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._entering = tensors((args, kwargs))

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        leaving = tensors(output)
        self._leaving.append(leaving)
        if not self._reuse:
            return None
        kept = self._kept[len(self._leaving) - 1]
        made = iter(
            value if base is None else base + value
            for base, value in zip(self._bases(leaving), kept, strict=True)
        )
        leaves, spec = pytree.tree_flatten(output)
        replaced = [next(made) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(replaced, spec)

    def _bases(self, leaving: Streams) -> list[Tensor | None]:
        """For each stream, the same one where it enters: the first of its shape and type."""
        free, found = list(self._entering), []
        for out in leaving:
            base = next((e for e in free if (e.shape, e.dtype) == (out.shape, out.dtype)), None)
            free = [e for e in free if e is not base]
            found.append(base)
        return found

    def residuals(self) -> list[Streams]:
        """Block by block, stream by stream."""
        return [
            [out.clone() if base is None else out - base for base, out in
             zip(self._bases(leaving), leaving, strict=True)]
            for leaving in self._leaving
        ]  # fmt: skip

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def tensors(value: Any) -> Streams:
    """All tensors in a tuple, a dict or one of diffusers' outputs."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
