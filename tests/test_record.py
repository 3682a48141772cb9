"""Models that choose by data: recorded as they run, and captured anew for another choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.arguments import values_of
from cachepass.ir.graph import memory_of
from cachepass.record import record
from tests.models import TINY, TOY, as_tensor, distance
from tests.toys.dit import ToyDiT


class Choosing(ToyDiT):
    """Asks Python whether labels are high, and drops what a mask says."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if (y > 5).all():
            x = 2 * x
        kept = torch.cat([t, t + 1, y.float()])
        kept = kept[kept > 0.5]
        return super().forward(x + kept.sum(), t, y)


class Leaving(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if y.numpy().sum() > 5:
            x = 2 * x
        return super().forward(x, t, y)


class Random(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if y.sum() > 0:
            x = x + torch.randn_like(x)
        return super().forward(x, t, y)


def _given(label: int, seed: int = 1) -> dict[str, Any]:
    return TOY.example(seed) | {"y": torch.tensor([label])}


def _cached(model: Any, policy: Any = "compute") -> Any:
    return cachepass.compile(model, policy=policy, inner="eager")


def test_each_choice_is_captured_once() -> None:
    torch.manual_seed(0)
    model = Choosing().eval()
    cached = _cached(model)
    for label, graphs in ((3, 1), (4, 1), (7, 2), (3, 2), (8, 2)):
        with torch.no_grad():
            expected = model(**_given(label, seed=label))
        assert torch.equal(cached(**_given(label, seed=label)), expected)
        assert cachepass.report(cached).to_dict()["compiles"]["graphs"] == graphs
    assert "the call chooses by data, so it was recorded" in str(cachepass.report(cached))


class Halves(ToyDiT):
    """Buffers that are parts of one tensor, as `t` and `y` may be of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.ones(2).unbind()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if y.sum() > 0:
            x = x * self.a + self.b
        return super().forward(x, t, y)


def test_fakes_share_memory_where_tensors_do() -> None:
    given = TOY.example() | dict(zip("ty", torch.tensor([[1], [2]]).unbind(), strict=True))
    nodes = record(Halves().eval(), (), given).gm.graph.find_nodes(op="placeholder")
    memory = {node.meta["argument"]: memory_of(node) for node in nodes}
    assert memory["t"] == memory["y"] != memory["x"]
    assert memory["a"] == memory["b"] != memory["t"]


class Rotating(ToyDiT):
    """Takes pairs of values for complex numbers, as rotary embeddings do."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if y.sum() > 0:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j
            x = torch.view_as_real(pairs).flatten(-2)
        return super().forward(x, t, y)


def test_complex_views() -> None:
    given = _given(3)
    model = Rotating().eval()
    with torch.no_grad():
        assert torch.equal(_cached(model)(**given), model(**given))


def test_policies_skip_what_was_recorded() -> None:
    torch.manual_seed(0)
    model = Choosing().eval()
    cached = _cached(model, cachepass.Schedule(reuse={1: "step", 3: "stack"}))
    with cachepass.session(cached, num_inference_steps=4) as session:
        found = []
        for step in range(4):
            with session.at(step=step):
                found.append(cached(**_given(3, seed=step)))
    with torch.no_grad():
        expected = [model(**_given(3, seed=step)) for step in range(4)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[0]), "reused"
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(found[3], expected[3])


def test_weights_and_their_changes() -> None:
    model = Choosing().eval()
    cached = _cached(model)
    before = cached(**_given(3))
    with torch.no_grad():
        first, second, *_ = [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
        first.weight.mul_(1.5)
        second.weight = torch.nn.Parameter(second.weight * 2)
        expected = model(**_given(3))
    assert torch.equal(cached(**_given(3)), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "mochi"])
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.filterwarnings("ignore:CPU Autocast only supports:UserWarning")
def test_a_recording_is_the_model(name: str) -> None:
    tiny = TINY[name]
    model, first = tiny.model(), tiny.example(1)
    second = first | {"hidden_states": tiny.example(2)["hidden_states"]}
    recording = record(model, (), first)
    values = values_of(tuple(second), (), second)
    tensors = recording.arguments(values)
    assert recording.holds(tensors)
    with torch.no_grad():
        found = as_tensor(recording.returned(recording.gm(*tensors), values))
        assert torch.equal(found, as_tensor(model(**second)))


@pytest.mark.parametrize("lowering", ["regions", "graph"])
def test_compiled(lowering: Any) -> None:
    torch.manual_seed(0)
    model = Choosing().eval()
    cached: Any = cachepass.compile(model, policy="compute", lowering=lowering)
    with torch.no_grad():
        assert distance(cached(**_given(3)), model(**_given(3))) < 1e-5


class Memory:
    """What a prompt's tokens became, as some models are handed it for a request."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor | None]] = [{"kept": None}]
        self.used = 0


class Remembering(Choosing):
    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, memory: Memory
    ) -> Tensor:
        (layer,) = memory.layers
        kept = layer["kept"]
        if kept is None:
            kept = layer["kept"] = y.float().repeat_interleave(y.clamp(max=4)).sum().sin()
        memory.used = 1
        return super().forward(x * kept, t, y)


def test_objects_are_read_and_written() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    cached = _cached(model)
    for label in (3, 4, 3):
        mine, theirs = Memory(), Memory()
        for step in range(3):
            given = _given(label, seed=step)
            with torch.no_grad():
                expected = model(**given, memory=theirs)
            assert torch.equal(cached(**given, memory=mine), expected)
            kept, wanted = mine.layers[0]["kept"], theirs.layers[0]["kept"]
            assert kept is not None
            assert wanted is not None
            assert torch.equal(kept, wanted)
            assert mine.used == 1
    # One that fills the memory for each number of repetitions, and one that finds it filled.
    assert cachepass.report(cached).to_dict()["compiles"]["graphs"] == 3


class Accumulating(Choosing):
    """Adds up what it was given, so that a call made twice would show."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, memory: Memory
    ) -> Tensor:
        before = memory.layers[0]["kept"]
        memory.layers[0]["kept"] = x.mean() if before is None else before + x.mean()
        return super().forward(x if before is None else x + before, t, y)


def test_what_a_call_stores_it_stores_once() -> None:
    torch.manual_seed(0)
    model = Accumulating().eval()
    cached, mine, theirs = _cached(model), Memory(), Memory()
    for step in range(4):
        with torch.no_grad():
            expected = model(**_given(3, seed=step), memory=theirs)
        assert torch.equal(cached(**_given(3, seed=step), memory=mine), expected)


class Hinted(Choosing):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, hints: Any = None) -> Tensor:
        if hints is not None:
            x = 3 * x
        for scale, hint in enumerate(hints or ()):
            x = x + scale * hint
        return super().forward(x, t, y)


