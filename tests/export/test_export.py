"""Exported programs, in torch and in onnxruntime, against `compile`."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.errors import CachePassError, SessionError
from tests.models import TOY, WAN, Tiny, distance
from tests.requests import BOTH, Call, decisions, denoise, run

STEPS = 20
FIRST_BLOCK = cachepass.FirstBlock(threshold=0.3, warmup_steps=1)
POLICIES: list[cachepass.NamedPolicy] = [
    cachepass.TeaCache(threshold=0.3, warmup_steps=1),
    cachepass.AdaCache(codebook=((0.13, 3), (9.0, 2)), motion=False),
    cachepass.MixCache(trigger=9.0, influence=(0.3, 1.0, 1.0)),
    cachepass.EasyCache(threshold=0.5, warmup_steps=1),
    cachepass.PAB(),
]
SOME = [FIRST_BLOCK, *(pytest.param(p, marks=pytest.mark.full, id=p.name) for p in POLICIES)]
Decisions = list[tuple[int, str, list[str]]]


def expected(policy: cachepass.NamedPolicy) -> tuple[list[Tensor], Decisions]:
    model = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    outputs, session = run(model, steps=STEPS)
    return outputs, decisions(session)


class Runner:
    """What a user writes around an exported program."""

    def __init__(self, program: Any, cold: dict[str, dict[str, Tensor]]) -> None:
        self.program, self.cold = program, cold
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.reused: Decisions = []

    @torch.no_grad()
    def __call__(
        self, step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor
    ) -> Tensor:
        state = {
            "branch": self.kept.get(branch, self.cold["branch"]),
            "request": self.kept.get("", self.cold["request"]),
        }
        numbers = (step, STEPS, BOTH.index(branch))
        made = self.program(
            hidden_states=latent, timestep=time, encoder_hidden_states=text, state=state,
            **dict(zip(("step", "num_steps", "branch"), map(torch.tensor, numbers), strict=True)),
        )  # fmt: skip
        self.kept[branch] = state["branch"] | made["state"]["branch"]
        self.kept[""] = state["request"] | made["state"]["request"]
        reused = sorted(site for site, rows in made["reused"].items() if rows.all())
        self.reused.append((step, branch, reused))
        output: Tensor = made["output"]
        return output


def check(call: Call, reused: Callable[[], Decisions], policy: Any, limit: float) -> None:
    wanted, theirs = expected(policy)
    for got, want in zip(denoise(call, steps=STEPS), wanted, strict=True):
        assert distance(got, want) < limit
    assert reused() == theirs
    assert {bool(names) for _, _, names in theirs} == {False, True}


@pytest.mark.parametrize("policy", SOME, ids=lambda p: p.name)
def test_a_program_of_torch_export(policy: cachepass.NamedPolicy) -> None:
    program = cachepass.export(WAN.model(), WAN.example(), policy=policy)
    runner = Runner(program.module(), program.example_inputs[1]["state"])
    check(runner, lambda: runner.reused, policy, 1e-5)


ALONE = """
import sys, torch

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cachepass", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
program = torch.export.load(sys.argv[1])
torch.save(program.module()(**program.example_inputs[1])["output"], sys.argv[2])
"""


def test_a_saved_program_runs_without_cachepass(tmp_path: pathlib.Path) -> None:
    program = cachepass.export(WAN.model(), WAN.example(), policy=FIRST_BLOCK)
    torch.export.save(program, tmp_path / "model.pt2")
    files = [str(tmp_path / name) for name in ("model.pt2", "output.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        want = WAN.model()(**WAN.example())[0]
    assert distance(torch.load(files[1]), want) < 1e-6


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


# ------------------------------------------------------------------------------ onnx


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


def onnx_call(denoiser: Any) -> Call:
    denoiser.begin_request(STEPS)

    def call(step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        if step != denoiser.step:
            denoiser.end_step()
        with denoiser.cache_context(branch):
            output: Tensor = denoiser(
                hidden_states=latent, timestep=time, encoder_hidden_states=text, return_dict=False
            )[0]
        return output

    return call


def test_an_onnx_file(onnx_file: pathlib.Path) -> None:
    denoiser = runner_of(onnx_file)
    check(onnx_call(denoiser), lambda: denoiser.reused, FIRST_BLOCK, 1e-4)
    first = denoise(onnx_call(denoiser), steps=3)
    again = denoise(onnx_call(denoiser), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_an_onnx_file_of(policy: cachepass.NamedPolicy, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    cachepass.export_onnx(WAN.model(), WAN.example(), path, policy=policy)
    denoiser = runner_of(path)
    check(onnx_call(denoiser), lambda: denoiser.reused, policy, 1e-4)


def test_the_onnx_file_is_legal_and_skips_with_an_if(onnx_file: pathlib.Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    (node,) = [n for n in model.graph.node if n.op_type == "If"]
    products = [
        sum(n.op_type in ("MatMul", "Gemm") for n in branch.g.node) for branch in node.attribute
    ]
    assert min(products) == 0 < max(products)


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("step 3") from ValueError("no operator for node mm_7")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(CachePassError, match="the export to ONNX failed: no operator for node mm"):
        cachepass.export_onnx(WAN.model(), WAN.example(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


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


def test_a_pipeline_around_an_onnx_file(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxruntime")
    from cachepass.onnx import Denoiser
    from examples.shapes.pipeline import build_pipeline

    policy = cachepass.Schedule(reuse={2: "step", 3: "step"})
    size: dict[str, Any] = {"num_inference_steps": 5, "height": 32, "width": 32}

    def generate(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        frames: Tensor = pipe(
            "red disc bounce plain", output_type="latent",
            generator=torch.Generator().manual_seed(0), **size,
        ).frames  # fmt: skip
        return frames

    pipe: Any = build_pipeline("small")
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generate(pipe)
    hook.remove()
    cachepass.export_onnx(pipe.transformer, seen[0], tmp_path / "model.onnx", policy=policy)
    wanted = generate(cachepass.compile(pipe, policy=policy, inner="eager"))
    cachepass.restore(pipe)

    pipe.transformer = Denoiser(tmp_path / "model.onnx", scheduler=pipe.scheduler)
    for _ in range(2):  # a second request starts cold
        assert distance(generate(pipe), wanted) < 1e-4
        reused = [bool(sites) for _, _, sites in pipe.transformer.reused]
        assert reused == [False] * 4 + [True] * 4 + [False] * 2
