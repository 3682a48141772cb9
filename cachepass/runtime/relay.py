"""Two models that take turns within a request: SRDiffusion at run time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cachepass.ir.ops import l1_sums
from cachepass.runtime.guidance import latent_among
from cachepass.runtime.policies.srdiffusion import SRDiffusion

SKETCH, RENDER = "sketch", "render"


class Switch:
    """Which of two models a step belongs to; follows a scheduler, as a `Denoiser` does."""

    def __init__(self, policy: SRDiffusion) -> None:
        self.policy = policy
        self.switched_at: list[int | None] = []
        """Of each request, the first step of the small model."""

        self._seen = -1
        self.begin_request(0)
        self.switched_at.clear()

    def begin_request(self, num_steps: int, told: int | None = None) -> None:
        """What follows is a new request."""
        if self.switched_at and self._seen == -1:  # nothing was called since the last
            self.switched_at.pop()
        self._num_steps, self._step = num_steps, 0
        self._before: Tensor | None = None
        self._distance = math.nan
        self._seen = -1
        self.switched_at.append(None)

    def expect(self, num_steps: int) -> None:
        """The request has another number of steps than was thought."""
        self._num_steps = num_steps

    def end_step(self, left: int | None = None) -> None:
        """The scheduler made a step."""
        self._step += 1

    def end_request(self) -> None:
        """The pipeline is done; nothing is kept but numbers."""

    @property
    def current(self) -> str:
        """The model of the step that runs."""
        at = self.switched_at[-1]
        return SKETCH if at is None or self._step < at else RENDER

    def see(self, what: str, value: Tensor) -> None:
        """Take the latent of a step before its first call, or the output after it."""
        if what != self.policy.measured or self._seen == self._step or self.current == RENDER:
            return
        self._seen = self._step
        before, self._before = self._before, value.detach().clone()
        settled = False
        if before is not None and before.shape == value.shape:
            diff, ref = l1_sums(value, before).sum(0).tolist()
            distance = math.tanh(diff / ref)
            moved = distance - self._distance
            settled = moved < self.policy.delta and (moved > 0 or not self.policy.rising)
            self._distance = distance
        # What an output tells comes too late for its own step.
        step = self._step + (what == "output")
        late = step >= self.policy.latest * self._num_steps
        if self.policy.min_steps <= step < self._num_steps and (settled or late):
            self.switched_at[-1] = step


class Relay(nn.Module):
    """Stands in a pipeline for the large model; hands each call to the one whose turn it is."""

    def __init__(self, sketch: Any, render: Any, switch: Switch) -> None:
        super().__init__()
        self.sketch, self.render, self.switch = sketch, render, switch
        self.clocked = [switch, *sketch.clocked, *render.clocked]
        """What the scheduler is the clock of."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("sketch"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising call."""
        latent = latent_among(args, kwargs)
        if latent is not None:
            self.switch.see("latent", latent)
        model = self.sketch if self.switch.current == SKETCH else self.render
        with torch.no_grad():
            result = model(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
        self.switch.see("output", output)
        return result

    def cache_context(self, name: str, **fields: Any) -> contextlib.AbstractContextManager[None]:
        """What diffusers pipelines enter around each call; one for both models."""
        enter: Callable[..., contextlib.AbstractContextManager[None]] = self.sketch.cache_context
        return enter(name, **fields)
