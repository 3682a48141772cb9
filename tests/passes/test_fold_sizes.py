"""Sizes that a model reads from tensors of its own numbers become numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import cachepass
from cachepass import capture
from cachepass.ir.graph import walk
from cachepass.pass_manager import run_passes
from cachepass.passes import FoldSizes
from tests.graphs import capture as capture_tiny
from tests.models import distance


class Sized(nn.Module):
    """Keeps (height, width) in a tensor, as HiDream does, and draws another one at random."""

    def __init__(self, *, drawn: bool = False, given: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.drawn, self.given = drawn, given

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        sizes = torch.tensor([2, 4])
        if self.drawn:
            sizes = torch.randint(1, 3, (2,))
        if self.given:
            sizes = counts
        height, width = sizes[0], sizes[1]
        y = self.linear(x)[:, : height * width]
        shaped: Tensor = y.reshape(x.shape[0], height, width, 6)
        return shaped + height


def _captured(model: nn.Module) -> tuple[torch.fx.GraphModule, tuple[object, ...], Tensor]:
    inputs = {"x": torch.randn(1, 8, 6), "counts": torch.tensor([2, 4])}
    gm, args = capture.capture_call(model.eval(), inputs, {})
    with torch.no_grad():
        return gm, args, model(**inputs)


def test_it_fires_and_the_numbers_agree() -> None:
    gm, args, expected = _captured(Sized())
    result = run_passes(gm, [FoldSizes()])
    assert result.modified
    (output,) = result.graph_module.graph.output_node().all_input_nodes
    assert tuple(output.meta["example_value"].shape) == (1, 2, 4, 6)
    assert not any(str(n.target) == "item" for n in result.graph_module.graph.nodes)
    with torch.no_grad():
        assert distance(result.graph_module(*args)[0], expected) < 1e-6
    assert not run_passes(gm, [FoldSizes()]).modified, "a second run changes nothing"


def test_it_leaves_known_sizes_alone() -> None:
    assert not run_passes(capture_tiny().gm, [FoldSizes()]).modified


def test_what_is_drawn_or_given_stays() -> None:
    for model in (Sized(drawn=True), Sized(given=True)):
        gm, _, _ = _captured(model)
        run_passes(gm, [FoldSizes()])
        (output,) = gm.graph.output_node().all_input_nodes
        assert not all(isinstance(n, int) for n in output.meta["example_value"].shape)


class Listed(nn.Module):
    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        out: Tensor = x + sum(counts.tolist())
        return out


def test_numbers_of_a_list_are_followed() -> None:
    gm, args, expected = _captured(Listed())
    run_passes(gm, [FoldSizes()])
    assert torch.equal(gm(*args)[0], expected)


class Fixing(nn.Module):
    """Asks for the number of rows, and then chooses by it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = x.shape[0]
        h = x.reshape(rows, 8, 6) + t.view(rows, 1, 1)
        if rows == 2:
            h = h + 1
        for block in self.blocks:
            h = h + block(h) + torch.vmap(lambda row: row.sin() * row.mean())(h)
        return h.reshape(rows, 8, 6)


def test_a_batch_that_the_model_fixes() -> None:
    """Its size is a symbol at first; a region that returned it could not be compiled.

    Contexts stay, though nobody uses what begins and ends them.
    """
    model = Fixing().eval()
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    x, t = torch.randn(2, 8, 6), torch.ones(2)
    with torch.no_grad():
        assert torch.equal(cached(x, t), model(x, t))
    (program,) = cached.denoiser.programs
    assert program.inputs.layout.row_symbols == frozenset()
    for part in walk(program.gm):
        for node in part.graph.nodes:
            assert not isinstance(node.meta.get("example_value"), torch.SymInt)
            assert node.target not in ("size", torch.Tensor.size)
