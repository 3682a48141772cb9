from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepass
from cachepass.errors import PolicyError
from cachepass.ir.boundary import Kind, layout_of, place_of
from cachepass.passes import MarkBoundaries
from tests.graphs import capture
from tests.models import TINY, TOY, WAN, Tiny
from tests.toys.dit import ToyDiT

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

EXPECTED: dict[str, tuple[dict[str, int], str, str]] = {
    "wan": ({"blocks": 4}, "hidden_states", "timestep"),
    "cogvideox": ({"transformer_blocks": 2}, "hidden_states", "timestep"),
    "flux": (
        {"transformer_blocks": 2, "single_transformer_blocks": 2},
        "hidden_states",
        "timestep",
    ),
    "hunyuan": (
        {"transformer_blocks": 2, "single_transformer_blocks": 2},
        "hidden_states",
        "timestep",
    ),
    "ltx": ({"transformer_blocks": 2}, "hidden_states", "timestep"),
    "mochi": ({"transformer_blocks": 2}, "hidden_states", "timestep"),
    "toy": ({"layers": 3}, "x", "t"),
}


@pytest.mark.parametrize("name", TINY)
def test_stacks_and_inputs(name: str) -> None:
    captured = capture(TINY[name])
    layout = layout_of(captured.run(MarkBoundaries()))
    stacks, latent, timestep = EXPECTED[name]
    assert layout.stacks == stacks
    assert layout.inputs[latent] is layout.latent
    assert layout.inputs[timestep] is layout.timestep
    assert captured.matches()
    assert all(place_of(s.residual) for s in layout.sublayers)


def test_sublayers_of_wan() -> None:
    layout = layout_of(capture(WAN).run(MarkBoundaries()))
    kinds = [(s.block, s.name, s.kind) for s in layout.sublayers]
    assert kinds == [
        (block, name, kind)
        for block in range(4)
        for name, kind in (
            ("attn1", Kind.SELF_ATTENTION),
            ("attn2", Kind.CROSS_ATTENTION),
            ("ffn", Kind.MLP),
        )
    ]
    assert layout.timestep_embedding is not None
    assert layout.patches is not None


@pytest.mark.parametrize("name", ["cogvideox", "flux", "hunyuan"])
def test_attention_that_streams_share_is_found_and_not_skippable(name: str) -> None:
    tiny = TINY[name]
    layout = layout_of(capture(tiny).run(MarkBoundaries()))
    shared = [s for s in layout.sublayers if s.kind is Kind.SELF_ATTENTION]
    assert {s.block for s in shared} == set(range(tiny.blocks))
    assert not any(s.nodes for s in shared)
    # Where text and image run as one, each has its slice of the sum.
    assert {s.block for s in shared if s.cut is not None} == (
        set() if name == "cogvideox" else {2, 3}
    )
    with pytest.raises(PolicyError, match=r"kind self-attention, .*; this model offers mlp"):
        capture(tiny).run(*capture(tiny).pipeline(cachepass.Schedule(reuse={1: "attention"})))


def test_marked_graphs_are_left_alone() -> None:
    captured = capture()
    gm = captured.run(MarkBoundaries())
    result = MarkBoundaries()(gm)
    assert not result.modified
    assert result.graph_module is gm


def _halved() -> nn.Module:
    """The first block takes half of the tokens, by a hook; the last one gives all."""
    model = ToyDiT()
    first, last = model.layers[0].forward, model.layers[2].forward

    def take(tokens: Tensor, c: Tensor) -> Tensor:
        half: Tensor = first(tokens.chunk(2, dim=1)[1], c)
        return half

    def give(tokens: Tensor, c: Tensor) -> Tensor:
        half = last(tokens, c)
        return torch.cat([half, half], dim=1)

    model.layers[0].forward, model.layers[2].forward = take, give
    return model.eval()


def test_a_share_of_the_tokens_is_taken_before_the_first_block() -> None:
    halved = Tiny(_halved, TOY.inputs, blocks=3)
    captured = capture(halved)
    gm = captured.run(MarkBoundaries())
    splits = [n for n in gm.graph.nodes if n.target == "chunk"]
    assert [place_of(n) is None for n in splits] == [True, False, False, False]  # modulation
    policy = cachepass.FirstBlock()
    captured = capture(halved)
    captured.run(*captured.pipeline(policy))
    assert captured.matches(policy)


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.net(x) * timestep
        return out


class NoLatent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * timestep


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (NoBlocks(), (1, 2, 4), r"no stack of repeated blocks: .*found \{'net': "),
        (NoLatent(), (4,), r"no latent among the model's arguments: .*'timestep', 'x'"),
    ],
)
def test_models_that_offer_nothing(model: Any, shape: tuple[int, ...], message: str) -> None:
    cached = cachepass.compile(model.eval(), policy="compute", inner="eager")
    with pytest.raises(cachepass.CaptureError, match=message):
        cached(torch.randn(shape), torch.ones(1))


def test_layout_is_asked_for_in_order() -> None:
    with pytest.raises(LookupError, match="run MarkBoundaries first"):
        layout_of(capture(TOY).gm)
