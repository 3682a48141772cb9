"""Packages of AOTInductor, from Python and from C++."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

import cachepass
from examples.export.request import Request
from tests.export.runners import Compiled, Exported, agree, branches_of, wan_of
from tests.export.test_program import FIRST_BLOCK, OPEN
from tests.models import TOY, WAN, Tiny, distance


# The toy's blocks are entered by a transposed sum of a convolution, for which Inductor
# chooses another layout than it compiles the arms of a conditional for.
@pytest.mark.parametrize("tiny", [TOY, pytest.param(WAN, marks=pytest.mark.full)], ids=["toy", ""])
def test_a_package_of_aotinductor(tiny: Tiny, tmp_path: pathlib.Path) -> None:
    path, policy = tmp_path / "model.pt2", cachepass.Schedule(reuse={1: "stack"})
    cachepass.export_aoti(tiny.model(), tiny.example(), path, policy=policy)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    program = cachepass.export(tiny.model(), tiny.example(), policy=policy)
    given: dict[str, Any] = dict(program.example_inputs[1])
    loaded = torch._inductor.aoti_load_package(str(path))
    for step in range(2):
        given["step"] = torch.tensor(step)
        with torch.no_grad():
            want, got = program.module()(**given), loaded(**given)
        assert distance(got["output"], want["output"]) < 1e-5
        assert bool(got["reused"]["stack"].all()) == (step == 1)
        # In the order that they were given: a package goes by place.
        given["state"] = {kind: kept | want["state"][kind] for kind, kept in given["state"].items()}


@pytest.mark.full
def test_a_package_with_open_sizes(tmp_path: pathlib.Path) -> None:
    path, two = tmp_path / "model.pt2", wan_of(rows=2)
    cachepass.export_aoti(WAN.model(), two.example(), path, policy=FIRST_BLOCK, dynamic_shapes=OPEN)
    loaded = torch._inductor.aoti_load_package(str(path))
    for tiny in (two, wan_of(rows=3, frames=5, height=12, width=10, words=9)):
        cold = cachepass.export(WAN.model(), tiny.example(), policy=FIRST_BLOCK).example_inputs[1]
        packaged = Exported(loaded, cold["state"], steps=6)
        branches = branches_of(tiny, "cond", "uncond")
        agree(packaged, Compiled(tiny, FIRST_BLOCK, 6), branches, 1e-5)


@pytest.mark.full
def test_a_package_in_a_program_of_c_plus_plus(tmp_path: pathlib.Path) -> None:
    from examples.export.aoti import build, run
    from examples.export.program import run as run_program

    request = Request(
        noise=torch.randn(1, 4, 2, 8, 8),
        texts={"cond": torch.randn(1, 5, 16), "uncond": torch.randn(1, 5, 16)},
        sigmas=torch.linspace(1, 0, 9),
    )
    policy = cachepass.FirstBlock(threshold=0.3, warmup_steps=1)
    path = tmp_path / "model.pt2"
    cachepass.export_aoti(WAN.model(), request.call(), path, policy=policy)
    program = cachepass.export(WAN.model(), request.call(), policy=policy)
    cold = program.example_inputs[1]["state"]
    want, skipped = run_program(program.module(), cold, request)
    assert 0 < skipped < 16
    assert distance(run(build(tmp_path / "build"), path, request, tmp_path), want) < 1e-5
