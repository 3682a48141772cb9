"""What users are told when they ask for what is not there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepass
from cachepass.passes import default_pipeline
from tests.models import TOY

AdaCache, FirstBlock, MixCache, TeaCache = (
    cachepass.AdaCache,
    cachepass.FirstBlock,
    cachepass.MixCache,
    cachepass.TeaCache,
)


def _toy(**options: Any) -> Any:
    return cachepass.compile(TOY.model(), inner="eager", **options)


def test_policies_by_name() -> None:
    known = cachepass.policies()
    assert {"compute", "schedule", "mixcache", "adacache", "firstblock", "teacache"} <= set(known)
    for name, kind in known.items():
        assert kind.name == name
        assert isinstance(kind(), cachepass.NamedPolicy)
        assert hash(kind()) == hash(kind())
        assert kind() == kind()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "nocache"}, r"unknown policy 'nocache': choose one of adacache, compute, "),
        ({"policy": 3}, r"unknown policy 3: choose one of"),
        (
            {"policy": "firstblock", "options": {"treshold": 1}},
            r"policy 'firstblock' has no option 'treshold'; its options are threshold, warmup",
        ),
        ({"policy": "compute", "options": {"x": 1}}, r"no option 'x'; its options are none"),
        (
            {"policy": FirstBlock(), "options": {"threshold": 1}},
            r"options \['threshold'\] were given beside a policy object",
        ),
    ],
)
def test_unknown_policies_and_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cachepass.PolicyError, match=message):
        _toy(**options)


def test_options_reach_the_policy() -> None:
    cached = _toy(policy="firstblock", options={"threshold": 0.25})
    assert cached.denoiser.policy == FirstBlock(threshold=0.25).combine()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            FirstBlock,
            {"threshold": -0.1},
            "FirstBlock: Below(`threshold`=-0.1): must be",
        ),
        (FirstBlock, {"warmup_steps": -1}, "Limited(`warmup_steps`=-1): must be a count of"),
        (
            TeaCache,
            {"threshold": -1.0},
            "TeaCache: Accumulated(`threshold`=-1.0): must be",
        ),
        (
            TeaCache,
            {"coefficients": ()},
            "TeaCache: Relative(`coefficients`=()): must be at",
        ),
        (
            AdaCache,
            {"codebook": ()},
            "Codebook(`codebook`=()): must be pairs (bound, rate)",
        ),
        (AdaCache, {"codebook": ((0.2, 1), (0.1, 2))}, "must be pairs (bound, rate) with ascend"),
        (AdaCache, {"codebook": ((0.2, 0),)}, "rates of at least 1"),
        (AdaCache, {"motion_scale": 0.0}, "AdaCache: Motion(`scale`=0.0): must be above 0"),
        (AdaCache, {"motion_window": (0.5, 0.1)}, "must be two ascending shares from 0 to 1"),
        (MixCache, {"interval": (1, 3)}, "MixCache(`interval`=(1, 3)): must be (shortest, long"),
        (MixCache, {"interval": (4, 3)}, "the shortest at least 2"),
        (MixCache, {"start_interval": 9}, "MixCache(`start_interval`=9): must be within"),
        (MixCache, {"trigger": -1.0}, "MixCache(`trigger`=-1.0): must be at least 0"),
        (MixCache, {"warmup": 1.5}, "MixCache(`warmup`=1.5): must be a share from 0 to 1"),
        (MixCache, {"latest_start": -0.5}, "must be a share from 0 to 1"),
        (MixCache, {"lengthen": 0.5}, "MixCache(`lengthen`=0.5): must be from 0 to `shorten`"),
        (MixCache, {"influence": (1.0, -1.0, 1.0)}, "must be three numbers of at least 0"),
        (MixCache, {"repeat_penalty": 0.5}, "(`repeat_penalty`=0.5): must be at least 1"),
        (cachepass.Schedule, {"reuse": {2: "layer"}}, "must be one of step, cfg, stack, block"),
        (cachepass.Schedule, {"reuse": {-2: "step"}}, "must be keyed by steps from 0"),
    ],
)
def test_fields_out_of_range(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(cachepass.PolicyError, match=re.escape(message)):
        kind(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering": "graphs"}, "unknown `lowering`='graphs'"),
        ({"inner": "aot_eager"}, "unknown `inner`='aot_eager': must be 'inductor' or 'eager'"),
    ],
)
def test_unknown_ways_to_compile(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cachepass.CachePassError, match=message):
        cachepass.compile(TOY.model(), **options)


def test_a_compiled_module_is_refused() -> None:
    model: Any = torch.compile(TOY.model(), backend="eager")
    for again in (model, _toy(policy="compute")):
        with pytest.raises(cachepass.CachePassError, match=r"compiled already: .*_orig_mod"):
            cachepass.compile(again, policy="compute")


def test_only_modules_and_pipelines_are_compiled() -> None:
    with pytest.raises(
        cachepass.CachePassError, match=r"torch.nn.Module or a diffusers pipeline, got int"
    ):
        cachepass.compile(3)


def test_inputs_that_require_grad_are_refused() -> None:
    cached, inputs = _toy(policy="compute"), TOY.example()
    inputs["x"].requires_grad_()
    with pytest.raises(cachepass.CachePassError, match="an input requires grad"):
        cached(**inputs)
    out = cached(inputs["x"].detach(), inputs["t"], inputs["y"])
    assert not out.requires_grad


class Flat(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x * timestep


def test_a_model_without_blocks() -> None:
    cached = cachepass.compile(Flat(), policy="compute", inner="eager")
    with pytest.raises(cachepass.CaptureError, match="no stack of repeated blocks"):
        cached(torch.randn(1, 4, 4), torch.ones(1))


def test_the_wrong_object_is_named() -> None:
    model = TOY.model()
    with pytest.raises(cachepass.SessionError, match="for a module, got ToyDiT"):
        cachepass.session(model)
    for ask in (cachepass.report, cachepass.reset):
        with pytest.raises(cachepass.CachePassError, match="ToyDiT"):
            ask(model)
    with pytest.raises(cachepass.CachePassError, match="got int"):
        cachepass.report(3)


def test_dump(tmp_path: Path) -> None:
    cached = _toy(policy="firstblock", dump=tmp_path / "passes")
    with pytest.raises(cachepass.CachePassError, match="nothing was captured yet: call the model"):
        cachepass.dump(cached, tmp_path)
    cached(**TOY.example())
    (path,) = cachepass.dump(cached, tmp_path / "final")
    text = path.read_text(encoding="utf-8")
    assert "decide()" in text
    assert "if not reused 'step'" in text
    numbered = sorted(p.name for p in (tmp_path / "passes").rglob("*.txt"))
    assert numbered[0] == "00-batch-experts.txt"
    assert numbered[-1].endswith("outline-regions.txt")
    last = next(iter((tmp_path / "passes").rglob(numbered[-1])))
    assert last.read_text(encoding="utf-8") == text


def test_dump_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEPASS_DUMP", str(tmp_path))
    _toy(policy="compute")(**TOY.example())
    assert list(tmp_path.rglob("00-batch-experts.txt"))


def test_report_before_and_after() -> None:
    cached = _toy(policy="firstblock", options={"threshold": 1e9, "warmup_steps": 0})
    before = cachepass.report(cached)
    assert "nothing was captured yet" in str(before)
    session = cachepass.session(cached, num_inference_steps=2)
    for step in range(2):
        with session.at(step=step):
            cached(**TOY.example())
    data = cachepass.report(session).to_dict()
    (request,) = data["requests"]
    assert request["calls"] == {"compute": 1, "step": 1}
    assert (request["blocks_computed"], request["blocks"]) == (4, 6)
    assert request["blocks_skipped"] == pytest.approx(1 / 3)
    assert data["stacks"] == {"layers": 3}
    assert data["sublayers"] == {"self-attention": 3, "mlp": 3}
    text = str(cachepass.report(cached))
    assert "33.3% of block work skipped" in text
    assert "stack layers: 3 blocks" in text


def test_the_wrapper_is_the_module() -> None:
    model = TOY.model()
    cached = cachepass.compile(model, policy="compute", inner="eager")
    assert isinstance(cached, nn.Module)
    assert [k.removeprefix("_orig_mod.") for k in cached.state_dict()] == list(model.state_dict())
    cached.double()
    assert next(model.parameters()).dtype == torch.float64
    inputs = TOY.example()
    with torch.no_grad():
        model.float()
        assert torch.equal(cached(**inputs), model(**inputs))


def test_the_pipeline_is_visible() -> None:
    names = [p.name for p in default_pipeline((), ())]
    assert names[:3] == ["batch-experts", "fold-sizes", "mark-boundaries"]
    assert names[-1] == "outline-regions"
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------- torch's own door


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("firstblock", {"threshold": 1e9, "warmup_steps": 0}),
        pytest.param("compute", {}, marks=pytest.mark.full),
    ],
)
def test_torch_compile_with_the_backend(policy: str, options: dict[str, Any]) -> None:
    model = TOY.model()
    cached: Any = torch.compile(
        model, backend="cachepass", fullgraph=True, options={"policy": policy, **options}
    )
    inputs = TOY.example()
    with torch.no_grad():
        first = cached(inputs["x"], torch.tensor([0.9]), inputs["y"])
        second = cached(inputs["x"], torch.tensor([0.5]), inputs["y"])
        expected = [model(inputs["x"], torch.tensor([t]), inputs["y"]) for t in (0.9, 0.5)]
    torch.testing.assert_close(first, expected[0], rtol=1e-4, atol=1e-5)
    same = torch.allclose(second, expected[1], rtol=1e-4, atol=1e-5)
    assert same == (policy == "compute"), "the second call reuses the first one's output"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "compute"}, r"gradients are on: .* under torch.no_grad\(\)"),
        ({}, r"policy 'mixcache' needs the number of steps .* \"num_inference_steps\" to the opt"),
    ],
)
def test_what_the_backend_needs(options: dict[str, Any], message: str) -> None:
    cached: Any = torch.compile(TOY.model(), backend="cachepass", fullgraph=True, options=options)
    with pytest.raises(Exception, match=message):
        cached(**TOY.example())


def test_the_backend_names_unknown_options() -> None:
    cached: Any = torch.compile(
        TOY.model(), backend="cachepass", fullgraph=True, options={"policy": "nocache"}
    )
    with pytest.raises(Exception, match="unknown policy 'nocache'"), torch.no_grad():
        cached(**TOY.example())


def test_a_wrapper_has_the_class_of_its_model_and_is_not_copied() -> None:
    model = TOY.model()
    cached = cachepass.compile(model, policy="compute", inner="eager")
    assert cached.__class__ is type(model)
    assert isinstance(cached, type(model))
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(cachepass.CachePassError, match="copy the module that was compiled"):
            copied(cached)
