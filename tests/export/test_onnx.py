"""Files of ONNX in onnxruntime against `compile`."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.errors import CachePassError, SessionError
from examples.export.request import generate, listen
from examples.shapes.pipeline import build_pipeline
from tests.export.runners import Compiled, Runtime, agree, branches_of, wan_of
from tests.export.test_program import FIRST_BLOCK, OPEN
from tests.models import TOY, WAN, distance
from tests.requests import euler
from tests.toys.dit import ToyBlock


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    cachepass.export_onnx(WAN.model(), WAN.example(), path, policy=FIRST_BLOCK)
    return path


def runner_of(path: pathlib.Path) -> Any:
    pytest.importorskip("onnxruntime")
    from cachepass.onnx import Denoiser

    return Denoiser(path)


def test_an_onnx_file(onnx_file: pathlib.Path) -> None:
    branches = branches_of(WAN, "cond", "uncond")
    denoiser = runner_of(onnx_file)
    agree(Runtime(denoiser), Compiled(WAN, FIRST_BLOCK), branches, 1e-4)
    first = euler(Runtime(denoiser, 3), branches, steps=3)
    again = euler(Runtime(denoiser, 3), branches, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.full
def test_a_file_with_open_sizes(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxscript")
    path, two = tmp_path / "model.onnx", wan_of(rows=2)
    cachepass.export_onnx(WAN.model(), two.example(), path, policy=FIRST_BLOCK, dynamic_shapes=OPEN)
    denoiser = runner_of(path)
    for tiny in (two, wan_of(rows=3, frames=5, height=12, width=10, words=9), wan_of(words=4)):
        branches = branches_of(tiny, "cond", "uncond")
        agree(Runtime(denoiser, 6), Compiled(tiny, FIRST_BLOCK, 6), branches, 1e-4)
    denoiser.begin_request(1)
    inputs = wan_of(rows=3).example() | {"timestep": torch.ones(2)}
    with pytest.raises(CachePassError, match=r"'timestep' has the shape \(2,\), the program takes"):
        denoiser(**inputs)


def test_the_onnx_file_is_legal_and_skips_with_an_if(onnx_file: pathlib.Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    (node,) = [n for n in model.graph.node if n.op_type == "If"]
    products = [
        sum(n.op_type in ("MatMul", "Gemm") for n in branch.g.node) for branch in node.attribute
    ]
    assert min(products) == 0 < max(products)
    # Weights lie in the branch that uses them.
    assert max(len(branch.g.initializer) for branch in node.attribute) >= max(products)


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("step 3") from ValueError("no operator for node mm_7")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(CachePassError, match="the export to ONNX failed: no operator for node mm"):
        cachepass.export_onnx(WAN.model(), WAN.example(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Odd(ToyBlock):
    """A block with an operator that ONNX does not have."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale: Tensor = torch.special.bessel_j0(x.mean())
        return super().forward(x, c) * scale


def test_an_operator_that_onnx_does_not_have(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxscript")
    model = TOY.model()
    model.layers = torch.nn.ModuleList(Odd(16) for _ in range(3))
    with pytest.raises(
        CachePassError,
        match=r"(?s)node 'bessel_j0' in module 'layers\.0'; File .*test_onnx.*bessel_j0\(x\.mean"
        r".*No ONNX function found for .*bessel_j0.*compute it otherwise, or take",
    ):
        cachepass.export_onnx(
            model,
            TOY.example(),
            tmp_path / "model.onnx",
            policy=cachepass.Schedule(reuse={1: "stack"}),
        )
    assert not list(tmp_path.iterdir())


def test_a_type_that_onnxruntime_does_not_know(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxscript")
    inputs = {
        name: value.bfloat16() if name == "x" else value for name, value in TOY.example().items()
    }
    path = tmp_path / "model.onnx"
    cachepass.export_onnx(
        TOY.model().bfloat16(), inputs, path, policy=cachepass.Schedule(reuse={1: "stack"})
    )
    with pytest.raises(
        CachePassError, match=r"cannot load .*bfloat16.* exporting the model in flo"
    ):
        runner_of(path)


def test_a_path_that_will_not_do() -> None:
    with pytest.raises(CachePassError, match=r"`path`='model\.bin': must end in \.pt2"):
        cachepass.export_aoti(WAN.model(), WAN.example(), "model.bin")
    with pytest.raises(CachePassError, match=r"`path`='no/where/model.onnx': .* is no folder"):
        cachepass.export_onnx(WAN.model(), WAN.example(), "no/where/model.onnx")


def test_errors_of_the_runner(onnx_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    denoiser = runner_of(onnx_file)
    with pytest.raises(CachePassError, match="the program takes encoder_hidden_states, hidden_st"):
        denoiser(hidden_states=torch.zeros(1, 4, 2, 8, 8))
    denoiser._needs_num_steps = True
    with pytest.raises(SessionError, match=r"needs the number of steps: give Denoiser the pipel"):
        denoiser()
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CachePassError, match="was not made by cachepass"):
        runner_of(tmp_path / "other.onnx")


@pytest.mark.full
def test_a_pipeline_around_an_onnx_file(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxruntime")
    from cachepass.onnx import Denoiser

    policy = cachepass.Schedule(reuse={2: "step", 3: "step"})
    asked: dict[str, Any] = {
        "prompt": "red disc bounce plain", "steps": 5, "height": 32, "width": 32,
    }  # fmt: skip
    pipe: Any = build_pipeline("small")
    example = listen(pipe, **asked).call()
    cachepass.export_onnx(pipe.transformer, example, tmp_path / "model.onnx", policy=policy)
    wanted = generate(cachepass.compile(pipe, policy=policy, inner="eager"), **asked)
    cachepass.restore(pipe)

    pipe.transformer = Denoiser(tmp_path / "model.onnx", scheduler=pipe.scheduler)
    for _ in range(2):  # a second request starts cold
        assert distance(generate(pipe, **asked), wanted) < 1e-4
        reused = [bool(sites) for _, _, sites in pipe.transformer.reused]
        assert reused == [False] * 4 + [True] * 4 + [False] * 2
