"""Every class that is called in a loop has an entry, and is right under every policy."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import cachepass
from benchmarks.coverage.check import check
from benchmarks.coverage.loops import called_in_loops, transformer_classes
from benchmarks.coverage.page import POLICIES
from tests.models import distance
from tests.zoo import ZOO

# What models of diffusers say on their way.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.full
def test_every_class_of_a_loop_has_an_entry() -> None:
    assert called_in_loops().keys() <= ZOO.keys()
    assert ZOO.keys() <= transformer_classes().keys()


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO)
def test_a_class(name: str) -> None:
    torch.compiler.reset()
    told = check(ZOO[name], compiled=False)
    assert "error" not in told
    assert told["main"]
    for policy in POLICIES:
        result = told["policies"][policy]
        assert result.get("exact"), (policy, result)
        assert result["late"] == 0


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO)
def test_sublayers_of_a_class(name: str) -> None:
    """What is skipped in one step is missed there, and nowhere else."""
    torch.compiler.reset()
    entry = ZOO[name]
    sites = cachepass.explain(entry.model(), entry.call()).to_dict()["sites"]
    names = tuple(site for site in ("attention", "mlp") if site in sites)
    assert names
    policy = cachepass.Schedule(reuse={1: names})
    model, cached = entry.model(), cachepass.compile(entry.model(), policy=policy, inner="eager")
    session = cachepass.session(cached, num_inference_steps=3)
    distances = []
    for step in range(3):
        given, same = entry.call(step, 3), entry.call(step, 3)  # some write to what they are given
        with session.at(step=step), torch.no_grad():
            pairs = zip(*map(tree_leaves, (cached(**given), model(**same))), strict=True)
        distances.append(max(distance(a, b) for a, b in pairs if isinstance(a, torch.Tensor)))
    before, skipped, after = distances
    assert max(before, after) < 1e-5 < skipped < 1
