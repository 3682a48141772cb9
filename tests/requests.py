"""Runs a request on a compiled model or on a reference: a scheduler's loop in ten lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import cachepass
from tests.models import as_tensor, distance
from tests.reference import Reference

Inputs = dict[str, Any]
Call = Callable[[int, str, Tensor, Tensor, Tensor], Tensor]
BOTH = ("cond", "uncond")


def euler(
    call: Callable[[int, str, Inputs], Tensor],
    branches: Mapping[str, Inputs],
    *,
    steps: int,
    pace: float = 1.0,
) -> list[Tensor]:
    """Euler steps from the first branch's latent; returns the output of each call.

    Each branch is called with its inputs, its timestep falling from what is given there.
    """
    first = next(iter(branches.values()))
    latent, start = first["hidden_states"], first["timestep"]
    outputs: list[Tensor] = []
    for step in range(steps):
        time = (start.double() * (1 - step / steps)).to(start.dtype)
        now = {"hidden_states": latent, "timestep": time}
        found = [call(step, branch, inputs | now) for branch, inputs in branches.items()]
        outputs += found
        velocity = found[0]
        if len(found) == 2:
            cond, uncond = found
            velocity = uncond + 3.0 * (cond - uncond)
        latent = latent - pace * velocity / steps
    return outputs


def denoise(
    call: Call,
    *,
    steps: int,
    branches: Sequence[str] = BOTH,
    seed: int = 3,
    rows: int = 1,
    size: int = 8,
    pace: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """`euler` of a tiny Wan, from noise; a call takes latent, timestep and text."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 4, 2, size, size, generator=generator).to(dtype)
    time = torch.full((rows,), 1000.0)
    texts = {b: torch.randn(rows, 5, 16, generator=generator).to(dtype) for b in branches}
    inputs = {
        branch: {"hidden_states": latent, "timestep": time, "encoder_hidden_states": text}
        for branch, text in texts.items()
    }
    return euler(
        lambda step, branch, given: call(step, branch, *given.values()),
        inputs, steps=steps, pace=pace,
    )  # fmt: skip


def caller(model: Any, session: cachepass.Session) -> Call:
    """One call of a compiled model, inside a session that is told where it stands."""

    def call(step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        with session.at(step=step, branch=branch):
            return as_tensor(model(latent, time, text, return_dict=False))

    return call


def plain(model: Any) -> Call:
    """One call of a model that nobody compiled."""

    def call(step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return as_tensor(model(latent, time, text, return_dict=False))

    return call


def run(model: Any, *, steps: int, **options: Any) -> tuple[list[Tensor], cachepass.Session]:
    """A request on a compiled model: what each call returned, and the session."""
    session = cachepass.session(model, num_inference_steps=steps)
    return denoise(caller(model, session), steps=steps, **options), session


def decisions(session: cachepass.Session, row: int = 0) -> list[tuple[int, str, list[str]]]:
    """(step, branch, sites reused by a row) of each call, from the report."""
    (request,) = cachepass.report(session).to_dict()["requests"]
    return [(c["step"], c["branch"], c["reused"][row]) for c in request["steps"]]


def notes(session: cachepass.Session) -> str:
    """What the report says about a request, in words."""
    (request,) = cachepass.report(session).to_dict()["requests"]
    return "\n".join(request["notes"])


def assert_follows(model: Any, reference: Reference, *, eager: bool = True, **options: Any) -> None:
    """The same decisions, and the same numbers after each call; other kernels round otherwise."""
    outputs, session = run(model, steps=reference.num_steps, **options)
    expected = denoise(reference.call, steps=reference.num_steps, **options)
    assert decisions(session) == reference.decisions
    for got, want in zip(outputs, expected, strict=True):
        if eager:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert distance(got, want) < 1e-5
