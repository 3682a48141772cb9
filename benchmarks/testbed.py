"""What is measured: the trained `large` model of the shapes example, alone and in a loop.

512 tokens, batch 1. The loop is written out, with separate guidance calls and Euler
updates, so that its time is that of the denoising calls and next to nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import cachepass
from cachepass.capture import ISOLATED
from cachepass.runtime.policies import MixCache, Schedule
from cachepass.runtime.policies.adacache import AdaCache
from cachepass.runtime.policies.firstblock import FirstBlock
from cachepass.runtime.policies.teacache import TeaCache
from cachepass.runtime.policy import NamedPolicy
from cachepass.runtime.session import Session
from examples.shapes.pipeline import GUIDANCE_SCALE, build_scheduler
from examples.shapes.world import embed_prompt

PROMPT = "magenta triangle bounce checker"
LATENT = (1, 16, 8, 16, 16)

# At the defaults they are shipped with.
ADAPTIVE: dict[str, NamedPolicy] = {
    "mixcache": MixCache(),
    "adacache": AdaCache(),
    "adacache, no motion": AdaCache(motion=False),
    "firstblock": FirstBlock(),
    "teacache": TeaCache(),
}


def uniform(steps: int) -> Schedule:
    """The plainest schedule: every other step reuses the whole stack."""
    return Schedule.every(2, steps=steps)


def cut(model: nn.Module, blocks: int) -> nn.Module:
    """A model of the first `blocks` blocks alone, on the same weights."""
    stack = model.blocks
    assert isinstance(stack, nn.ModuleList)
    shorter = copy.copy(model)
    vars(shorter)["_modules"] = {**vars(model)["_modules"], "blocks": stack[:blocks]}
    return shorter


def plain(model: nn.Module) -> Any:
    """`torch.compile` as it comes.

    Isolated, where torch can: a second model of the same class would otherwise run the first
    one's compiled code, or stand behind it in line, and each is to run as if it were alone.
    """
    return torch.compile(model, **ISOLATED)


class Call(Protocol):
    """One denoising call; returns the velocity."""

    def __call__(self, x: Tensor, time: Tensor, text: Tensor, step: int, branch: str) -> Tensor: ...


def plain_call(model: Any) -> Call:
    """Calls of a model that needs no session."""

    def call(x: Tensor, time: Tensor, text: Tensor, step: int, branch: str) -> Tensor:
        result: Tensor = model(
            hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False
        )[0]
        return result

    return call


def session_call(model: Any, session: Session) -> Call:
    """Calls of a cachepass model, in a session."""
    inner = plain_call(model)

    def call(x: Tensor, time: Tensor, text: Tensor, step: int, branch: str) -> Tensor:
        with session.at(step=step, branch=branch):
            return inner(x, time, text, step, branch)

    return call


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Inputs of a denoising loop, made before its clock runs."""

    times: list[Tensor]
    sigmas: list[float]
    noise: Tensor
    cond: Tensor
    uncond: Tensor

    @classmethod
    def build(cls, steps: int, prompt: str = PROMPT, seed: int = 0) -> Loop:
        """The loop of so many steps of the example's Euler scheduler."""
        scheduler: Any = build_scheduler("euler")
        scheduler.set_timesteps(steps)
        return cls(
            times=[t.reshape(1) for t in scheduler.timesteps],
            sigmas=scheduler.sigmas.tolist(),
            noise=torch.randn(LATENT, generator=torch.Generator().manual_seed(seed)),
            cond=embed_prompt(prompt)[None],
            uncond=embed_prompt("")[None],
        )

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.times)

    @torch.no_grad()
    def run(self, call: Call) -> Tensor:
        """From noise to latents."""
        x = self.noise
        for i, time in enumerate(self.times):
            cond = call(x, time, self.cond, i, "cond")
            uncond = call(x, time, self.uncond, i, "uncond")
            velocity = uncond + GUIDANCE_SCALE * (cond - uncond)
            x = x + (self.sigmas[i + 1] - self.sigmas[i]) * velocity
        return x


@dataclass(kw_only=True)
class CachedLoop:
    """A compiled model that runs the loop, each time as a new request."""

    model: Any
    loop: Loop
    session: Session | None = None

    @classmethod
    def build(cls, policy: NamedPolicy, loop: Loop, model: nn.Module) -> CachedLoop:
        """A model under a policy."""
        return cls(model=cachepass.compile(model, policy=policy), loop=loop)

    def __call__(self) -> Tensor:
        self.session = cachepass.session(self.model, num_inference_steps=self.loop.steps)
        return self.loop.run(session_call(self.model, self.session))

    def last_request(self) -> dict[str, Any]:
        """What the report says of the last request."""
        assert self.session is not None
        request: dict[str, Any] = cachepass.report(self.session).to_dict()["requests"][0]
        return request


Progress = Callable[[str], None]
