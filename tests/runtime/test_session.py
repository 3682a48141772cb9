"""Sessions: what they refuse, and how calls are placed where nobody says."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import cachepass
from cachepass.runtime.clock import Clock
from tests.models import TOY, WAN, as_tensor
from tests.requests import BOTH, caller, decisions, denoise, notes, plain


def _toy(policy: str | cachepass.NamedPolicy = "compute") -> Any:
    return cachepass.compile(TOY.model(), policy=policy, inner="eager")


def test_a_session_is_entered_by_one_thread_at_a_time() -> None:
    session = cachepass.session(_toy())
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with session:
                pass
        except cachepass.SessionError as error:
            errors.append(error)

    def in_thread() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with session:
        in_thread()
        with session.at(step=0):
            in_thread()
    assert len(errors) == 2
    assert all("entered in another thread" in str(e) for e in errors)
    in_thread()  # left: another thread may go on
    assert len(errors) == 2


@pytest.mark.parametrize(
    ("number", "step", "message"),
    [
        (0, 0, r"`num_inference_steps`=0: must be at least 1"),
        (4, 4, r"`step`=4: must be from 0 to 3"),
        (4, -1, r"`step`=-1: must be from 0 to 3"),
        (None, -1, r"`step`=-1: must be at least 0"),
    ],
)
def test_steps_out_of_range(number: int | None, step: int, message: str) -> None:
    model = _toy()
    with (
        pytest.raises(cachepass.SessionError, match=message),
        cachepass.session(model, num_inference_steps=number).at(step=step),
    ):
        pass


@pytest.mark.parametrize("policy", ["mixcache", "adacache"])
def test_a_policy_that_needs_the_number_of_steps_says_so(policy: str) -> None:
    cached = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    with pytest.raises(cachepass.PolicyError, match=rf"{policy}.*needs the number of steps"):
        cached(**WAN.example())
    session = cachepass.session(cached)
    with (
        pytest.raises(cachepass.PolicyError, match=r"num_inference_steps=N"),
        session.at(step=0),
    ):
        cached(**WAN.example())


def test_going_back_a_step_starts_cold() -> None:
    cached = _toy(cachepass.Schedule(reuse={1: "stack", 2: "stack"}))
    session = cachepass.session(cached, num_inference_steps=4)
    for step in (0, 1, 2, 1):
        with session.at(step=step):
            cached(**TOY.example())
    assert [names for _, _, names in decisions(session)] == [[], ["stack"], ["stack"], []]
    assert "step 1 follows step 2: caches dropped" in notes(session)


def test_a_branch_twice_in_a_step_starts_cold() -> None:
    cached = _toy(cachepass.Schedule(reuse={1: "stack"}))
    session = cachepass.session(cached, num_inference_steps=4)
    for step in (0, 1, 1):
        with session.at(step=step):
            cached(**TOY.example())
    assert [names for _, _, names in decisions(session)] == [[], ["stack"], []]
    assert "called twice in step 1" in notes(session)


def test_sessions_of_two_models_may_be_entered_together() -> None:
    first, second = _toy(), _toy()
    a, b = cachepass.session(first), cachepass.session(second)
    with a.at(step=2), b.at(step=5):
        first(**TOY.example())
        second(**TOY.example())
    assert decisions(a) == [(2, "cond", [])]
    assert decisions(b) == [(5, "cond", [])]


# ------------------------------------------------------------------ the fallback clock


@pytest.mark.parametrize(
    "policy", [cachepass.Compute(), cachepass.FirstBlock(threshold=0.1, warmup_steps=0)]
)
def test_a_loop_without_a_session(policy: cachepass.NamedPolicy) -> None:
    """Timestep and conditioning tell step and branch, as well as a session would."""
    cached = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    found = denoise(plain(cached), steps=6)
    (request,) = cachepass.report(cached).to_dict()["requests"]
    session = cachepass.session(cached)
    expected = denoise(caller(cached, session), steps=6)
    told = [(s["step"], s["reused"]) for s in request["steps"]]
    assert told == [(step, [names]) for step, _, names in decisions(session)]
    assert len({s["branch"] for s in request["steps"]}) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert policy.name == "compute" or any(names for _, _, names in decisions(session))


def test_a_second_loop_is_a_second_request() -> None:
    cached = _toy(cachepass.Schedule(reuse={1: "stack"}))
    inputs = TOY.example()
    label, x = inputs["y"], inputs["x"]
    for _ in range(2):
        for t in (1.0, 0.6, 0.2):
            cached(x, torch.tensor([t]), label)
    requests = cachepass.report(cached).to_dict()["requests"]
    told = [[(c["step"], c["reused"]) for c in r["steps"]] for r in requests]
    assert told == [[(0, [[]]), (1, [["stack"]]), (2, [[]])]] * 2


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # two calls of guidance
        ([(9, "c"), (9, "u"), (5, "c"), (5, "u")], [(0, 0), (0, 1), (1, 0), (1, 1)]),
        # a second-order solver repeats a timestep with the same conditioning
        ([(9, "c"), (5, "c"), (5, "c"), (1, "c")], [(0, 0), (1, 0), (2, 0), (3, 0)]),
        # ascending schedules
        ([(1, "c"), (5, "c"), (9, "c")], [(0, 0), (1, 0), (2, 0)]),
    ],
)
def test_the_clock(calls: list[tuple[float, str]], expected: list[tuple[int, int]]) -> None:
    clock = Clock()
    ticks = [clock.tick(time, conditioning) for time, conditioning in calls]
    assert [(step, f"call{i}") for step, i in expected] == [(s, b) for s, b, _ in ticks]
    assert not any(restarted for _, _, restarted in ticks)


def test_temporaries_do_not_pass_for_each_other() -> None:
    """An embedding that is freed after its call lends its address to the next branch's."""
    cached = _toy(cachepass.FirstBlock(threshold=1e9, warmup_steps=0))
    inputs = TOY.example()
    for time in (0.9, 0.5):
        for label in (3, 5):
            cached(inputs["x"], torch.tensor([time]), torch.tensor([label]))
    (request,) = cachepass.report(cached).to_dict()["requests"]
    assert [(c["step"], c["branch"]) for c in request["steps"]] == [
        (step, branch) for step in (0, 1) for branch in ("call0", "call1")
    ]


