"""`compute` changes nothing: same bits eagerly, same numbers through Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cachepass
from examples.shapes import model as shapes
from tests.models import TINY, WAN, Tiny, as_tensor, distance

# Mochi asks for autocast to fp32, which CPUs answer with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def _call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return as_tensor(model(**inputs))


@pytest.mark.parametrize("name", TINY)
def test_eager_is_bitwise_equal(name: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    cached = cachepass.compile(model, policy="compute", inner="eager")
    for seed in (1, 2):
        inputs = tiny.example(seed)
        assert torch.equal(_call(cached, inputs), _call(model, inputs))
    assert cachepass.report(cached).to_dict()["blocks"] == tiny.blocks
    assert cachepass.report(cached).to_dict()["compiles"]["graphs"] == 1


@pytest.mark.parametrize("size", shapes.SIZES)
def test_the_trained_models_are_bitwise_equal(size: str) -> None:
    model = shapes.load(size)
    cached = cachepass.compile(model, policy="compute", inner="eager")
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 4, 64),
        "return_dict": False,
    }
    assert torch.equal(_call(cached, inputs), _call(model, inputs))


def _check_compiled(tiny: Tiny, policy: str) -> None:
    model = tiny.model()
    cached = cachepass.compile(model, policy=policy)
    for seed in (1, 2):
        cachepass.reset(cached)
        inputs = tiny.example(seed)
        assert distance(_call(cached, inputs), _call(model, inputs)) < 1e-5


def test_compiled_wan_is_equal() -> None:
    _check_compiled(WAN, "compute")


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in TINY if n != "wan"])
def test_compiled_is_equal(name: str) -> None:
    _check_compiled(TINY[name], "compute")


@pytest.mark.full
@pytest.mark.parametrize("policy", ["firstblock", "teacache"])
@pytest.mark.parametrize("name", TINY)
def test_first_call_of_a_policy_is_equal(name: str, policy: str) -> None:
    _check_compiled(TINY[name], policy)
