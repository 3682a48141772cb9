"""diffusers pipelines: which components are denoisers, and the scheduler as a clock.

Nothing here imports diffusers: a pipeline is anything with `components` and a scheduler.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import nn

from cachepass.errors import CachePassError

P = TypeVar("P")

_TIME = ("timestep", "timesteps")
_CLOCK = "_cachepass_clock"


class Clocked(Protocol):
    """What a scheduler is the clock of."""

    def begin_request(self, num_steps: int) -> None: ...
    def end_step(self) -> None: ...


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


class Followers(list[Clocked]):
    """What a scheduler is the clock of; a copy of the scheduler has none."""

    def __deepcopy__(self, _: object) -> Followers:
        return Followers()


def follow(scheduler: Any, clocked: Clocked) -> None:
    """Let a scheduler start requests and end steps. Wraps the instance only."""
    followers = vars(scheduler).setdefault(_CLOCK, Followers())
    if not any(other is clocked for other in followers):
        followers.append(clocked)
    kind = type(scheduler)

    # Bound methods, not closures over the scheduler: some pipelines work on a deep copy of it.
    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        for follower in getattr(self, _CLOCK):
            follower.begin_request(len(self.timesteps))
        return result

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        for follower in getattr(self, _CLOCK):
            follower.end_step()
        return result

    for method in (set_timesteps, step):
        vars(scheduler)[method.__name__] = types.MethodType(method, scheduler)