def test_sessions_left_in_another_order_than_entered() -> None:
    cached = _toy(cachepass.Compute())
    a, b = (cachepass.session(cached, num_inference_steps=3) for _ in range(2))
    first, second = a.at(step=1), b.at(step=2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    cached(**TOY.example())
    second.__exit__(None, None, None)
    assert decisions(b) == [(2, "cond", [])]


def test_the_clock_restarts_where_time_turns_back() -> None:
    clock = Clock()
    for time in (9.0, 5.0, 1.0):
        clock.tick(time, "c")
    assert clock.tick(9.0, "c") == (0, "call0", True)


def test_branch_names_are_the_users() -> None:
    cached = cachepass.compile(WAN.model(), policy="compute", inner="eager")
    session = cachepass.session(cached)
    denoise(caller(cached, session), steps=1, branches=("text", "image", "empty"))
    assert [branch for _, branch, _ in decisions(session)] == ["text", "image", "empty"]
    assert BOTH == ("cond", "uncond")


def test_cache_context_names_the_call() -> None:
    model = WAN.model()
    cached = cachepass.compile(model, policy="compute", inner="eager")
    inputs = WAN.example()
    for step in range(2):
        for branch in BOTH:
            with cached.cache_context(branch, step_index=step, num_inference_steps=2, sigma=0.5):
                out = as_tensor(cached(**inputs))
    (request,) = cachepass.report(cached).to_dict()["requests"]
    assert request["num_inference_steps"] == 2
    assert [(c["step"], c["branch"]) for c in request["steps"]] == [
        (step, branch) for step in range(2) for branch in BOTH
    ]
    with torch.no_grad():
        assert torch.equal(out, as_tensor(model(**inputs)))
