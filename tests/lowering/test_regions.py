"""Regions on their own: what is known of compiled code before it is run."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import cachepass
from cachepass.ir import ops
from cachepass.lowering.compiler import CompiledRegion, RegionCompiler
from tests.models import TOY, distance


def _compiled(region: fx.GraphModule, *inputs: Tensor) -> CompiledRegion:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(value, static_shapes=True) for value in inputs]
    return RegionCompiler()(region, fakes, mode, 1)


def test_strides_are_those_of_compiled_results() -> None:
    def region(x: Tensor) -> tuple[Tensor, ...]:
        # Contiguous when it is run eagerly; Inductor keeps the strides of the one tensor.
        return torch.cat([x.transpose(1, 2)]) * 1, x.transpose(1, 2).exp(), x + 1

    x = torch.randn(1, 3, 8)
    compiled = _compiled(fx.symbolic_trace(region), x)
    results = compiled.code([x])
    assert compiled.strides == tuple(result.stride() for result in results)
    for got, want in zip(results, region(x), strict=True):
        torch.testing.assert_close(got, want)


def _part_of(size: int) -> fx.GraphModule:
    graph = fx.Graph()
    part = graph.call_function(operator.getitem, (graph.placeholder("x"), graph.placeholder("m")))
    graph.output((graph.call_function(ops.of_shape, (part, (size, 4))),))
    return fx.GraphModule({}, graph)


def test_sizes_that_data_give_tell_regions_apart() -> None:
    x = torch.randn(6, 4)
    for size in (2, 3):
        mask = torch.arange(6) < size
        compiled = _compiled(_part_of(size), x, mask)
        torch.testing.assert_close(compiled.code([x, mask])[0], x[:size])


@pytest.mark.full
def test_numbers_are_not_taken_for_rows() -> None:
    """As many columns as there are rows: neither is known by the other."""
    model = TOY.model()
    cached = cachepass.compile(model, policy="compute")
    for height, width, rows in ((8, 8, 4), (8, 4, 4), (8, 4, 3)):
        x, t, y = torch.randn(rows, 3, height, width), torch.rand(rows), torch.zeros(rows).long()
        with torch.no_grad():
            assert distance(cached(x, t, y), model(x, t, y)) < 1e-5
    assert cachepass.report(cached).to_dict()["compiles"]["graphs"] == 2
