"""Random decisions: the rewritten graph does what the reference does, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import cachepass
from tests.graphs import SITES, Script, examples
from tests.models import WAN, distance
from tests.reference import Reference
from tests.requests import BOTH, assert_follows, caller, decisions, denoise
from tests.rules import ScheduleRule

# Random decisions may well be to compute.
pytestmark = pytest.mark.filterwarnings("ignore:.*reused nothing in a request:UserWarning")

STEPS = 5
KINDS = [site.name for site in SITES]
SOME = st.sets(st.sampled_from(KINDS), max_size=2)


@examples(40)
@given(
    table=st.dictionaries(st.integers(0, STEPS - 1), SOME),
    branches=st.sampled_from([BOTH, ("cond",), ("uncond", "cond")]),
)
def test_any_schedule_over_one_graph(table: dict[int, set[str]], branches: tuple[str, ...]) -> None:
    model, cached, policy = _scripted()
    policy.begin({(s, b, 0): names for s, names in table.items() for b in branches})
    rule = ScheduleRule({s: tuple(names) for s, names in table.items()}, middle=(1, 3))
    assert_follows(cached, Reference(model, rule, STEPS), branches=branches)


_CACHE: dict[object, tuple[Any, Any, Script]] = {}


def _scripted(predictor: cachepass.Predictor | None = None) -> tuple[Any, Any, Script]:
    """One model for all examples: capturing is what takes time."""
    if predictor not in _CACHE:
        model, policy = WAN.model(), Script(places=SITES, predictor=predictor)
        cached = cachepass.compile(model, policy=policy, inner="eager")
        _CACHE[predictor] = (model, cached, policy)
    return _CACHE[predictor]


@examples(5)
@given(
    table=st.dictionaries(st.integers(1, STEPS - 1), st.sampled_from(KINDS), min_size=1),
    low=st.integers(0, 2),
    count=st.integers(1, 2),
)
def test_any_schedule(table: dict[int, str], low: int, count: int) -> None:
    model, middle = WAN.model(), (low, low + count)
    policy = cachepass.Schedule(reuse=table, blocks=middle)
    cached = cachepass.compile(model, policy=policy, inner="eager")
    rule = ScheduleRule({step: (kind,) for step, kind in table.items()}, middle)
    assert_follows(cached, Reference(model, rule, STEPS))


ROWS = 3
CALLS = st.dictionaries(
    st.tuples(st.integers(0, STEPS - 1), st.sampled_from(BOTH), st.integers(0, ROWS - 1)), SOME
)


@pytest.mark.parametrize(
    "predictor",
    [None, pytest.param(cachepass.Taylor(order=2), marks=pytest.mark.full)],
    ids=["usual", "taylor"],
)
@examples(12)
@given(table=CALLS)
def test_rows_do_not_depend_on_their_neighbours(
    predictor: cachepass.Predictor | None, table: dict[tuple[int, str, int], set[str]]
) -> None:
    _, cached, policy = _scripted(predictor)
    policy.begin(table)
    session = cachepass.session(cached, num_inference_steps=STEPS)
    together = denoise(caller(cached, session), steps=STEPS, rows=ROWS)
    for row in range(ROWS):
        policy.begin({(s, b, 0): names for (s, b, r), names in table.items() if r == row})
        assert decisions(session, row) == decisions(_alone(cached, together, row))


ADAPTIVE: list[cachepass.NamedPolicy] = [
    cachepass.FirstBlock(threshold=0.105, warmup_steps=0),
    cachepass.AdaCache(codebook=((0.1, 4), (0.13, 3), (0.16, 2), (1.0, 1)), motion=False),
    cachepass.MixCache(trigger=9.0, influence=(0.3, 1.0, 1.0)),
]


@pytest.mark.parametrize("policy", ADAPTIVE, ids=lambda p: p.name)
def test_adaptive_rows_do_not_depend_on_their_neighbours(policy: cachepass.NamedPolicy) -> None:
    cached = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    steps = 16
    session = cachepass.session(cached, num_inference_steps=steps)
    together = denoise(caller(cached, session), steps=steps, rows=ROWS)
    of_rows = [decisions(session, row) for row in range(ROWS)]
    assert len({str(found) for found in of_rows}) > 1, "rows agree: choose other numbers"
    for row in range(ROWS):
        assert of_rows[row] == decisions(_alone(cached, together, row))


def _alone(cached: Any, together: list[torch.Tensor], row: int) -> cachepass.Session:
    """A session of one row, given what it was given in the batch; outputs are compared."""
    steps = len(together) // len(BOTH)
    session = cachepass.session(cached, num_inference_steps=steps)
    call = caller(cached, session)

    def only(
        step: int, branch: str, latent: torch.Tensor, time: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        mine = call(step, branch, *(t[row : row + 1] for t in (latent, time, text)))
        whole = together[len(BOTH) * step + BOTH.index(branch)]
        assert distance(mine, whole[row : row + 1]) < 1e-5
        return whole

    denoise(only, steps=steps, rows=ROWS)
    return session
