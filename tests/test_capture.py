"""What a call may do beside computing, and be captured all the same."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepass
from tests.models import TOY
from tests.toys.dit import ToyDiT

log = logging.getLogger(__name__)


class Chatty(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log.warning("%d rows", len(x))
        return super().forward(x, t, y)


def test_more_sizes_than_torch_captures() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = cachepass.compile(Blocks().eval(), policy="compute", inner="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for tokens in (3, 4):
            model(torch.randn(1, tokens, 6))
        with pytest.raises(
            cachepass.CaptureError,
            match=r"Blocks was called in as many ways .* captures, 2( \(this torch .* one\))?, and",
        ):
            model(torch.randn(1, 5, 6))


def test_what_a_model_logs_is_left_out() -> None:
    model = Chatty().eval()
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    with torch.no_grad():
        assert torch.equal(cached(**TOY.example()), model(**TOY.example()))


def _halved(part: Tensor) -> None:
    part /= 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "an operator": _halved,
    "a method": lambda part: part.mul_(3),
    "a function": lambda part: torch.relu_(part),
    "an argument": lambda part: nn.functional.relu(part, True),
    "a keyword": lambda part: nn.functional.elu(part, inplace=True),
    "an output": lambda part: torch.sin(part, out=part),
}


class Writing(ToyDiT):
    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x * 1
        self.write(x[:, :2].view(len(x), 2, 8, 8))
        return super().forward(x, t, y)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("lowering", ["regions", "graph"])
def test_what_writes_stays(lowering: Any, how: str) -> None:
    """Nobody uses the result."""
    model = Writing(WRITES[how]).eval()
    cached: Any = cachepass.compile(model, policy="compute", inner="eager", lowering=lowering)
    with torch.no_grad():
        assert torch.equal(cached(**TOY.example()), model(**TOY.example()))


class Hook:
    """Learns at the first call what its module's arguments are called, as diffusers' hooks do."""

    def __init__(self, module: nn.Module, replaced: Callable[..., Tensor]) -> None:
        self.module, self.replaced = module, replaced
        self.names: list[str] = []

    def __call__(self, *args: Any) -> Tensor:
        if not self.names:
            self.names = list(_parameters(self.module))
        return self.replaced(**dict(zip(self.names, args, strict=True)))


def _parameters(module: nn.Module) -> list[str]:
    torch._dynamo.graph_break()
    return list(inspect.signature(type(module).forward).parameters)[1:]


@pytest.mark.parametrize("policy", ["compute", "firstblock"])
def test_hooks_that_learn_at_their_first_call(policy: str) -> None:
    model = TOY.model()
    for block in model.layers:
        hook = Hook(block, block.forward)
        block.forward = functools.partial(Hook.__call__, hook)
    cached: Any = cachepass.compile(model, policy=policy, inner="eager")
    with torch.no_grad():
        assert torch.equal(cached(**TOY.example()), TOY.model()(**TOY.example()))
    assert cachepass.report(cached).to_dict()["stacks"] == {"layers": 3}
