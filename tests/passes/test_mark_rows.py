"""Which values carry rows is read off the graph, not off sizes that happen to be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import cachepass
from cachepass.ir import ops
from cachepass.ir.boundary import layout_of
from cachepass.ir.graph import walk
from cachepass.passes import MarkRows
from cachepass.runtime.inputs import Inputs
from tests.graphs import capture
from tests.models import TINY, TOY, Tiny, as_tensor, distance
from tests.requests import decisions

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

ROWS = 3


def _captured(tiny: Tiny, rows: int = ROWS, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A compiled model after a call of several rows, and that call."""
    cached = cachepass.compile(
        tiny.model(), policy=cachepass.Schedule(reuse={1: "stack"}), inner="eager"
    )
    inputs = {
        name: torch.cat([value] * rows) if isinstance(value, Tensor) and len(value) == 1 else value
        for name, value in tiny.example().items()
    } | more
    cached(**inputs)
    return cached, inputs


def _carried(cached: Any) -> dict[str, int | str | None]:
    (program,) = cached.denoiser.programs
    inputs: Inputs = program.inputs
    assert inputs.carried is not None
    names = {node.name: name for name, node in inputs.layout.inputs.items()}
    nodes = [n for n in program.gm.graph.find_nodes(op="placeholder") if n.target != "frame"]
    return {
        names[node.name]: way
        for node, way in zip(nodes, inputs.carried, strict=True)
        if node.name in names
    }


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx", "toy"])
def test_inputs_that_carry_rows(name: str) -> None:
    """A mask that is only broadcast (LTX) as well."""
    cached, _ = _captured(TOY if name == "toy" else TINY[name])
    assert set(_carried(cached).values()) == {0}
    for part in walk(cached.denoiser.programs[0].gm):
        for node in part.graph.find_nodes(op="call_function", target=ops.conditional):
            assert node.args[-1] is not None, "row by row"


