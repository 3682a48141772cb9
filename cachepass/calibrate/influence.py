"""MixCache's influence: disturb what each granularity caches, and look at the final latent."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cachepass.calibrate.runs import Fitted, Runs
from cachepass.errors import PolicyError
from cachepass.ir.boundary import Blocks, Layout
from cachepass.runtime.guidance import CONCATENATED, halves
from cachepass.runtime.policies import Compute, MixCache

SIZE = 0.03
"""Of the noise, as a share of the root mean square of what it is added to [ours]."""

MOMENTS = (0.25, 0.5, 0.75)
"""Shares of the steps at which is disturbed, one step at a time [ours]."""

GRANULARITIES = ("step", "cfg", "block")
_APART = 1_000_003  # from the seeds that requests start from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A denoiser, what was found in it, and where in a request each of its calls stands."""

    module: nn.Module
    layout: Layout
    calls: tuple[tuple[int, str], ...]
    """(step, branch)."""


def fit_mixcache(runs: Runs, base: MixCache, rate: float | None) -> Fitted:
    """I of (step, cfg, block): the relative L1 change of the final latent, the largest 1.

    Noise goes to the output of the calls of a step, to the difference of its branches, and to the
    residual of the middle blocks. Without separate guidance calls `cfg` is 1, for it is not
    used. Source: MixCache's perturbation analysis (arXiv 2508.12691), its sizes [ours].
    """
    if rate is not None:
        raise PolicyError(
            f"calibrate(`rate`={rate:g}): policy 'mixcache' has no number that a rate could set: "
            "leave it out, and set `interval`, `shorten` and `lengthen` by `options`"
        )
    with runs.compiled(Compute()) as models:
        runs(0)
        subjects = [
            Subject(
                module=model._orig_mod,
                layout=model.denoiser.programs[-1].inputs.layout,
                calls=tuple((r.step, r.branch) for r in model.denoiser.requests[-1].records),
            )
            for model in models
            if model.denoiser.programs
        ]
    steps = 1 + max(step for subject in subjects for step, _ in subject.calls)
    moments = sorted({int(share * steps) for share in MOMENTS})
    branches = {branch for subject in subjects for _, branch in subject.calls}
    guided = bool(branches & {"uncond", CONCATENATED})
    disturbed = [name for name in GRANULARITIES if guided or name != "cfg"]
    (middle,) = (site for site in base.combine().sites if isinstance(site, Blocks))
    runs.expect(len(runs.prompts) * (1 + len(moments) * len(disturbed)))
    changes: dict[str, list[float]] = {name: [] for name in disturbed}
    for prompt in range(len(runs.prompts)):
        undisturbed = runs(prompt).float()
        for step in moments:
            for name in disturbed:
                noise = Noise(runs.seed + _APART + step)
                with contextlib.ExitStack() as hooks:
                    for subject in subjects:
                        hooks.enter_context(_disturb(subject, name, step, middle, noise))
                    change = (runs(prompt).float() - undisturbed).abs().mean()
                if noise.used:
                    changes[name].append(float(change / undisturbed.abs().mean()))
    means = {name: statistics.fmean(found) for name, found in changes.items() if found}
    largest = max(means.values(), default=math.nan)
    if not (math.isfinite(largest) and largest > 0):
        raise PolicyError(
            f"noise changed the final latent by {means}: what this pipeline returns as its latent "
            "does not depend on its model, or is not finite"
        )
    influence = tuple(means[n] / largest if n in means else 1.0 for n in GRANULARITIES)
    return Fitted(fields={"influence": influence}, measured=means)


class Noise:
    """Adds Gaussian noise, the same sequence for each seed, on any device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.used = False

    def __call__(self, value: Tensor, cached: Tensor) -> Tensor:
        """`value` with noise of `SIZE` times the root mean square of `cached`."""
        self.used = True
        draw = torch.randn(value.shape, generator=self._generator).to(value.device)
        size = cached.float().square().mean().sqrt()
        return (value + SIZE * size * draw).to(value.dtype)


@contextlib.contextmanager
def _disturb(
    subject: Subject, granularity: str, step: int, middle: Blocks, noise: Noise
) -> Iterator[None]:
    """Disturb one granularity of one step, by hooks that are gone at the end."""
    module, calls = subject.module, iter(subject.calls)
    now: tuple[int, str] = (-1, "")
    cond: Tensor | None = None
    entering: list[Tensor] = []

    def begin(*_: object) -> None:
        nonlocal now
        now = next(calls)

    def of_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal cond
        if now[0] != step:
            return output
        value = main_of(output)
        if granularity == "step":
            return with_main(output, noise(value, value))
        if now[1] == "cond":
            cond = value
        elif now[1] == "uncond" and cond is not None:
            return with_main(output, noise(value, value - cond))
        elif now[1] == CONCATENATED and halves(args, kwargs) is not None:
            u, c = value.chunk(2)  # as diffusers' pipelines lay them
            return with_main(output, torch.cat([noise(u, u - c), c]))
        return output

    def before_middle(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[:] = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]

    def of_middle(_: nn.Module, args: object, output: Any) -> Any:
        if now[0] != step:
            return output
        value = main_of(output)
        same = [e for e in entering if e.shape == value.shape and e.dtype == value.dtype]
        return with_main(output, noise(value, value - same[0] if same else value))

    handles = [module.register_forward_pre_hook(begin)]
    if granularity == "block":
        start, stop = middle.range(subject.layout.blocks)
        first, last = (block_of(module, subject.layout, i) for i in (start, stop - 1))
        handles.append(first.register_forward_pre_hook(before_middle, with_kwargs=True))
        handles.append(last.register_forward_hook(of_middle))
    else:
        handles.append(module.register_forward_hook(of_output, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_of(module: nn.Module, layout: Layout, index: int) -> nn.Module:
    """The module of a block, counted over all stacks in execution order."""
    for stack, blocks in layout.stacks.items():
        if index < blocks:
            return module.get_submodule(str(index) if stack == "self" else f"{stack}.{index}")
        index -= blocks
    raise IndexError(index)


def _tensors(output: Any) -> Mapping[Any, Tensor]:
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {place: value for place, value in items if isinstance(value, Tensor)}


def main_of(output: Any) -> Tensor:
    """The largest tensor of what a module returns."""
    if isinstance(output, Tensor):
        return output
    return max(_tensors(output).values(), key=Tensor.numel)


def with_main(output: Any, value: Tensor) -> Any:
    """The same output with another tensor in the place of the largest."""
    if isinstance(output, Tensor):
        return value
    tensors = _tensors(output)
    place = max(tensors, key=lambda key: tensors[key].numel())
    if isinstance(output, Mapping):  # as diffusers' outputs are
        return type(output)(**{**output, place: value})
    return type(output)(value if i == place else other for i, other in enumerate(output))
