"""What is captured in the place of a model with routed experts, and that the model stays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cachepass
from cachepass.moe.shadow import Shadow
from tests.models import HIDREAM, TOY, as_tensor, distance
from tests.moe.layers import Adapted, Glu, ScoreLoop, Sigmoid, Squared, plain
from tests.requests import decisions


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layer])
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](x) * self.scale
        return out


def _same(model: nn.Module, shadow: Shadow) -> bool:
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        return distance(shadow.module(x), model(x)) < 1e-6


# ------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    "build",
    [
        ScoreLoop,
        Sigmoid,
        lambda: ScoreLoop(k=1),
        lambda: ScoreLoop(experts=9, k=4),
        lambda: ScoreLoop(build=plain),
    ],
)
def test_loops_over_scores_are_matched(build: Callable[[], nn.Module]) -> None:
    model = Holder(build()).eval()
    shadow = Shadow(model)
    assert shadow.batched == ["blocks.0"]
    assert _same(model, shadow)
    compiled: Any = torch.compile(shadow.module, fullgraph=True, backend="eager")
    with torch.no_grad():
        x = torch.randn(2, 7, 16)
        assert distance(compiled(x), model(x)) < 1e-6


def test_zeroed_weights_prove_nothing() -> None:
    model = Holder(Squared()).eval()
    nn.init.zeros_(model.blocks[0].router.weight)  # type: ignore[union-attr, arg-type]
    shadow = Shadow(model)
    assert shadow.module is model
    assert not shadow.batched
    (why,) = shadow.refused.values()
    assert "no weighted sum of the gate's choice of experts that is known" in why
    assert "blocks.0 are left alone" in "".join(shadow.explain())


def test_experts_with_hooks_are_left_alone() -> None:
    model = Holder(ScoreLoop()).eval()
    model.blocks[0].mlps[2].register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]
    assert Shadow(model).refused == {"blocks.0": "hooks on mlps.2 would not run"}


def test_a_hook_on_one_layer_of_several() -> None:
    """Layers that are alike are tried once; a hook is of one of them."""
    layers = [ScoreLoop(), ScoreLoop()]
    model = nn.Sequential(*layers).eval()
    layers[1].mlps[2].register_forward_hook(lambda _, __, out: 2 * out)
    shadow = Shadow(model)
    assert shadow.batched == ["0"]
    assert shadow.refused == {"1": "hooks on mlps.2 would not run"}
    assert _same(model, shadow)


def test_a_hook_that_comes_and_goes() -> None:
    model = Holder(ScoreLoop()).eval()
    shadow = Shadow(model)
    layer: Any = model.blocks[0]
    handle = layer.mlps[2].w1.register_forward_hook(lambda _, __, out: 2 * out)
    assert shadow.refresh()
    assert not shadow.batched
    assert _same(model, shadow)
    handle.remove()
    assert shadow.refresh()
    assert shadow.batched == ["blocks.0"]
    assert not shadow.refresh()


class Activated(nn.Module):
    """An expert whose activation is an attribute."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 32), nn.Linear(32, 16), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def test_what_an_expert_calls_is_part_of_its_structure() -> None:
    layers = [ScoreLoop(build=lambda *_, act=act: Activated(act)) for act in (F.silu, F.relu)]
    model = nn.Sequential(*layers).eval()
    shadow = Shadow(model)
    assert shadow.batched == ["0", "1"]
    assert _same(model, shadow)
    layers[0].mlps[1] = Activated(F.relu)
    assert Shadow(model).batched == ["1"], "experts of one layer differ"


@pytest.mark.parametrize(
    "act",
    [
        lambda: functools.partial(F.gelu, approximate="tanh"),
        lambda: lambda x: x * torch.sigmoid(x),
        lambda: nn.GELU(),
    ],
    ids=["partial", "lambda", "module"],
)
def test_each_expert_may_have_its_own_of_one_kind(act: Callable[[], Any]) -> None:
    model = Holder(ScoreLoop(build=lambda *_: Activated(act()))).eval()
    shadow = Shadow(model)
    assert shadow.batched == ["blocks.0"]
    assert _same(model, shadow)


class Permuted(ScoreLoop):
    """The gate's scores are of other experts than they say."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = super().pick(x)
        order: Any = self.order
        return weight, order[index]


def test_numbers_in_a_buffer_are_part_of_the_structure() -> None:
    layers = [Permuted([0, 1, 2, 3, 4, 5]), Permuted([1, 0, 3, 2, 5, 4])]
    model = nn.Sequential(*layers).eval()
    shadow = Shadow(model)
    assert shadow.batched == ["0"]
    assert _same(model, shadow)


class Corrected(ScoreLoop):
    """Has a bias for choosing, zero until it is trained, and counts how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        index = torch.topk(scores + self.bias, self.k)[1]
        return scores.gather(-1, index), index


