from __future__ import annotations

import dataclasses
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
from tests.toys.dit import ToyBlock, ToyDiT

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


@pytest.mark.parametrize(
    "name", ["cogvideox", "flux", pytest.param("hunyuan", marks=pytest.mark.full)]
)
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


class Variant(ToyBlock):
    """A block that goes on from its stream in another way than by sums alone."""

    def __init__(self, way: str) -> None:
        super().__init__(16)
        self.way = way

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
        out: Tensor = self.proj(h.flatten(-2))
        return out

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.way == "norms behind the sums":
            x = self.norm1(x + self.attention(x))
            out: Tensor = self.norm2(x + self.mlp(x))
            return out
        if self.way == "masks":
            mask = c.mean(-1)[:, None]
            x = (x + self.attention(self.norm1(x))) * mask[..., None]
            return torch.mul(x + self.mlp(self.norm2(x)), mask[..., None])
        if self.way == "parts":
            x = x + self.attention(self.norm1(x))
            before, x = x.split([4, 12], dim=1)
            x = x + self.mlp(self.norm2(x))
            return torch.cat([before, x], dim=1)
        if self.way == "no batch":
            x = x.flatten(0, -2)
        elif self.way == "a projection first":
            x = self.proj(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Variants(ToyDiT):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Variant(way) for _ in range(3))
        if way == "no batch":
            self.out = nn.Sequential(nn.Unflatten(0, (1, -1)), self.out)


WAYS = ("sums", "norms behind the sums", "masks", "parts", "no batch", "a projection first")


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_a_stream_through_a_block(way: str) -> None:
    captured = capture(dataclasses.replace(TOY, build=lambda: Variants(way)))
    layout = layout_of(captured.run(MarkBoundaries()))
    found = [(s.block, s.kind, bool(s.nodes)) for s in layout.sublayers]
    assert found == [
        (block, kind, True) for block in range(3) for kind in (Kind.SELF_ATTENTION, Kind.MLP)
    ]


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
