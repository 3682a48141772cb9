"""Every class that is called in a loop has an entry, and is right under every policy."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage.check import check
from benchmarks.coverage.loops import called_in_loops, transformer_classes
from benchmarks.coverage.page import POLICIES
from tests.zoo import ZOO

# One each of: recorded as it chooses by data, video and sound at once, latents in a list.
QUICK = (
    "HunyuanVideo15Transformer3DModel", "LTX2VideoTransformer3DModel", "ZImageTransformer2DModel",
)  # fmt: skip


def test_every_class_of_a_loop_has_an_entry() -> None:
    assert called_in_loops().keys() <= ZOO.keys()
    assert ZOO.keys() <= transformer_classes().keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in ZOO],
)
def test_a_class(name: str) -> None:
    torch.compiler.reset()
    told = check(ZOO[name], compiled=False)
    assert "error" not in told
    assert told["main"]
    for policy in POLICIES:
        result = told["policies"][policy]
        assert result.get("exact"), (policy, result)
        assert result["late"] == 0
