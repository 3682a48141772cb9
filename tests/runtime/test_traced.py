"""Rules in tensor code against the same rules on the host, for random requests."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import cachepass
from cachepass.errors import PolicyError
from cachepass.ir.boundary import LatentChange
from cachepass.ir.predictors import (
    Extrapolate,
    Moment,
    Predictor,
    Taylor,
    TwoAnchor,
    traced_weights,
)
from cachepass.runtime.policy import Facts, Measure, Trigger
from cachepass.runtime.traced import State, TracedFacts, TracedMeasure
from cachepass.runtime.triggers import (
    Accumulated,
    AtSteps,
    Below,
    Cheapest,
    Codebook,
    Limited,
    MagnitudeRatio,
    Motion,
    Never,
    Periodic,
    PerSite,
    Relative,
    TransformRate,
    Windowed,
)
from tests.graphs import examples

SITES = ("a", "b")
ROWS = 2
BELOW = Below(signal=LatentChange(name="x"), threshold=0.5)
RELATIVE = Relative(signal=LatentChange(name="x"), coefficients=(0.5, 1.0, 0.01))
TRIGGERS: dict[str, Trigger] = {
    "never": Never(),
    "at-steps": AtSteps(reuse={1: ("a",), 3: ("a", "b"), 4: ("b",)}),
    "periodic": Periodic(period=3),
    "periodic, absolute": Periodic(period=3, absolute=True),
    "below": BELOW,
    "relative": Accumulated(estimate=RELATIVE, threshold=1.0),
    "magnitudes": Accumulated(
        estimate=MagnitudeRatio(ratios=(1.0, 1.1, 0.9, 1.2), uncond_ratios=(1.0, 0.7)),
        threshold=0.3,
    ),
    "transform rate": Accumulated(estimate=TransformRate(), threshold=2.0),
    "codebook": Codebook(signal=LatentChange(name="x"), codebook=((0.2, 4), (0.6, 2), (9.0, 1))),
    "codebook with motion": Codebook(
        signal=LatentChange(name="x"),
        codebook=((0.2, 4), (0.6, 2), (9.0, 1)),
        motion=Motion(scale=0.4, power=0.5, gradient=2.0, window=(0.1, 0.8)),
    ),
    "cheapest": Cheapest(
        influence={"a": 1.0, "b": 0.7}, settled=0.6, latest_start=0.4, interval=(2, 5),
        start_interval=3, shorten=0.7, lengthen=0.3, repeat_penalty=2.0,
    ),
    "limited": Limited(
        trigger=Periodic(period=5), warmup_steps=0.2, warmup_at_least=1, last=1,
        max_in_a_row=2, max_in_all=4,
    ),
    "windowed": Windowed(trigger=BELOW, timesteps=(200, 900), start=0.25),
    "per site": PerSite(triggers={"a": Periodic(period=2), "b": Limited(trigger=BELOW, last=2)}),
}  # fmt: skip
SIGNALS = ("x", "a", "b", "latent", "latent at full", "output")

numbers = st.one_of(st.floats(0, 2), st.just(math.nan))


@st.composite
def measures(draw: st.DrawFn, step: int) -> Measure:
    at = draw(st.integers(-1, step))
    second = draw(st.one_of(st.none(), st.floats(0, 1)))
    return Measure(draw(numbers), draw(numbers), at, draw(st.integers(1, 3)), second)


@st.composite
def requests(draw: st.DrawFn) -> list[list[Facts]]:
    """The facts of each row at each step."""
    steps = draw(st.integers(2, 9))
    return [
        [
            Facts(
                step, steps, branch, frozenset(draw(st.sets(st.sampled_from(SITES)))),
                {name: draw(measures(step)) for name in SIGNALS}, frozenset(SITES),
                timestep=1000 * (1 - step / steps),
            )
            for _ in range(ROWS)
        ]
        for step in range(steps)
        for branch in [draw(st.sampled_from(("cond", "uncond")))]
    ]  # fmt: skip


def as_tensors(rows: list[Facts]) -> TracedFacts:
    first = rows[0]

    def measure(name: str) -> TracedMeasure:
        of = [row.signals[name] for row in rows]
        second = [math.nan if m.second is None else m.second for m in of]
        return TracedMeasure(
            diff=torch.tensor([m.diff for m in of], dtype=torch.float64),
            ref=torch.tensor([m.ref for m in of], dtype=torch.float64),
            step=torch.tensor([m.step for m in of]),
            gap=torch.tensor([m.gap for m in of]),
            second=torch.tensor(second, dtype=torch.float64),
        )

    return TracedFacts(
        step=torch.tensor(first.step),
        num_steps=torch.tensor(first.num_steps),
        uncond=torch.tensor(first.branch == "uncond"),
        warm={site: torch.tensor([site in row.warm for row in rows]) for site in SITES},
        signals={name: measure(name) for name in SIGNALS},
        timestep=torch.tensor([row.timestep for row in rows], dtype=torch.float64),
        nothing=torch.zeros(len(rows), dtype=torch.bool),
    )


@pytest.mark.parametrize("name", TRIGGERS)
@examples(25)
@given(request_=requests())
def test_a_rule_decides_alike_as_tensor_code(name: str, request_: list[list[Facts]]) -> None:
    trigger = TRIGGERS[name]
    states: list[Any] = [None] * ROWS
    state: State = {n: torch.zeros(ROWS, dtype=d) for n, d in trigger.traced_state.items()}
    for rows in request_:
        expected = []
        for i, facts in enumerate(rows):
            choice, states[i] = trigger.decide(facts, states[i])
            expected.append(choice & facts.warm)
        chosen, state = trigger.traced(as_tensors(rows), state)
        for i, facts in enumerate(rows):
            got = {site for site, mask in chosen.items() if mask[i]} & facts.warm
            assert got == expected[i], (facts.step, i)
        assert {n: t.dtype for n, t in state.items()} == dict(trigger.traced_state)


@pytest.mark.parametrize(
    "predictor",
    [Taylor(order=1), Taylor(order=3, damping=0.8), Extrapolate(weight=0.4), TwoAnchor()],
    ids=repr,
)
@given(
    kept=st.lists(st.integers(0, 20), unique=True, max_size=4),
    later=st.integers(1, 4),
    trend=st.one_of(st.just(math.nan), st.floats(0, 3)),
)
def test_weights_are_alike_as_tensor_code(
    predictor: Predictor, kept: list[int], later: int, trend: float
) -> None:
    steps = sorted(kept, reverse=True)[: predictor.history] or [0]
    step = steps[0] + later
    moment = Moment(
        step=step, kept=tuple(steps), timesteps={},
        ratios={} if math.isnan(trend) else {"trend": trend},
    )  # fmt: skip
    tags = [*(s + 1 for s in steps), *(0,) * (predictor.history - len(steps))]
    got = traced_weights(
        predictor, torch.tensor(step), [torch.tensor([tag]) for tag in tags],
        {"trend": torch.tensor([trend], dtype=torch.float64)},
    )  # fmt: skip
    want = torch.tensor([predictor.weights(moment)])
    torch.testing.assert_close(got, want)


def test_a_trigger_without_a_rule_in_tensor_code_says_what_to_do() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(cachepass.Trigger):
        def decide(self, facts: Facts, state: Any) -> Any:
            return cachepass.COMPUTE, state

    with pytest.raises(PolicyError, match=r"Mine has no rule in tensor code.*give it `traced`"):
        Mine().traced(None, {})  # type: ignore[arg-type]