def test_sizes_that_happen_to_be_equal() -> None:
    """Flux is given places of its tokens: as many as there are rows here."""
    tiny = TINY["flux"]
    rows = len(tiny.example()["img_ids"])
    cached, inputs = _captured(tiny, rows)
    assert _carried(cached) == {
        name: None if name in ("img_ids", "txt_ids") else 0
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def test_one_row_has_no_symbol() -> None:
    captured = capture()
    gm = captured.run(*captured.pipeline(cachepass.Compute())[:4])
    assert layout_of(gm).row_symbols == frozenset()
    assert layout_of(gm).batch == 1
    assert not MarkRows()(gm).modified


def test_a_batch_that_the_model_fixes() -> None:
    cached, _ = _captured(TINY["mochi"])
    (program,) = cached.denoiser.programs
    assert program.inputs.layout.row_symbols == frozenset()
    assert program.inputs.carried is None
    assert "row by row" not in cachepass.ir.printer.format_graph(program.gm)


def test_running_it_again_changes_nothing() -> None:
    cached, _ = _captured(TOY)
    (program,) = cached.denoiser.programs
    before = program.inputs.layout.row_symbols
    MarkRows()(program.gm)
    assert layout_of(program.gm).row_symbols == before != frozenset()


class Transposed(nn.Module):
    """Works on (tokens, rows, width): rows do not lie in front."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = (x + t[:, None, None]).transpose(0, 1).contiguous()
        for block in self.blocks:
            h = h + block(h)
        return h.transpose(0, 1)


def _compiled(model: nn.Module, policy: cachepass.NamedPolicy) -> Any:
    torch.manual_seed(0)
    return cachepass.compile(model.eval(), policy=policy, inner="eager")


def test_rows_along_another_dimension() -> None:
    torch.manual_seed(0)
    model = Transposed()
    cached = _compiled(model, cachepass.Schedule(reuse={1: "stack"}))
    a, b = (cachepass.session(cached, num_inference_steps=4) for _ in range(2))
    x, t = torch.randn(2, 5, 6), torch.tensor([1.0, 0.5])
    with a.at(step=0):
        cached(x[:1], t[:1])
    kept = [k.value for k in a.slots.values()]
    assert {tuple(v.shape) for v in kept} == {(5, 1, 6)}
    with cachepass.rows(cached, [a.row(step=1, branch="cond"), b.row(step=2, branch="cond")]):
        out = as_tensor(cached(x, t))
    with torch.no_grad():
        assert distance(out, model(x, t)) < 1e-6  # the residual is that of the same input
    slots = cached.denoiser.programs[-1].inputs.layout.slots.values()
    assert {slot.rows for slot in slots} == {1}


@pytest.mark.parametrize(
    "policy",
    [
        cachepass.Schedule(reuse={2: "stack", 3: "stack"}),
        cachepass.FirstBlock(threshold=0.2, warmup_steps=0),
        cachepass.TaylorSeer(site="stack", interval=2, warmup_steps=1),
        cachepass.DiCache(threshold=0.4, warmup_steps=1),
        cachepass.AdaCache(codebook=((0.2, 3), (1.0, 1)), motion=False),
    ],
    ids=lambda p: p.name,
)
def test_rows_elsewhere_are_measured_and_weighed(policy: cachepass.NamedPolicy) -> None:
    """Each does what it does alone."""
    torch.manual_seed(0)
    cached = _compiled(Transposed(), policy)
    together, alone = (
        [cachepass.session(cached, num_inference_steps=6) for _ in range(2)] for _ in range(2)
    )
    x, drift = torch.randn(2, 5, 6), torch.randn(2, 5, 6) * torch.tensor([0.02, 0.5])[:, None, None]
    outputs: list[list[Tensor]] = [[], []]
    for call in range(6):  # the second request starts two calls later
        running = [0, 1][: 1 + (call >= 2)]
        steps = [call - 2 * i for i in running]
        given = torch.stack([x[i] + steps[i] * drift[i] for i in running])
        times = torch.tensor([1.0 - step / 6 for step in steps])
        for sessions, groups in ((together, [running]), (alone, [[i] for i in running])):
            for group in groups:
                rows = [sessions[i].row(step=steps[i], branch="cond") for i in group]
                with cachepass.rows(cached, rows):
                    made = as_tensor(cached(given[group], times[group]))
                for i, output in zip(group, made.split(1), strict=True):
                    outputs[i].append(output)
    for i in range(2):
        for ours, theirs in zip(outputs[i][::2], outputs[i][1::2], strict=True):
            assert distance(ours, theirs) < 1e-5
        assert decisions(together[i]) == decisions(alone[i])
    assert any(names for _, _, names in decisions(together[0]))
    slots = cached.denoiser.programs[-1].inputs.layout.slots.values()
    assert 1 in {slot.rows for slot in slots}


class Repeated(Transposed):
    """Works on the batch twice over: a multiple of the rows, whose parts lie apart."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = (x + t[:, None, None]).repeat(2, 1, 1)
        for block in self.blocks:
            h = h + block(h)
        first, second = h.chunk(2)
        return first + second


def test_rows_that_cannot_be_told_apart() -> None:
    cached = _compiled(Repeated(), cachepass.Schedule(reuse={1: "stack"}))
    sessions = [cachepass.session(cached, num_inference_steps=4) for _ in range(2)]
    x, t = torch.randn(2, 5, 6), torch.tensor([1.0, 0.5])
    with (
        pytest.raises(cachepass.SessionError, match=r"row may lie apart: .*, and `repeat` may"),
        cachepass.rows(cached, sessions),
    ):
        cached(x, t)
    with torch.no_grad():  # of one request they may be
        expected = cached._orig_mod(x, t)
    for step in range(2):
        with sessions[0].at(step=step):
            assert distance(as_tensor(cached(x, t)), expected) < 1e-6


# ----------------------------------------------------------------------- folded axes

TABLE = torch.randn(4, 5, 6)


@torch.library.custom_op("cachepass_tests::of_a_library", mutates_args=())
def _of_a_library(x: Tensor) -> Tensor:
    out: Tensor = x.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1).contiguous()
    return out


