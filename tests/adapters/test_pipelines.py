"""Pipelines of diffusers: requests, steps and branches are found with not a word from the user."""

from __future__ import annotations

import collections
import functools
from typing import Any

import pytest
import torch

import cachepass
from cachepass.compiled import CachedModule
from tests.adapters.driving import generate, requests
from tests.adapters.pipes import PIPES

PIPE = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.full] if p.full else []) for n, p in PIPES.items()],
)


class Count:
    """How often a scheduler's class was asked for a step."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        kind, plain = type(pipe.scheduler), type(pipe.scheduler).step

        @functools.wraps(plain)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps += scheduler is pipe.scheduler
            return plain(scheduler, *args, **kwargs)

        monkeypatch.setattr(kind, "step", step)


def graphs(pipe: Any) -> int:
    data = cachepass.report(pipe).to_dict()
    parts = data.get("denoisers", {"model": data})
    return sum(part["compiles"]["graphs"] for part in parts.values())


def held(pipe: Any) -> int:
    """Bytes in the slots of all requests."""
    modules = [m for m in pipe.components.values() if isinstance(m, CachedModule)]
    sessions = [session for module in modules for session in module.denoiser._sessions]
    return sum(session.cache_bytes for session in sessions)


# Mochi's pipeline asks for float32, which CPUs have no autocast for.
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning")
@PIPE
def test_what_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PIPES[name]
    pipe, given = case.make()
    count = Count(pipe, monkeypatch)
    expected = generate(pipe, given)
    made = count.steps
    assert made in (0, case.steps * case.requests), "0 where only copies are stepped"

    assert cachepass.compile(pipe, policy="compute", inner="eager") is pipe
    assert torch.equal(generate(pipe, given), expected)
    by_denoiser = collections.defaultdict(list)
    for request in requests(pipe):
        by_denoiser[request.get("denoiser")].append(request)
    calls = [
        (call["step"], call["branch"])
        for found in zip(*by_denoiser.values(), strict=True)
        for request in found
        for call in request["steps"]
    ]
    steps = [(step, branch) for step in range(case.steps) for branch in case.calls]
    assert calls == steps * case.requests
    for request in requests(pipe):
        assert request["num_inference_steps"] == case.steps
        assert request["notes"] == ["nothing was reused"]
    cachepass.restore(pipe)

    policy = cachepass.Schedule(reuse={2: "stack"})
    cachepass.compile(pipe, policy=policy, inner="eager")
    first = generate(pipe, given)
    after_first = graphs(pipe)
    second = generate(pipe, given)
    assert graphs(pipe) == after_first, "nothing is captured late"
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, expected)
    found = requests(pipe)
    assert len(found) == 2 * case.requests * len(by_denoiser)
    sites = collections.defaultdict(list)
    for request in found:
        for call in request["steps"]:
            sites[call["step"]].append(call["reused"][0])
    assert {step for step, reused in sites.items() if any(reused)} == {2}
    assert all(sites[2])
    assert held(pipe) == 0, "slots are freed"
