"""The harness over diffusers' classes: what it reads off sources, and what it takes for right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.coverage.check import POLICIES, ROOM, check, in_a_line
from benchmarks.coverage.loops import called_in_loops, transformer_classes
from benchmarks.coverage.page import page
from tests.models import TOY
from tests.zoo.entry import Entry

ENTRY = Entry(build=TOY.build, inputs=TOY.inputs, main=("layers",), latent="x", timestep="t")


class Plain(torch.nn.Module):
    """No blocks."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + t + y


@pytest.mark.full
def test_which_classes_are_called_in_loops() -> None:
    called, classes = called_in_loops(), transformer_classes()
    assert called.keys() <= classes.keys()
    assert "WanImageToVideoPipeline" in called["WanTransformer3DModel"].pipelines
    assert "separate calls" in called["WanTransformer3DModel"].guidance
    assert called["CogVideoXTransformer3DModel"].guidance == {"concatenated"}
    assert called["Flux3Transformer2DModel"].pipelines == {"modular flux3"}
    assert "TransformerTemporalModel" not in called, "only inside of a UNet"


def test_a_class_that_works() -> None:
    told = check(ENTRY, compiled=False)
    assert told["main"]
    assert told["lowerings"] == {"regions, eager": "", "graph, eager": ""}
    for name, result in told["policies"].items():
        assert result["exact"], name
        assert (result["graphs"], result["late"]) == (1, 0)
        assert result["reused"] > 0 or name == "compute"
    assert set(told["policies"]["schedule"]["sites"]) == {"step", "cfg", "block", "stack"}
    row = next(line for line in _page({"WanTransformer3DModel": told}) if "| WanTr" in line)
    assert "layers: 3" in row
    assert "| equal | 20 |" in row


@pytest.mark.full
def test_a_class_that_fails() -> None:
    told = check(
        Entry(build=Plain, inputs=TOY.inputs, main=(), latent="x", timestep="t"),
        compiled=False,
    )
    assert told["error"].startswith("CaptureError: ")
    row = next(line for line in _page({"WanTransformer3DModel": told}) if "| WanTr" in line)
    assert "| CaptureError: " in row


def _page(found: dict[str, Any]) -> list[str]:
    return page(found, called_in_loops(), transformer_classes()).splitlines()


def test_every_policy_of_the_table_is_checked() -> None:
    assert {"compute", "firstblock", "mixcache", "adacache", "dbcache"} <= POLICIES.keys()


def test_reasons_name_files_without_their_folders() -> None:
    text = 'At /home/me/lib/a.py:3 in f\n(`x / y`): "/tmp/x/b.cpp", https://x.org/c/d'
    assert in_a_line(text) == 'At a.py:3 in f (`x / y`): "b.cpp", https://x.org/c/d'
    assert len(in_a_line("word " * 200)) == ROOM
