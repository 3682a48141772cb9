"""Add up an estimated error from call to call; reuse while it is small."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cachepass.ir.boundary import Against, LatentChange, OutputChange, Signal
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Trigger, check
from cachepass.runtime.traced import Choice, Dtypes, State, TracedFacts, nested, within


class Estimate(abc.ABC):
    """What a call that is not computed adds to the error."""

    shared_by_branches: ClassVar[bool] = False
    needs_num_steps: ClassVar[bool] = False

    def signals(self) -> tuple[Signal, ...]:
        """What is to be measured."""
        return ()

    @abc.abstractmethod
    def add(self, facts: Facts, state: Any) -> tuple[float, Any]:
        """The error of this call (NaN computes), and the state, None after a computed call."""

    @property
    def traced_state(self) -> Dtypes:
        """As `Trigger.traced_state`; zeros after a computed call."""
        return {}

    @abc.abstractmethod
    def traced_add(self, facts: TracedFacts, state: State) -> tuple[Tensor, State]:
        """`add` for all rows: (rows,) float64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulated(Trigger):
    """``error += estimate``; reuse while ``error < threshold``, else compute and ``error = 0``."""

    estimate: Estimate
    threshold: float

    def __post_init__(self) -> None:
        check(self.threshold >= 0, self, "threshold", "at least 0")

    @property
    def shared_by_branches(self) -> bool:  # type: ignore[override]
        return self.estimate.shared_by_branches

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return self.estimate.needs_num_steps

    def signals(self) -> tuple[Signal, ...]:
        return self.estimate.signals()

    def decide(self, facts: Facts, state: Any) -> Decision:
        """`state` is the error so far and the estimate's own."""
        before, own = state or (0.0, None)
        added, own = self.estimate.add(facts, own)
        error = before + added
        if not facts.warm or not error < self.threshold:
            return COMPUTE, (0.0, None)
        return facts.warm, (error, own)

    @property
    def traced_state(self) -> Dtypes:
        return {"error": torch.float64, **nested("estimate", self.estimate.traced_state)}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        added, own = self.estimate.traced_add(facts, within("estimate", state))
        error = state["error"] + added
        small = facts.any_warm & (error < self.threshold)
        new = {"error": error, **nested("estimate", own)}
        return facts.reuse(small), {n: torch.where(small, v, 0) for n, v in new.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative(Estimate):
    """A polynomial of a signal's relative change.

    TeaCache (arXiv 2411.19108, equation 7) with the timestep embedding; DiCache
    (arXiv 2508.17356) with a probe and the identity.
    """

    signal: Signal
    coefficients: tuple[float, ...] = (1.0, 0.0)
    """High power first; the default is the identity."""

    also: tuple[Signal, ...] = ()
    """Further signals, for the predictor."""

    def __post_init__(self) -> None:
        check(len(self.coefficients) > 0, self, "coefficients", "at least one number")

    def signals(self) -> tuple[Signal, ...]:
        return (self.signal, *self.also)

    def add(self, facts: Facts, state: Any) -> tuple[float, Any]:
        return polynomial(self.coefficients, facts.signal(self.signal.name).rel), None

    def traced_add(self, facts: TracedFacts, state: State) -> tuple[Tensor, State]:
        return polynomial(self.coefficients, facts.signals[self.signal.name].rel), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeRatio(Estimate):
    """``|1 - product of γ since the last computed call|``, γ calibrated step by step.

    γ_t is the mean over tokens of |R_t| / |R_(t-1)|, R the stack's residual. For another number
    of steps the list is read at the nearest place. Source: MagCache (arXiv 2506.09045,
    section 3.3) and its code.
    """

    ratios: tuple[float, ...]
    """γ of steps 0, 1, ... of the calibrated request; the first is 1."""

    uncond_ratios: tuple[float, ...] = ()
    """Of the unconditional branch, where it was calibrated apart."""

    needs_num_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(len(self.ratios) > 0, self, "ratios", "at least one number")

    def add(self, facts: Facts, state: Any) -> tuple[float, Any]:
        """`state` is the product so far."""
        apart = facts.branch == "uncond" and self.uncond_ratios
        ratios = self.uncond_ratios if apart else self.ratios
        assert facts.num_steps is not None
        product = (1.0 if state is None else state) * resampled(ratios, facts.step, facts.num_steps)
        return abs(1 - product), product

    @property
    def traced_state(self) -> Dtypes:
        return {"drift": torch.float64}  # the product less 1

    def traced_add(self, facts: TracedFacts, state: State) -> tuple[Tensor, State]:
        ratio = traced_resampled(self.ratios, facts.step, facts.num_steps)
        if self.uncond_ratios:
            apart = traced_resampled(self.uncond_ratios, facts.step, facts.num_steps)
            ratio = torch.where(facts.uncond, apart, ratio)
        drift = (1 + state["drift"]) * ratio - 1
        return drift.abs(), {"drift": drift}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformRate(Estimate):
    """How much the output would change, from how much the latent did.

    ``k Σ|Δx| / Σ|out|``, ``k = Σ|Δout| / Σ|Δx|`` between the last two full steps; decided on a
    step's first call, for all branches. Source: EasyCache (arXiv 2507.02860, section 3.2) and its
    code.
    """

    shared_by_branches: ClassVar[bool] = True

    def signals(self) -> tuple[Signal, ...]:
        return (
            LatentChange(name="latent"),
            LatentChange(name="latent at full", against=Against.FULL),
            OutputChange(name="output"),
        )

    def add(self, facts: Facts, state: Any) -> tuple[float, Any]:
        now, at_full = facts.signal("latent"), facts.signal("latent at full")
        output = facts.signal("output")
        if not at_full.diff > 0 or not output.ref > 0:
            return math.nan, None
        return output.diff / at_full.diff * now.diff / output.ref, None

    def traced_add(self, facts: TracedFacts, state: State) -> tuple[Tensor, State]:
        now, at_full = facts.signals["latent"], facts.signals["latent at full"]
        output = facts.signals["output"]
        told = (at_full.diff > 0) & (output.ref > 0)
        change = output.diff / at_full.diff * now.diff / output.ref
        return torch.where(told, change, torch.nan), {}


Number = TypeVar("Number", float, Tensor)


def polynomial(coefficients: Sequence[float], x: Number) -> Number:
    """Value of a polynomial, highest power first (as numpy.polyval has it)."""
    value = 0.0 * x
    for c in coefficients:
        value = value * x + c
    return value


def resampled(values: Sequence[float], step: int, num_steps: int) -> float:
    """A list made for another number of steps, at the nearest place."""
    if num_steps <= 1 or len(values) == num_steps:
        return values[min(step, len(values) - 1)]
    return values[round(step * (len(values) - 1) / (num_steps - 1))]


def traced_resampled(values: Sequence[float], step: Tensor, num_steps: Tensor) -> Tensor:
    """`resampled` of () tensors."""
    table = torch.tensor(values, dtype=torch.float64, device=step.device)
    last = len(values) - 1
    scaled = step * last / (num_steps - 1).double()
    as_they_are = (num_steps <= 1) | (num_steps == len(values))
    place = torch.where(as_they_are, step.double(), scaled.round())
    # Not table[place]: a () tensor as an index is read to the host.
    return table.index_select(0, place.clamp(0, last).to(torch.int64).reshape(1))[0]
