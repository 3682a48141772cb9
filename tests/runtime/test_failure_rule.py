"""What cannot be told is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cachepass
from tests.models import WAN, as_tensor
from tests.requests import decisions, notes, run

POLICIES: list[cachepass.NamedPolicy] = [
    cachepass.FirstBlock(threshold=math.inf, warmup_steps=0),
    cachepass.TeaCache(threshold=math.inf, warmup_steps=1),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_nan_and_inf_are_no_evidence(policy: cachepass.NamedPolicy, bad: float) -> None:
    cached: Any = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    session = cachepass.session(cached, num_inference_steps=9)
    for step, spoiled in enumerate((False, False, True, True, False)):
        inputs = WAN.example()
        if spoiled and policy.name == "teacache":
            inputs["timestep"] = torch.tensor([bad])
        elif spoiled:
            inputs["hidden_states"][0, 0, 0, 0, 0] = bad
        with session.at(step=step):
            cached(**inputs)
    reused = [bool(names) for _, _, names in decisions(session)]
    assert reused == [False, True, False, False, False]
    signal = policy.combine().signals()[0]
    assert f"signal {signal.name!r} was NaN, infinite or zero" in notes(session)


def test_finite_signals_leave_no_note() -> None:
    """The first measure is against an empty slot, which is no failure."""
    for policy in POLICIES:
        _, session = run(cachepass.compile(WAN.model(), policy=policy, inner="eager"), steps=4)
        assert notes(session) == ""


def test_a_cold_slot_is_computed() -> None:
    model = WAN.model()
    policy = cachepass.Schedule(reuse={0: ("step", "stack"), 1: "mlp", 2: "attention"})
    cached: Any = cachepass.compile(model, policy=policy, inner="eager")
    session = cachepass.session(cached, num_inference_steps=9)
    inputs = WAN.example()
    with session.at(step=0), torch.no_grad():
        assert torch.equal(as_tensor(cached(**inputs)), as_tensor(model(**inputs)))
    with session.at(step=1, branch="uncond"):
        cached(**inputs)
    assert [names for _, _, names in decisions(session)] == [[], []]


def test_rows_of_a_batch_fail_alone() -> None:
    """A NaN in one row leaves the decisions and the values of its neighbours as they were."""
    cached: Any = cachepass.compile(
        WAN.model(), policy=cachepass.FirstBlock(threshold=1e9, warmup_steps=0), inner="eager"
    )
    session = cachepass.session(cached, num_inference_steps=9)
    torch.manual_seed(0)
    latent, text = torch.randn(3, 4, 2, 8, 8), torch.randn(3, 5, 16)
    time = torch.full((3,), 500.0)
    bad = latent.clone()
    bad[1] = math.nan
    found = []
    for step, given in enumerate((latent, bad, latent)):
        with session.at(step=step):
            found.append(as_tensor(cached(given, time, text, return_dict=False)))
    assert [decisions(session, row)[1][2] for row in range(3)] == [["step"], [], ["step"]]
    assert found[1][1].isnan().all()
    for row in (0, 2):
        torch.testing.assert_close(found[1][row], found[0][row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2][row], found[0][row], rtol=1e-4, atol=1e-5)
    # the spoiled row kept what it saw: its evidence stays void, so it goes on computing
    assert decisions(session, 1)[2][2] == []
    torch.testing.assert_close(found[2][1], found[0][1], rtol=1e-4, atol=1e-5)
