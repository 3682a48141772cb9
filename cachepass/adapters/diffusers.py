"""diffusers pipelines: which components are denoisers, and the scheduler as a clock.

Nothing here imports diffusers: a pipeline is anything with `components` and a scheduler.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from cachepass.errors import CachePassError
from cachepass.runtime.denoiser import Denoiser

P = TypeVar("P")

_TIME = ("timestep", "timesteps")
_CLOCK = "_cachepass_clock"


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Components of a pipeline that are called with a timestep, by name."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise CachePassError(
            f"expected a torch.nn.Module or a diffusers pipeline, got {type(pipe).__name__}"
        )
    return {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and _takes_time(module)
    }


def _takes_time(module: nn.Module) -> bool:
    inner = getattr(module, "_orig_mod", module)
    parameters = inspect.signature(inner.forward).parameters
    return any(name in parameters for name in _TIME)


def _is_cached(module: nn.Module) -> bool:
    return isinstance(getattr(module, "denoiser", None), Denoiser)


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
        cached = wrap(name, module)
        setattr(pipe, name, cached)
        follow(pipe.scheduler, cached.denoiser)  # type: ignore[attr-defined]
    return pipe


def detach(pipe: P) -> P:
    """Put the plain denoisers and the plain scheduler back."""
    for name, module in denoisers(pipe).items():
        if _is_cached(module):
            setattr(pipe, name, module._orig_mod)
    scheduler: Any = pipe.scheduler  # type: ignore[attr-defined]
    for name in ("set_timesteps", "step", _CLOCK):
        vars(scheduler).pop(name, None)
    return pipe


def follow(scheduler: Any, denoiser: Denoiser) -> None:
    """Let a scheduler start requests and end steps of a denoiser. Wraps the instance only."""
    followers: list[Denoiser] | None = vars(scheduler).get(_CLOCK)
    if followers is not None:
        followers.append(denoiser)
        return
    followers = [denoiser]
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    @functools.wraps(set_timesteps)
    def begin(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        for follower in followers:
            follower.begin_request(len(scheduler.timesteps))
        return result

    @functools.wraps(step)
    def end(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        for follower in followers:
            follower.end_step()
        return result

    vars(scheduler).update({_CLOCK: followers, "set_timesteps": begin, "step": end})
