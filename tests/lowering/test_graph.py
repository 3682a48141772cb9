"""lowering="graph": the decisions and outputs of lowering="regions", from one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import cachepass
from cachepass.errors import CachePassError, PolicyError
from cachepass.runtime.session import Session
from tests.graphs import SITES, Script, examples
from tests.models import TOY, WAN, distance
from tests.requests import BOTH, decisions, run
from tests.toys.dit import ToyDiT
from tests.zoo import ZOO

# Random decisions may well be to compute.
pytestmark = pytest.mark.filterwarnings("ignore:.*reused nothing in a request:UserWarning")

STEPS = 20
RATIOS = (1.0, 1.01, 1.0, 0.99, 0.98, 0.95, 0.9, 0.82)
POLICIES: list[cachepass.NamedPolicy] = [
    cachepass.Schedule(reuse={2: "stack", 3: "cfg", 4: ("attention", "mlp"), 6: "step"}),
    cachepass.FirstBlock(threshold=0.3, warmup_steps=1),
    cachepass.TeaCache(threshold=0.3, warmup_steps=1),
    cachepass.AdaCache(codebook=((0.13, 3), (9.0, 2)), motion=False),
    cachepass.MixCache(trigger=9.0, influence=(0.3, 1.0, 1.0)),
    cachepass.EasyCache(threshold=0.5, warmup_steps=1),
    cachepass.DBCache(threshold=0.3, front=1, warmup_steps=1),
    cachepass.DiCache(threshold=0.5),
    cachepass.TaylorSeer(interval=3, order=2),
    cachepass.MagCache(ratios=RATIOS, threshold=0.1),
    cachepass.PAB(),
]


def both(
    policy: cachepass.NamedPolicy, inner: Any = "eager", **options: Any
) -> tuple[Session, Session]:
    """A request under each lowering, the regions run eagerly; the outputs are compared."""
    regions = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    graph = cachepass.compile(WAN.model(), policy=policy, lowering="graph", inner=inner)
    expected, theirs = run(regions, steps=STEPS, **options)
    outputs, ours = run(graph, steps=STEPS, **options)
    for got, want in zip(outputs, expected, strict=True):
        assert distance(got, want) < 1e-5
    return theirs, ours


QUICK = ("firstblock", "mixcache", "taylorseer")
"""One of each kind: one signal, several sites, several values."""


@pytest.mark.parametrize(
    "policy",
    [p if p.name in QUICK else pytest.param(p, marks=pytest.mark.full) for p in POLICIES],
    ids=lambda p: p.name,
)
def test_decides_and_computes_as_regions_do(policy: cachepass.NamedPolicy) -> None:
    theirs, ours = both(policy)
    assert decisions(ours) == decisions(theirs)
    assert {bool(names) for _, _, names in decisions(ours)} == {False, True}


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_compiled_as_well(policy: cachepass.NamedPolicy) -> None:
    theirs, ours = both(policy, inner="inductor")
    assert decisions(ours) == decisions(theirs)


def test_one_program_is_compiled() -> None:
    policy = cachepass.FirstBlock(threshold=0.3, warmup_steps=1)
    theirs, ours = both(policy, inner="inductor")
    assert decisions(ours) == decisions(theirs)
    assert cachepass.report(ours).to_dict()["compiles"]["regions"] == 1


class Scaled(nn.Module):
    """Is given parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ToyDiT()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        output: Tensor = self.model(x * scale + shift, t, y)
        return output


def test_arms_get_their_operands_as_they_were_compiled_for() -> None:
    # A transposed sum of a convolution: Inductor lays it out in another way if it may. And
    # arguments that share memory, which `torch.cond` takes not.
    model, (scale, shift) = Scaled().eval(), torch.tensor([2.0, 0.5]).unbind()
    given = TOY.example() | {"scale": scale, "shift": shift}
    with torch.no_grad():
        want = model(**given)
    policy = cachepass.Schedule(reuse={1: "stack", 2: "step"})
    cached = cachepass.compile(model, policy=policy, lowering="graph")
    with cachepass.session(cached, num_inference_steps=3).at(step=0):
        assert distance(cached(**given), want) < 1e-5