def test_calls_of_another_structure_are_captured_anew() -> None:
    torch.manual_seed(0)
    model = Hinted().eval()
    cached = _cached(model)
    one, other = torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 2.0)
    for hints in ([], None, [one], (one,), [one, one], [one, other], [other, other]):
        with torch.no_grad():
            expected = model(**_given(3), hints=hints)
        assert torch.equal(cached(**_given(3), hints=hints), expected)


class Slotted:
    __slots__ = ("kept",)

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def __call__(self) -> Any:
        return self.kept


class Asking(Choosing):
    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, source: Slotted
    ) -> Tensor:
        return super().forward(x * source().sum().item().__int__(), t, y)


def test_objects_of_every_build_are_opened() -> None:
    torch.manual_seed(0)
    model = Asking().eval()
    cached = _cached(model)
    for number in (1, 2, 1):
        source = Slotted(torch.tensor([number, 0]))
        with torch.no_grad():
            expected = model(**_given(3), source=source)
        assert torch.equal(cached(**_given(3), source=source), expected)


def test_what_nobody_can_look_into_is_refused() -> None:
    given = _given(3) | {"hints": torch.ones(2).numpy()}
    with pytest.raises(
        cachepass.CaptureError, match=r"hints is a ndarray: .* Give the model tensors"
    ):
        record(Hinted().eval(), (), given)


class Growing(Choosing):
    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, memory: Memory
    ) -> Tensor:
        memory.layers.append({"kept": None})
        return super().forward(x, t, y)


def test_objects_that_change_their_build_are_refused() -> None:
    with pytest.raises(cachepass.CaptureError, match="changes how an object is built"):
        record(Growing().eval(), (), _given(3) | {"memory": Memory()})


def test_explain() -> None:
    told = cachepass.explain(Choosing().eval(), _given(3)).to_dict()
    assert told["stacks"] == [{"name": "layers", "blocks": 3, "classes": ["ToyBlock"]}]
    assert told["inputs"]["x"][0] == "latent"


@pytest.mark.parametrize(("kind", "line"), [(Leaving, "if y.numpy()"), (Random, "if y.sum")])
def test_what_cannot_be_recorded_names_its_line(kind: type[ToyDiT], line: str) -> None:
    """The error is dynamo's, which has a line and a reason."""
    with pytest.raises(cachepass.CaptureError, match=r"test_record.py:\d+ in forward ") as told:
        _cached(kind().eval())(**_given(3))
    assert f"(`{line}" in str(told.value)
