"""What users put around a pipeline's denoiser, or into it: hooks, modes, weights, processors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import cachepass
from tests.adapters.driving import REUSE, REUSES, STEPS, calls, compiled, generate, requests
from tests.adapters.pipes import PIPES, flux, shapes


@pytest.mark.parametrize("when", ["before", "after"])
def test_whole_models_are_moved(when: str) -> None:
    """The hook that model offload puts on each component, on the only device there is."""
    pipe, given = shapes()
    expected = generate(pipe, given)
    if when == "before":
        _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    compiled(pipe)
    if when == "after":
        _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    for _ in range(2):
        assert torch.equal(generate(pipe, given), expected)
        hook.offload()
    assert [request["num_inference_steps"] for request in requests(pipe)] == [STEPS] * 2
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] == 1


def test_offload_of_layers_is_refused() -> None:
    """Weights that come and go within a call: an error that says what to do instead."""
    for how in ("sequential", "group"):
        pipe, given = shapes()
        model = pipe.transformer
        if how == "sequential":
            accelerate.cpu_offload(model, "cpu")
        else:
            apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
        compiled(pipe)
        with pytest.raises(
            cachepass.CaptureError,
            match=r"DModel\.\w+ carries a hook .*pipe.enable_model_cpu_offload\(\)",
        ):
            generate(pipe, given)


@contextlib.contextmanager
def _as_fused(module: nn.Module) -> Iterator[None]:
    """A low-rank addition to a layer's weights, as fusing writes and unfusing takes back."""
    weight = module.get_parameter("blocks.1.attn1.to_q.weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.data += 0.5 * torch.ones(24, 1) @ torch.ones(1, 24)
    yield
    weight.data.copy_(kept)


def test_weights_fused_and_taken_back() -> None:
    pipe, given = shapes()
    before = generate(pipe, given)
    with _as_fused(pipe.transformer):
        fused = generate(pipe, given)
    assert not torch.equal(fused, before)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), before)
    with _as_fused(pipe.transformer):
        assert torch.equal(generate(pipe, given), fused)
    assert torch.equal(generate(pipe, given), before)
    assert cachepass.report(pipe).to_dict()["compiles"]["graphs"] == 1


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    """A LoRA of rank 2, as a file of weights holds one."""
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and path.endswith(("to_q", "to_v")):
                down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
                found[f"transformer.{path}.lora_A.weight"] = 0.5 * down
                found[f"transformer.{path}.lora_B.weight"] = 0.5 * up
    return found


def test_an_adapter_loaded_scaled_fused_and_unloaded() -> None:
    pipe, given = PIPES["flux"].make()
    weights = _adapter(pipe.transformer)

    def outputs() -> Iterator[Tensor]:
        yield generate(pipe, given)
        pipe.load_lora_weights(dict(weights), adapter_name="style")
        yield generate(pipe, given)
        pipe.set_adapters("style", 0.5)
        yield generate(pipe, given)
        pipe.fuse_lora()
        yield generate(pipe, given)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        yield generate(pipe, given)

    before, loaded, scaled, *_ = expected = list(outputs())
    assert not any(map(torch.equal, (before, loaded, scaled), (loaded, scaled, before)))
    pipe, _ = PIPES["flux"].make()
    compiled(pipe)
    for got, want in zip(outputs(), expected, strict=True):
        assert torch.equal(got, want)
    assert pipe.get_list_adapters() == {}


class Int8(Tensor):
    """Weights in eight bits, made wide where they are used: how quantization libraries do it."""

    quantized: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: type[Int8], values: Tensor, scale: Tensor) -> Int8:
        made: Int8 = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)
        made.quantized, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["quantized", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Int8:
        return Int8(parts["quantized"], parts["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the operation
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if op is torch.ops.aten.detach.default:
            return Int8(args[0].quantized, args[0].scale)
        args, kwargs = tree_map_only(
            Int8, lambda q: q.quantized.to(q.scale.dtype) * q.scale, (args, kwargs or {})
        )
        return op(*args, **kwargs)


def test_weights_quantized_by_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipe, given = shapes()
    plain = generate(pipe, given)
    quantization.quantize_(pipe.transformer.blocks, quantization.Int8WeightOnlyConfig())
    expected = generate(pipe, given)
    assert not torch.equal(expected, plain)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)


def test_quantized_weights() -> None:
    pipe, given = shapes()
    plain = generate(pipe, given)
    for module in pipe.transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            quantized = Int8((weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(quantized, requires_grad=False)
    expected = generate(pipe, given)
    assert not torch.equal(expected, plain)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), expected)


def test_inference_mode() -> None:
    pipe, given = shapes()
    expected = generate(pipe, given)
    compiled(pipe, REUSE)
    with torch.inference_mode():
        reused = generate(pipe, given)
    assert not torch.equal(reused, expected)
    (request,) = requests(pipe)
    assert [c[2] for c in calls(request)] == [r for r in REUSES for _ in range(2)]
    assert torch.equal(generate(pipe, given), reused)


def test_autocast() -> None:
    pipe, given = shapes()
    plain = generate(pipe, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generate(pipe, given)
    compiled(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generate(pipe, given), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(generate(pipe, given), plain)


def test_another_attention_backend() -> None:
    """Chosen before, or between two requests: each has the kernel that is set."""
    pipe, given = shapes()
    with attention_backend("native"):  # what is set is set for all models, until here
        native = generate(pipe, given)
        pipe.transformer.set_attention_backend("_native_math")
        math = generate(pipe, given)
        compiled(pipe)
        for name, expected in (("_native_math", math), ("native", native), ("_native_math", math)):
            pipe.transformer.set_attention_backend(name)
            assert torch.equal(generate(pipe, given), expected)
        assert [r["num_inference_steps"] for r in requests(pipe)] == [STEPS] * 3


class Twice(FluxAttnProcessor):  # type: ignore[misc]
    """A processor of one's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return tuple(2 * part for part in made) if isinstance(made, tuple) else 2 * made


def test_a_processor_between_requests() -> None:
    pipe, given = flux()
    pipe.set_progress_bar_config(disable=True)
    given |= {"num_inference_steps": STEPS, "output_type": "latent"}
    before = generate(pipe, given)
    own = copy.copy(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(Twice())
    twice = generate(pipe, given)
    assert not torch.equal(before, twice)
    compiled(pipe)
    assert torch.equal(generate(pipe, given), twice)
    pipe.transformer.set_attn_processor(own)
    assert torch.equal(generate(pipe, given), before)
