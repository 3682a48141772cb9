"""Loops over experts that capture leaves in the graph: replaced where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import cachepass
from cachepass.capture import own_graph
from cachepass.ir.graph import value_of
from cachepass.ir.printer import format_graph
from cachepass.moe.grouped import grouped_linear
from cachepass.pass_manager import run_passes
from cachepass.passes import BatchExperts, MarkBoundaries
from tests.graphs import capture
from tests.models import TOY, Tiny, distance
from tests.moe.layers import Glu, plain
from tests.toys.dit import ToyDiT

EXPERTS, K, DIM = 5, 2, 16


class Loop(nn.Module):
    """Every expert runs on every token; shares of those that were not chosen are zero."""

    def __init__(self, build: Callable[[int, int], nn.Module] = Glu) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS)
        self.mlps = nn.ModuleList(build(DIM, 24) for _ in range(EXPERTS))

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = torch.topk(self.router(x).softmax(-1), K)
        return weight / weight.sum(-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.pick(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.mlps):
            out += (weight * (index == i)).sum(-1, keepdim=True) * expert(x)
        return out


class Table(Loop):
    """A table of shares, added to what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.pick(x)
        table = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, index, weight.sigmoid())
        out = x
        for i, expert in enumerate(self.mlps):
            out = out + expert(x) * table[..., i : i + 1]
        return out


class Summed(Loop):
    """Python's own sum, from the last expert to the first."""

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.pick(x)
        hot = (F.one_hot(index, EXPERTS) * weight[..., None]).sum(-2)
        terms = [hot[..., i, None] * self.mlps[i](x) for i in reversed(range(EXPERTS))]
        out: Tensor = sum(terms)
        return out


class Soft(Loop):
    """All experts count."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        kept = torch.topk(scores, K)[1]
        out = torch.zeros_like(x) + kept.sum()
        for i, expert in enumerate(self.mlps):
            out = out + scores[..., i : i + 1] * expert(x)
        return out


class Floor(Loop):
    """Those that were not chosen count a little."""

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.pick(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.mlps):
            out += ((weight * (index == i)).sum(-1, keepdim=True) + 1e-3) * expert(x)
        return out


class Peeked(Loop):
    """What one expert gave is used besides."""

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.pick(x)
        out, last = torch.zeros_like(x), x
        for i, expert in enumerate(self.mlps):
            last = expert(x)
            out = out + (weight * (index == i)).sum(-1, keepdim=True) * last
        return out + last.relu()


class Mixing(nn.Module):
    """An expert that looks at several rows at once."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).softmax(-2))
        return out


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](x)
        return out


def _captured(
    layer: nn.Module, *, open_rows: bool = False
) -> tuple[fx.GraphModule, list[Any], Tensor]:
    """A graph, what it is called with and what it gives; `open_rows` for any number of rows."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        def call(*args: Any) -> Any:
            found.extend([own_graph(gm), list(args)])
            return gm.forward(*args)

        return call

    model: Any = torch.compile(Holder(layer).eval(), backend=backend, fullgraph=True)
    x = torch.randn(2, 6, DIM)
    if open_rows:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        output = model(x)
        if open_rows:
            output = model(torch.randn(3, 6, DIM))
    return found[0], found[-1], output


def _products(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=grouped_linear))


@pytest.mark.parametrize(
    ("layer", "products"),
    [
        (Loop(), 3),
        (Table(), 3),
        (Summed(), 3),
        (Loop(build=plain), 2),
    ],
    ids=["loop", "table", "summed", "plain"],
)
@pytest.mark.parametrize("open_rows", [False, True], ids=["two rows", "any number of rows"])
def test_fires_with_the_same_numbers_and_is_idempotent(
    layer: nn.Module, products: int, open_rows: bool
) -> None:
    gm, args, wanted = _captured(layer, open_rows=open_rows)
    assert run_passes(gm, [BatchExperts()]).modified
    assert _products(gm) == products
    linears = [n for n in gm.graph.nodes if "linear" in str(n.target) and n.op == "call_function"]
    assert len(linears) == products + 1, "those of the experts are gone, the router's is left"
    kinds = (Tensor, tuple, torch.SymInt, type(None))
    assert all(isinstance(value_of(n), kinds) for n in gm.graph.nodes)
    with torch.no_grad():
        (output,) = gm(*args)
    known = value_of(list(gm.graph.nodes)[-2]).shape
    assert output.shape == ((3, *known[1:]) if open_rows else known)
    assert distance(output, wanted) < 1e-6
    text = format_graph(gm)
    assert not BatchExperts()(gm).modified
    assert format_graph(gm) == text


@pytest.mark.parametrize(
    "layer",
    [Soft(), Floor(), Peeked(), Loop(build=Mixing)],
    ids=["soft", "floor", "a result with two users", "mixing rows"],
)
def test_leaves_alone_what_is_not_the_same(layer: nn.Module) -> None:
    gm, args, wanted = _captured(layer)
    text = format_graph(gm)
    result = BatchExperts()(gm)
    assert not result.modified
    assert result.graph_module is gm
    assert format_graph(gm) == text
    with torch.no_grad():
        assert torch.equal(gm(*args)[0], wanted)


def test_the_trial_runs_where_drawn_values_are() -> None:
    """A table that is made on the model's device, wherever that is."""
    gm, *_ = _captured(Table())
    (made,) = [n for n in gm.graph.nodes if n.target is torch.zeros]
    made.kwargs = {**made.kwargs, "device": torch.device("cuda", 1)}
    assert run_passes(gm, [BatchExperts()]).modified


def test_a_model_without_experts() -> None:
    gm = capture().gm
    text = format_graph(gm)
    assert not BatchExperts()(gm).modified
    assert format_graph(gm) == text


def test_the_text_of_a_routed_layer() -> None:
    gm, *_ = _captured(Loop(build=plain))
    run_passes(gm, [BatchExperts()])
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    names = [str(getattr(n.target, "__name__", n.target)) for n in nodes]
    start = names.index("cat")
    assert names[start:] == [
        "cat", "gather", "reshape", "reshape", "route", "getitem", "getitem", "getitem", "reshape",
        "grouped_linear.default", "gelu", "grouped_linear.default", "combine",
    ]  # fmt: skip


class RoutedDiT(ToyDiT):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.mlp = Loop()


def test_a_graph_that_was_marked() -> None:
    gm = capture(Tiny(RoutedDiT, TOY.inputs, blocks=3)).gm
    with pytest.raises(cachepass.PassError, match="is marked already: run BatchExperts first"):
        run_passes(gm, [MarkBoundaries(), BatchExperts()])


def test_through_torch_compile() -> None:
    tiny = Tiny(RoutedDiT, TOY.inputs, blocks=3)
    captured = capture(tiny)
    captured.run(*captured.pipeline(cachepass.FirstBlock()))
    text = format_graph(captured.gm)
    assert "region layers  # 2 calls" in text or "region layers  # 1 calls" in text
    regions = [m for m in captured.gm.modules() if isinstance(m, fx.GraphModule)]
    assert sum(_products(region) for region in regions) >= 3


@pytest.mark.full
def test_compiled() -> None:
    tiny = Tiny(RoutedDiT, TOY.inputs, blocks=3)
    model, inputs = tiny.model(), tiny.example()
    cached: Any = torch.compile(
        model, backend="cachepass", fullgraph=True, options={"policy": "compute"}
    )
    with torch.no_grad():
        assert distance(cached(**inputs), model(**inputs)) < 1e-5
