"""One request on any model whose inputs go by name: the same loop around whatever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import cachepass
from tests.models import WAN, Tiny, as_tensor, distance
from tests.requests import Inputs, euler

Decisions = list[tuple[int, str, list[str]]]
"""(step, branch, sites that all rows reused) of each call."""

STEPS = 20
BRANCHES = ("cond", "uncond", "other")
"""In the order of their numbers."""


def branches_of(tiny: Tiny, *names: str) -> dict[str, Inputs]:
    """The inputs of each branch: they differ in what the model is conditioned on."""
    examples = {name: tiny.example(seed) for seed, name in enumerate(names or ("cond",), 1)}
    first = next(iter(examples.values()))
    for example in examples.values():
        example["hidden_states"] = first["hidden_states"]
    return examples


def wan_of(rows: int = 1, frames: int = 2, height: int = 8, width: int = 8, words: int = 5) -> Tiny:
    """The tiny Wan, called with other sizes."""

    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(rows, 4, frames, height, width),
            "timestep": torch.full((rows,), 900.0),
            "encoder_hidden_states": torch.randn(rows, words, 16),
            "return_dict": False,
        }

    return dataclasses.replace(WAN, inputs=inputs)


class Compiled:
    """A model under `compile`."""

    def __init__(self, tiny: Tiny, policy: Any, steps: int = STEPS, **options: Any) -> None:
        self.model = cachepass.compile(tiny.model(), policy=policy, inner="eager", **options)
        self.steps = steps
        self.outputs: list[Tensor] = []
        self.session = cachepass.session(self.model, num_inference_steps=steps)

    def run(self, branches: Mapping[str, Inputs]) -> list[Tensor]:
        """The outputs of its one request, made once."""
        self.outputs = self.outputs or euler(self, branches, steps=self.steps)
        return self.outputs

    def __call__(self, step: int, branch: str, inputs: Inputs) -> Tensor:
        with self.session.at(step=step, branch=branch):
            return as_tensor(self.model(**inputs))

    @property
    def reused(self) -> Decisions:
        (request,) = cachepass.report(self.session).to_dict()["requests"]
        return [
            (c["step"], c["branch"], sorted(set.intersection(*map(set, c["reused"]))))
            for c in request["steps"]
        ]


class Exported:
    """What a user writes around an exported program, or around a package of it."""

    def __init__(self, program: Any, cold: dict[str, Any], steps: int = STEPS) -> None:
        self.program, self.cold, self.steps = program, cold, steps
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.reused: Decisions = []

    @torch.no_grad()
    def __call__(self, step: int, branch: str, inputs: Inputs) -> Tensor:
        state = {
            "branch": self.kept.get(branch, self.cold["branch"]),
            "request": self.kept.get("", self.cold["request"]),
        }
        where = {"step": step, "num_steps": self.steps, "branch": BRANCHES.index(branch)}
        made = self.program(
            **{name: value for name, value in inputs.items() if isinstance(value, Tensor)},
            **{name: torch.tensor(value) for name, value in where.items()},
            state=state,
        )
        self.kept[branch] = state["branch"] | made["state"]["branch"]
        self.kept[""] = state["request"] | made["state"]["request"]
        reused = sorted(site for site, rows in made["reused"].items() if rows.all())
        self.reused.append((step, branch, reused))
        return as_tensor(made["output"])


class Runtime:
    """A file in onnxruntime."""

    def __init__(self, denoiser: Any, steps: int = STEPS) -> None:
        self.denoiser = denoiser
        denoiser.begin_request(steps)

    def __call__(self, step: int, branch: str, inputs: Inputs) -> Tensor:
        if step != self.denoiser.step:
            self.denoiser.end_step()
        with self.denoiser.cache_context(branch):
            output: Tensor = self.denoiser(**inputs)[0]
        return output

    @property
    def reused(self) -> Decisions:
        found: Decisions = self.denoiser.reused
        return found


def agree(call: Any, reference: Compiled, branches: Mapping[str, Inputs], limit: float) -> None:
    """The same decisions, some to reuse and some to compute, and the same outputs."""
    wanted, found = reference.run(branches), euler(call, branches, steps=reference.steps)
    for got, want in zip(found, wanted, strict=True):
        assert distance(got, want) < limit
    assert call.reused == reference.reused
    assert {bool(sites) for _, _, sites in reference.reused} == {False, True}