@pytest.mark.full
def test_sizes_that_change() -> None:
    model = TOY.model()
    policy = cachepass.Schedule(reuse={1: "block", 2: "step"})
    cached = cachepass.compile(model, policy=policy, lowering="graph")
    for height in (8, 4, 6):
        given = TOY.example() | {"x": torch.randn(1, 3, height, 8)}
        with torch.no_grad():
            assert distance(cached(**given), model(**given)) < 1e-5


@pytest.mark.full
def test_a_region_is_compiled_for_the_layouts_of_all_its_calls() -> None:
    # The first of the blocks is given a transposed stream, the others a contiguous one.
    entry = ZOO["SkyReelsV2Transformer3DModel"]
    model = entry.model()
    with torch.no_grad():
        (want,) = model(**entry.call())
    policy = cachepass.Schedule(reuse={1: "block"})
    cached = cachepass.compile(model, policy=policy, lowering="graph")
    with cachepass.session(cached, num_inference_steps=2).at(step=0):
        assert distance(cached(**entry.call())[0], want) < 1e-5


class Masking(ToyDiT):
    """Writes numbers into a tensor of its own, which a conditional's arm then does."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        keep = torch.zeros_like(x)
        keep[..., 2:] = 1
        keep[:, :, y.clamp(max=3)] = 2
        x = x + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
        return super().forward(x * keep, t, y)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_what_an_arm_writes_stays(inner: Any) -> None:
    model = Masking().eval()
    policy = cachepass.Schedule(reuse={1: "step"})
    cached = cachepass.compile(model, policy=policy, lowering="graph", inner=inner)
    session = cachepass.session(cached, num_inference_steps=2)
    with torch.no_grad():
        want = model(**TOY.example())
    for step in range(2):
        with session.at(step=step):
            output = cached(**TOY.example())
        assert distance(output, want) < 1e-5 if inner == "inductor" else torch.equal(output, want)


NAMES = [site.name for site in SITES]
ROWS = 2
_CACHE: dict[Any, tuple[Any, Any, Script]] = {}


@pytest.mark.parametrize(
    "predictor",
    [None, pytest.param(cachepass.Taylor(order=2), marks=pytest.mark.full)],
    ids=["usual", "taylor"],
)
@examples(15)
@given(
    table=st.dictionaries(
        st.tuples(st.integers(0, 4), st.sampled_from(BOTH), st.integers(0, ROWS - 1)),
        st.sets(st.sampled_from(NAMES), max_size=2),
    )
)
def test_rows_decide_on_their_own(
    predictor: cachepass.Predictor | None, table: dict[tuple[int, str, int], set[str]]
) -> None:
    if predictor not in _CACHE:  # capturing is what takes time
        policy = Script(places=SITES, predictor=predictor)
        models = [
            cachepass.compile(WAN.model(), policy=policy, lowering=lowering, inner="eager")
            for lowering in ("regions", "graph")
        ]
        _CACHE[predictor] = (*models, policy)
    regions, graph, policy = _CACHE[predictor]
    policy.begin(table)
    expected, theirs = run(regions, steps=5, rows=ROWS)
    outputs, ours = run(graph, steps=5, rows=ROWS)
    for row in range(ROWS):
        assert decisions(ours, row) == decisions(theirs, row)
    for got, want in zip(outputs, expected, strict=True):
        assert distance(got, want) < 1e-5


def test_state_goes_with_the_session() -> None:
    policy = cachepass.TaylorSeer(interval=3)
    model = cachepass.compile(WAN.model(), policy=policy, lowering="graph", inner="eager")
    first, session = run(model, steps=6)
    assert session.cache_bytes > 0
    cachepass.reset(model)
    assert session.cache_bytes == 0
    again, _ = run(model, steps=6)
    assert all(map(lambda a, b: bool((a == b).all()), first, again))


def test_what_needs_the_host_is_an_error_that_says_so() -> None:
    model = cachepass.compile(
        WAN.model(), policy=cachepass.FasterCache(), lowering="graph", inner="eager"
    )
    with pytest.raises(PolicyError, match=r"FrequencySplit counts the timesteps.*'regions'"):
        run(model, steps=2)


def test_unknown_lowering() -> None:
    with pytest.raises(CachePassError, match=r"unknown `lowering`='tree': .* regions, graph"):
        cachepass.compile(WAN.model(), lowering="tree")  # type: ignore[arg-type]