class Counting(ScoreLoop):
    """Has buffers that say nothing of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


def test_a_buffer_of_zeros_proves_nothing() -> None:
    assert not Shadow(Holder(Corrected()).eval()).batched


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_are_no_obstacle(device: str) -> None:
    with torch.device(device):
        model = Holder(Counting()).eval()
    assert Shadow(model).batched == ["blocks.0"]


def test_a_forward_replaced_on_the_way_is_left_alone() -> None:
    model = Holder(ScoreLoop()).eval()
    model.forward = model.forward  # type: ignore[method-assign]
    shadow = Shadow(model)
    assert shadow.module is model
    assert "forward of the model was replaced" in shadow.refused["blocks.0"]


def test_unequal_experts_are_none() -> None:
    layer = ScoreLoop()
    layer.mlps[3] = Glu(16, 8)
    shadow = Shadow(Holder(layer).eval())
    assert not shadow.batched
    assert not shadow.refused


def test_a_model_without_experts_is_its_own_shadow() -> None:
    model = TOY.model()
    shadow = Shadow(model)
    assert shadow.module is model
    assert not shadow.refresh()
    assert not list(shadow.explain())


def test_matching_draws_no_random_numbers() -> None:
    model = Holder(ScoreLoop()).eval()
    state = torch.get_rng_state()
    Shadow(model)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------- following the model


def test_weights_and_attributes_are_the_models_own() -> None:
    model = Holder(ScoreLoop()).eval()
    shadow = Shadow(model)
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in shadow.module.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert not shadow.refresh()
    assert _same(model, shadow)
    model.scale = 3.0
    assert not shadow.refresh()
    assert _same(model, shadow)
    model.double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        assert distance(shadow.module(x), model(x)) < 1e-6


def test_an_exchanged_module_builds_it_again() -> None:
    model = Holder(ScoreLoop()).eval()
    shadow = Shadow(model)
    layer: Any = model.blocks[0]
    bare = [mlp.w1 for mlp in layer.mlps]
    for mlp in layer.mlps:
        mlp.w1 = Adapted(mlp.w1)
    assert shadow.refresh()
    assert shadow.batched == ["blocks.0"], "an adapter is linear layers and a sum"
    assert _same(model, shadow)
    layer.mlps[0].w1 = bare[0]
    assert shadow.refresh()
    assert shadow.module is model, "experts are no longer equal"
    for mlp, linear in zip(layer.mlps, bare, strict=True):
        mlp.w1 = linear
    assert shadow.refresh()
    assert shadow.batched == ["blocks.0"]
    assert _same(model, shadow)
    assert not shadow.refresh()


# ------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("policy", ["compute", "firstblock", "mixcache"])
def test_hidream_is_captured_whole(policy: str) -> None:
    model, inputs = HIDREAM.model(), HIDREAM.example()
    with torch.no_grad():
        wanted = as_tensor(model(**inputs))
    keys, forwards = list(model.state_dict()), {type(m).forward for m in model.modules()}
    cached = cachepass.compile(model, policy=policy, inner="eager")
    with cachepass.session(cached, num_inference_steps=4).at(step=0, branch="cond"):
        assert distance(as_tensor(cached(**inputs)), wanted) < 1e-5
    report = str(cachepass.report(cached))
    assert "the experts of 4 layers run as one, such as double_stream_blocks.0" in report
    assert list(model.state_dict()) == keys
    assert {type(m).forward for m in model.modules()} == forwards
    assert not any("forward" in vars(m) for m in model.modules())
    assert list(cached.state_dict()) == [f"_orig_mod.{key}" for key in keys]
    with torch.no_grad():
        assert torch.equal(as_tensor(model(**inputs)), wanted)


def test_hidream_follows_its_weights_and_modules() -> None:
    model, inputs = HIDREAM.model(), HIDREAM.example()
    cached = cachepass.compile(model, policy="compute", inner="eager")
    before = as_tensor(cached(**inputs))

    def follows() -> bool:
        with torch.no_grad():
            wanted = as_tensor(model(**inputs))
        assert distance(wanted, before) > 1e-3, "the change is one"
        return distance(as_tensor(cached(**inputs)), wanted) < 1e-5

    experts = model.single_stream_blocks[0].block.ff_i.experts
    with torch.no_grad():
        for expert in experts:
            expert.w1.weight.mul_(-2)
    assert follows()
    for expert in experts:
        expert.w2.weight.data += 0.3
    assert follows()
    for expert in experts:
        expert.w3 = Adapted(expert.w3)
    assert follows()
    assert "the experts of 4 layers run as one" in str(cachepass.report(cached))


@pytest.mark.full
@pytest.mark.parametrize("lowering", ["regions", "graph"])
def test_hidream_compiled(lowering: Any) -> None:
    model, inputs = HIDREAM.model(), HIDREAM.example()
    with torch.no_grad():
        wanted = as_tensor(model(**inputs))
    policy = cachepass.Schedule(reuse={1: "step", 3: "stack"})
    cached = cachepass.compile(model, policy=policy, lowering=lowering)
    session = cachepass.session(cached, num_inference_steps=4)
    for step in range(4):
        with session.at(step=step):
            assert distance(as_tensor(cached(**inputs)), wanted) < 1e-5
    assert [bool(names) for _, _, names in decisions(session)] == [False, True, False, True]
