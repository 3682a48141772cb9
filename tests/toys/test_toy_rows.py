"""Requests of every toy share calls, also where a model folds frames into its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import cachepass
from tests.graphs import examples
from tests.models import as_tensor, distance
from tests.requests import decisions
from tests.toys.cases import STEPS, TOYS, Toy

POLICIES: list[cachepass.NamedPolicy] = [
    cachepass.Schedule(reuse={1: "step", 3: "cfg", 4: "stack", 5: "attention"}),
    cachepass.FirstBlock(threshold=0.02, warmup_steps=0),
    cachepass.TaylorSeer(interval=2, warmup_steps=1, site="stack"),
    cachepass.AdaCache(codebook=((0.05, 4), (0.1, 3), (0.2, 2), (1.0, 1)), motion=False),
]
BRANCHES = ("cond", "uncond")


class Request:
    """A request of a toy, which differs from others by its seed."""

    def __init__(self, model: Any, toy: Toy, seed: int) -> None:
        self.session = cachepass.session(model, num_inference_steps=STEPS)
        shift = 0.3 * torch.randn(toy.latent, generator=torch.Generator().manual_seed(seed))
        self.calls = [
            (
                step,
                branch,
                {**inputs, toy.name: (1 + 0.02 * seed * step) * inputs[toy.name] + shift},
            )
            for step, branch, inputs in toy.request(BRANCHES)
        ]
        self.outputs: list[Tensor] = []

    @property
    def next(self) -> int:
        return len(self.outputs)

    @property
    def step(self) -> int:
        return self.next // len(BRANCHES)


def call_together(model: Any, requests: Sequence[Request]) -> None:
    """The next step of each, branch by branch."""
    for _ in BRANCHES:
        calls = [request.calls[request.next] for request in requests]
        listed = [
            request.session.row(step=step, branch=branch)
            for request, (step, branch, _) in zip(requests, calls, strict=True)
        ]
        inputs = pytree.tree_map(lambda *parts: torch.cat(parts), *(i for _, _, i in calls))
        with cachepass.rows(model, listed):
            made = as_tensor(model(**inputs))
        for request, output in zip(requests, made.split(1), strict=True):
            request.outputs.append(output)


def assert_as_alone(model: Any, toy: Toy, request: Request, seed: int) -> None:
    alone = Request(model, toy, seed)
    for (step, branch, inputs), output in zip(alone.calls, request.outputs, strict=True):
        with alone.session.at(step=step, branch=branch):
            assert distance(output, as_tensor(model(**inputs))) < 1e-5
    assert decisions(request.session) == decisions(alone.session)


_CACHE: dict[tuple[str, str], Any] = {}


def _cases() -> Iterator[Any]:
    """Every toy under every policy; the quick suite has the one that folds its rows both ways."""
    for name, policy in itertools.product(TOYS, POLICIES):
        quick = name == "latte" and policy.name in ("schedule", "adacache")
        marks = () if quick else (pytest.mark.full,)
        yield pytest.param(name, policy, id=f"{name}-{policy.name}", marks=marks)


@pytest.mark.parametrize(("name", "policy"), list(_cases()))
@examples(2)
@given(data=st.data())
def test_requests_that_join_and_leave(
    name: str, policy: cachepass.NamedPolicy, data: st.DataObject
) -> None:
    toy, key = TOYS[name], (name, policy.name)
    if key not in _CACHE:
        _CACHE[key] = cachepass.compile(toy.model(), policy=policy, inner="eager")
    model = _CACHE[key]
    requests = [Request(model, toy, seed) for seed in range(3)]
    while running := [r for r in requests if r.step < STEPS]:
        count = data.draw(st.integers(1, len(running)))
        call_together(model, data.draw(st.permutations(running))[:count])
    for seed, request in enumerate(requests):
        assert_as_alone(model, toy, request, seed)


@pytest.mark.full
def test_compiled_rows_that_hold_frames() -> None:
    """Of some of three rows, in one compile."""
    toy, policy = TOYS["latte"], cachepass.Schedule(reuse={1: "stack", 3: "stack"})
    model: Any = cachepass.compile(toy.model(), policy=policy)
    requests = [Request(model, toy, seed) for seed in range(3)]
    call_together(model, requests[:2])
    regions = model.denoiser.regions
    while running := [r for r in requests if r.step < STEPS]:
        call_together(model, running)
    assert model.denoiser.regions - regions <= regions, "a row alone, at the end, and no more"
    for seed, request in enumerate(requests):
        assert_as_alone(model, toy, request, seed)
