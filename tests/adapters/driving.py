"""Runs a pipeline of diffusers with tiny components, plain or compiled, and reads the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cachepass

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Pipe:
    """A pipeline and its call."""

    build: Callable[[], tuple[Any, dict[str, Any]]]
    calls: tuple[str, ...] = ("cond", "uncond")
    """Branches of each step, in order."""

    requests: int = 1
    """Of one generation."""

    steps: int = STEPS
    """Of each request."""

    full: bool = False
    """Whether it is for the full suite: slow, or much like another one."""

    def make(self) -> tuple[Any, dict[str, Any]]:
        """The same for each call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe, given = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe, {"num_inference_steps": STEPS, "output_type": "latent", **given}


def generate(pipe: Any, given: dict[str, Any], seed: int = 0, **more: Any) -> Tensor:
    """The latents that a pipeline makes."""
    result = pipe(**given, generator=torch.Generator().manual_seed(seed), **more)
    value = next(iter(result.values())) if isinstance(result, dict) else result[0]
    if isinstance(value, list):  # framepack: what there was after each section
        return torch.cat([part.flatten() for part in value])
    assert isinstance(value, Tensor)
    return value


REUSE = cachepass.Schedule(reuse={2: "stack"})
REUSES = [[], [], ["stack"], []]
"""By step, with `REUSE`."""


def compiled(pipe: Any, policy: Any = "compute") -> Any:
    """The pipeline, compiled to run without Inductor."""
    return cachepass.compile(pipe, policy=policy, inner="eager")


def requests(pipe: Any) -> list[dict[str, Any]]:
    """What the report says of each."""
    found: list[dict[str, Any]] = cachepass.report(pipe).to_dict()["requests"]
    return found


def calls(request: dict[str, Any]) -> list[tuple[int, str, list[str]]]:
    """Step, branch and reused sites of each call."""
    return [(c["step"], c["branch"], c["reused"][0]) for c in request["steps"]]


def assert_same(made: tuple[Any, dict[str, Any]], **more: Any) -> Any:
    """`compute` gives what the plain pipeline does; the pipeline, compiled."""
    pipe, given = made
    pipe.set_progress_bar_config(disable=True)
    given |= {"num_inference_steps": STEPS, "output_type": "latent", **more}
    expected = generate(pipe, given)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)
    return pipe
