"""Captured graphs for tests of passes, and a way to run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, fx

from cachepass.capture import own_graph
from cachepass.ir.boundary import Blocks, Cfg, Kind, Site, Sublayers, WholeCall
from cachepass.pass_manager import Pass, run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.denoiser import Denoiser
from cachepass.runtime.policies import AnyPolicy, Compute, for_model
from cachepass.runtime.policy import (
    EMPTY,
    Config,
    Decision,
    Facts,
    NamedPolicy,
    Policy,
    Trigger,
)
from cachepass.runtime.program import Driver, Program
from cachepass.runtime.traced import Choice, State, TracedFacts
from tests.models import TOY, Tiny, as_tensor

SITES: tuple[Site, ...] = (
    WholeCall(),
    Cfg(),
    Blocks(),
    Blocks(name="block", start=1, stop=3),
    Sublayers(name="attention", kinds=(Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION)),
    Sublayers(name="mlp", kinds=(Kind.MLP,)),
)
"""One of each kind, under the names that `Schedule` gives them."""


def examples(count: int) -> settings:
    """So many examples of a property, the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@dataclasses.dataclass
class Captured:
    """A graph as dynamo hands it over, what it was called with and what came out."""

    gm: fx.GraphModule
    args: Sequence[Any]
    output: Tensor

    def run(self, *passes: Pass) -> fx.GraphModule:
        """Apply passes to the graph, as the pass manager does."""
        self.gm = run_passes(self.gm, passes).graph_module
        return self.gm

    def pipeline(self, policy: AnyPolicy) -> tuple[Pass, ...]:
        combined = for_model(policy, None)
        return default_pipeline(combined.sites, combined.signals())

    def matches(self, policy: AnyPolicy | None = None) -> bool:
        """Whether a first call of the graph, as it is now, gives the model's output."""
        denoiser = Denoiser(for_model(policy or Compute(), None))
        program = Program(denoiser, self.gm, lambda gm, _: Driver(gm.forward))
        with torch.no_grad():
            return torch.equal(as_tensor(program(*self.args)), self.output)


def capture(tiny: Tiny = TOY, seed: int = 0) -> Captured:
    """The graph of one call of a tiny model."""
    torch.compiler.reset()  # captures count against a limit for each forward
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        graph = own_graph(gm)

        def call(*args: Any) -> Any:
            found.append(Captured(graph, args, torch.empty(0)))
            return gm.forward(*args)

        return call

    with torch.no_grad():
        model: Any = torch.compile(tiny.model(seed), backend=backend, fullgraph=True)
        output = as_tensor(model(**tiny.example()))
    found[0].output = output
    return found[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Trigger):
    """Reuses what a table of (step, branch, row) says."""

    measured: tuple[Any, ...]
    table: dict[tuple[int, str, int], set[str]]
    asked: dict[tuple[int, str], int]

    def signals(self) -> tuple[Any, ...]:
        return self.measured

    def decide(self, facts: Facts, state: Any) -> Decision:
        key = (facts.step, facts.branch)
        row = self.asked[key] = self.asked.get(key, -1) + 1
        return frozenset(self.table.get((*key, row), ())), state

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        """For graphs that run eagerly: the table is looked at in every call."""
        key = int(facts.step), "uncond" if facts.uncond else "cond"
        rows = [self.table.get((*key, row), set()) for row in range(len(facts.nothing))]
        return {site: torch.tensor([site in row for row in rows]) for site in facts.warm}, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script(NamedPolicy):
    """A policy for tests: the sites it is given, reused by a table of (step, branch, row)."""

    name = "script"
    places: tuple[Any, ...] = ()
    measured: tuple[Any, ...] = ()
    predictor: Any = None
    table: dict[tuple[int, str, int], set[str]] = dataclasses.field(default_factory=dict)
    asked: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    """How often a call was asked for: the rule is called once for each row, in order."""

    def combine(self, config: Config = EMPTY) -> Policy:
        trigger = Scripted(measured=self.measured, table=self.table, asked=self.asked)
        return Policy(name=self.name, sites=self.places, trigger=trigger, predictor=self.predictor)

    def begin(self, table: dict[tuple[int, str, int], set[str]]) -> None:
        """Take another table for the request that follows."""
        self.asked.clear()
        self.table.clear()
        self.table.update(table)
