"""diffusers pipelines: which components are denoisers, and when their loops begin and end.

Nothing here imports diffusers: a pipeline is anything with `components` and a scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from typing import Any, TypeVar

from torch import nn

from cachepass.adapters.scheduler import clock_of, follow, unfollow, wrap_method
from cachepass.errors import CachePassError

P = TypeVar("P")

_TIME = ("timestep", "timesteps", "t")
_HELPS = "conditioning_scale"
_WRAPPED = ("progress_bar", "maybe_free_model_hooks")


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Components of a pipeline that are called with a timestep to denoise, by name."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise CachePassError(
            f"expected a torch.nn.Module or a diffusers pipeline, got {type(pipe).__name__}"
        )
    return {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and _denoises(module)
    }


def _denoises(module: nn.Module) -> bool:
    """Whether a module takes a timestep, and is no helper of one that does.

    A ControlNet takes a timestep, too. What it returns is added inside of the denoiser, at a
    scale that it is given. Several stand in a list, which takes what each takes.
    """
    inner = getattr(module, "_orig_mod", module)
    parameters = inspect.signature(inner.forward).parameters
    return any(name in parameters for name in _TIME) and _HELPS not in parameters


def _is_cached(module: nn.Module) -> bool:
    return bool(getattr(module, "clocked", None))


def attach(pipe: P, wrap: Callable[[str, nn.Module], Any]) -> P:
    """Wrap every denoiser of a pipeline and let its scheduler tell requests and steps."""
    found = denoisers(pipe)
    if not found:
        raise CachePassError(
            f"{type(pipe).__name__} holds no denoiser: looked for a component whose forward takes "
            f"`timestep`, found {sorted(pipe.components)}"  # type: ignore[attr-defined]
        )
    for name, module in found.items():
        if _is_cached(module):
            raise CachePassError(
                f"`{name}` of this pipeline is compiled already: cachepass.restore(pipe) first"
            )
    # All or none: what cannot be wrapped leaves the pipeline as it was.
    wrapped = {name: wrap(name, module) for name, module in found.items()}
    for name, cached in wrapped.items():
        setattr(pipe, name, cached)
        for clocked in cached.clocked:
            follow(pipe.scheduler, clocked)  # type: ignore[attr-defined]
    _watch(pipe)
    return pipe


def _watch(pipe: Any) -> None:
    """Notice where the loop of a pipeline begins and where the pipeline is done."""
    kind = type(pipe)

    def progress_bar(self: Any, iterable: Any = None, total: Any = None, **options: Any) -> Any:
        clock = clock_of(self.scheduler)
        if clock is not None:
            clock.begin_loop(_length(self, iterable, total))
        return kind.progress_bar(self, iterable, total, **options)

    def maybe_free_model_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock = clock_of(self.scheduler)
        if clock is not None:
            clock.end()
        return kind.maybe_free_model_hooks(self, *args, **kwargs)

    wrap_method(pipe, progress_bar)
    wrap_method(pipe, maybe_free_model_hooks)


def _length(pipe: Any, iterable: object, total: object) -> int | None:
    """What a pipeline says of its loop's length as the loop begins."""
    if isinstance(iterable, Sized):
        return len(iterable)
    # Set by most pipelines just before, and public as `num_timesteps`.
    timesteps = getattr(pipe, "_num_timesteps", None)
    if isinstance(timesteps, int):
        return timesteps
    # The bar counts a solver's two evaluations as one step; schedulers count them as two.
    if isinstance(total, int) and getattr(pipe.scheduler, "order", 1) == 1:
        return total
    return None


def detach(pipe: P) -> P:
    """Put the plain denoisers and the plain scheduler back."""
    for name, module in denoisers(pipe).items():
        if _is_cached(module):
            setattr(pipe, name, module._orig_mod)
    unfollow(pipe.scheduler)  # type: ignore[attr-defined]
    for name in _WRAPPED:
        vars(pipe).pop(name, None)
    return pipe