@_of_a_library.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _multiples(forward: Callable[[Tensor], Tensor]) -> set[str]:
    """Which sizes are found to have each row's parts side by side; the number of rows is B."""

    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = forward(x + t[:, None, None, None])
            for block in self.blocks:
                h = h + block(h)
            return h.view(x.shape)

    cached = _compiled(Folding(), cachepass.Schedule(reuse={1: "stack"}))
    cached(torch.randn(3, 4, 5, 6), torch.ones(3))
    layout = cached.denoiser.programs[0].inputs.layout
    (rows,) = map(str, layout.row_symbols)
    return {str(size).replace(rows, "B") for size in layout.row_multiples}


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda x: x.flatten(0, 1), {"4*B"}),
        (lambda x: x.reshape(-1, 6), {"20*B"}),
        (lambda x: x.transpose(1, 2).reshape(-1, 4, 6), {"5*B"}),
        (lambda x: x.flatten(0, 1).unflatten(0, (-1, 4)).transpose(1, 2).reshape(-1, 4, 6),
         {"4*B", "5*B"}),
        (lambda x: x.flatten(0, 1) + x[:, 0].repeat_interleave(4, 0), {"4*B"}),
        (lambda x: x.flatten(0, 1) + x[:, :1].expand(-1, 4, -1, -1).flatten(0, 1), {"4*B"}),
        # What every row gets alike, or what is looked up within a row.
        (lambda x: x.flatten(0, 1) + torch.zeros(x.shape[0] * 4, 1, 6), {"4*B"}),
        (lambda x: x.flatten(0, 1) + TABLE.repeat(x.shape[0], 1, 1), {"4*B"}),
        (lambda x: x.flatten(0, 1) + TABLE[:1].expand(x.shape[0] * 4, -1, -1), {"4*B"}),
        (lambda x: x.flatten(0, 1)[:, [4, 3, 2, 1, 0]], {"4*B"}),
        # A row's parts lie apart, be it in one place alone; or nobody can say.
        (lambda x: x.transpose(0, 1).flatten(0, 1), set()),
        (lambda x: x.flatten(0, 1) + x[:, 0].repeat(4, 1, 1), set()),
        (lambda x: x.flatten(0, 1) + torch.cat([*x.unbind(1)]), set()),
        (lambda x: x.transpose(0, 1).flatten(0, 1).reshape(-1, 6), set()),
        (lambda x: x.flatten(0, 1) + TABLE.repeat_interleave(x.shape[0], 0), set()),
        (lambda x: x.flatten(0, 1).flip(0), set()),
        (lambda x: x.flatten(0, 1).roll(1, 0), set()),
        (lambda x: x.flatten(0, 1)[x.flatten(0, 1).mean((1, 2)).argsort()], set()),
        (lambda x: x.flatten(0, 1).index_select(0, torch.arange(4 * x.shape[0])), set()),
        (lambda x: x.flatten(0, 1).view(4, -1, 5, 6).transpose(0, 1).reshape(-1, 5, 6), set()),
        (lambda x: _of_a_library(x.flatten(0, 1)), set()),
    ],
)  # fmt: skip
def test_multiples_of_rows(forward: Callable[[Tensor], Tensor], found: set[str]) -> None:
    assert _multiples(forward) == found


class Indexed(nn.Module):
    """Shuffles the tokens of all rows in its blocks, by an index that is made before them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shuffling() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows, tokens = x.shape[:2]
        within = torch.tensor([2, 0, 1, 4, 3])
        index = (torch.arange(rows)[:, None] * tokens + within).reshape(-1)
        h = x + t[:, None, None]
        for block in self.blocks:
            h = block(h, index)
        return h


class IndexedAside(Indexed):
    """Its rows do not lie in front, and what is selected between is theirs all the same."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, rows = x.shape[1], x.shape[0]
        index = torch.arange(tokens)[:, None] * rows + torch.arange(rows)
        h = (x + t[:, None, None]).transpose(0, 1).contiguous()
        for block in self.blocks:
            h = block(h, index.flatten())
        return h.transpose(0, 1)


class Shuffling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h: Tensor, index: Tensor) -> Tensor:
        shuffled = h.reshape(-1, 6)[index].view(h.shape)
        return h + torch.tanh(self.linear(shuffled))


@pytest.mark.parametrize("kind", [Indexed, IndexedAside])
def test_numbers_of_all_rows_are_not_gathered(kind: type[nn.Module]) -> None:
    """They would point to places that some of the rows do not have: all rows are computed."""
    torch.manual_seed(0)
    model = kind()
    cached = _compiled(model, cachepass.Schedule(reuse={1: "stack"}))
    x, t = torch.randn(2, 5, 6), torch.tensor([1.0, 0.5])
    a, b = (cachepass.session(cached, num_inference_steps=4) for _ in range(2))
    with torch.no_grad():
        want = model(x, t)
    for steps in ((0, 2), (1, 3)):  # the first request reuses in the second call
        with cachepass.rows(cached, [s.row(step=i) for s, i in zip((a, b), steps, strict=True)]):
            out = as_tensor(cached(x, t))
        assert distance(out, want) < 1e-6
    assert [names for _, _, names in decisions(a)] == [[], ["stack"]]


class Fixing(Transposed):
    """Chooses by the number of rows, which makes it one that is fixed."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] == 2 else -x, t)


@pytest.mark.parametrize("lowering", ["graph", "regions"])
def test_rows_elsewhere_in_a_batch_of_one_size(lowering: Literal["graph", "regions"]) -> None:
    model = Fixing() if lowering == "regions" else Transposed()
    policy = cachepass.AdaCache(codebook=((0.2, 3), (1.0, 1)), motion=False)
    cached: Any = cachepass.compile(model.eval(), policy=policy, inner="eager", lowering=lowering)
    for tokens in (4, 5):
        with pytest.raises(
            cachepass.PolicyError, match=rf"\({tokens}, 2, 6\) is to be kept.*in front"
        ):
            cached(torch.randn(2, tokens, 6), torch.tensor([1.0, 0.5]))
