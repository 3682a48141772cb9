"""What `explain` says of a model, before anything is compiled."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import cachepass
from tests.models import HIDREAM, TINY, TOY, as_tensor
from tests.toys.dit import ToyDiT


def test_a_model_as_text() -> None:
    assert_expected_inline(
        str(cachepass.explain(TOY.model(), TOY.example())),
        """\
ToyDiT: one graph of 94 operations
input x: (1, 3, 8, 8) float32, the latent
input t: (1,) float32, the timestep
input y: (1,) int64
stack layers: 3 blocks (ToyBlock)
timestep embedding: (1, 16) float32
sublayers self-attention: 3
sublayers mlp: 3
site step: skips blocks 0 to 2 of 3
site cfg: skips blocks 0 to 2 of 3
site stack: skips blocks 0 to 2 of 3
site block: skips blocks 0 to 1 of 3
site attention: 3 sublayers
site mlp: 3 sublayers
outside of the blocks (operations): patchify 1, own forward 12, time 3, label 1, out 2""",
    )


def test_shared_attention_is_no_site() -> None:
    tiny = TINY["hunyuan"]
    told = cachepass.explain(tiny.model(), tiny.example()).to_dict()
    assert [(s["name"], s["blocks"]) for s in told["stacks"]] == [
        ("transformer_blocks", 2),
        ("single_transformer_blocks", 2),
    ]
    assert set(told["sites"]) == {"step", "cfg", "stack", "block", "mlp"}
    assert "asks for sublayers of kind self-attention" in told["no_sites"]["attention"]
    assert told["sublayers"]["self-attention"] == {"found": 7, "shared": 7}
    refiner = "context_embedder.token_refiner.refiner_blocks"
    assert told["no_stacks"] == {refiner: "it does not work on the latent"}


def test_experts_are_told() -> None:
    explanation = cachepass.explain(HIDREAM.model(), HIDREAM.example())
    assert "note: the experts of 4 layers run as one" in str(explanation)


def test_nothing_is_computed() -> None:
    with torch.device("meta"):
        model, given = ToyDiT(depth=7), TOY.example()
    told = cachepass.explain(model, given).to_dict()
    assert told["stacks"] == [{"name": "layers", "blocks": 7, "classes": ["ToyBlock"]}]


def test_the_model_is_left_alone() -> None:
    model, given = TOY.model(), TOY.example()
    with torch.no_grad():
        before = as_tensor(model(**given))
        cachepass.explain(model, given)
        assert torch.equal(as_tensor(model(**given)), before)
    assert "_is_torch_compile" not in vars(model)


def test_a_model_without_blocks() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x) + t
            return y

    with pytest.raises(cachepass.CaptureError, match="no stack of repeated blocks"):
        cachepass.explain(Plain(), {"x": torch.randn(1, 3, 8, 8), "t": torch.ones(1)})


class Lazy(ToyDiT):
    """Builds a table in its first call, by what cannot be captured."""

    table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            with torch.device("cpu"):
                self.table = torch.full((1, 3, 8, 8), 0.5)
        return super().forward(x + self.table, t, y)


def test_tables_that_the_first_call_builds() -> None:
    model, given = Lazy().eval(), TOY.example()
    with torch.no_grad():
        expected = Lazy.forward(model, **given)
    model.table = None
    assert cachepass.explain(model, given).to_dict()["stacks"][0]["blocks"] == 3
    model.table = None
    cached = cachepass.compile(model, policy="compute", inner="eager")
    assert torch.equal(cached(**given), expected)
    assert cachepass.report(cached).to_dict()["compiles"]["graphs"] == 1
