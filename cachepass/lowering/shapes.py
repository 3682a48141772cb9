"""Shapes, learned on fakes: of a graph's inputs, and of what every slot holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from cachepass.ir.boundary import Layout, call_inputs, layout_of
from cachepass.ir.ops import COUNT, Arm, Carried, When
from cachepass.runtime.batch import shape_of_one
from cachepass.runtime.plan import Plan, SlotPlan
from cachepass.runtime.storage import Storage


def fake_inputs(
    args: Sequence[Any], ways: Sequence[int | str | None] | None = None, rows: int = 1
) -> tuple[FakeTensorMode, list[Any]]:
    """Fakes of a call's inputs, and their mode.

    Args:
        args: the inputs.
        ways: how each carries rows (see `ir.ops.Carried`): their number is a symbol then. None
            for fixed shapes.
        rows: how many there are.
    """
    # Inductor's cache of graphs works under a shape environment only, even an empty one.
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True))
    count: Any = rows

    def fake(value: Any, way: int | str | None) -> Any:
        nonlocal count
        if not isinstance(value, Tensor):
            return value // rows * count if way == COUNT else value
        if not isinstance(way, int):
            return mode.from_tensor(value, static_shapes=True)
        sizes = [DimDynamic.STATIC] * value.ndim
        sizes[way] = DimDynamic.DUCK
        # Equal sizes get one symbol: there are no others than those of rows.
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        made = mode.from_tensor(value, symbolic_context=context, source=ConstantSource("rows"))
        count = made.shape[way]
        return made

    with mode, torch.no_grad():
        if ways is None:
            return mode, [fake(value, None) for value in args]
        pairs = list(zip(args, ways, strict=True))
        tensors = {i: fake(v, way) for i, (v, way) in enumerate(pairs) if isinstance(v, Tensor)}
        return mode, [
            tensors[i] if i in tensors else fake(value, way) for i, (value, way) in enumerate(pairs)
        ]


def latent_in(gm: fx.GraphModule, inputs: Sequence[Any]) -> Tensor:
    """The latent among a call's inputs, rows in front."""
    layout = layout_of(gm)
    assert layout.latent is not None
    found: Tensor = inputs[call_inputs(gm).index(layout.latent)]
    return found[None] if layout.listed else found


class SlotShapes:
    """A frame (see `ir.ops.Frame`) in which everything is computed, and every write remembered."""

    def __init__(self, layout: Layout, rows: Any) -> None:
        self._layout, self._rows = layout, rows
        self.slots: dict[str, Tensor] = {}
        self.moves: list[tuple[str, str]] = []
        """(newer, older): the newer one may not be written yet."""

    def read(self, slot: str, like: Tensor | None) -> Tensor:
        if like is None:
            return self.slots[slot]
        return torch.empty(like.shape, dtype=self._layout.slots[slot].dtype, device=like.device)

    def write(self, slot: str, value: Tensor) -> None:
        self.slots[slot] = _like(value)

    def shift(self, newer: str, older: str) -> None:
        self.moves.append((newer, older))

    def weights(self, slot: str, count: int, like: Tensor) -> Tensor:
        return torch.empty(self._rows, count, device=like.device)

    def observe(self, signal: str, slot: str, sums: Tensor) -> None: ...

    def decide(self) -> None: ...

    def select(
        self, site: str, compute: Arm, reuse: Arm, operands: tuple[Any, ...], carried: Carried
    ) -> Any:
        result = compute(self, *operands)
        reuse(self, *operands)  # it may be the only one that reads some slot
        return result

    def guard(self, when: When, arm: Arm, operands: tuple[Any, ...]) -> None:
        arm(self, *operands)


def slot_shapes(
    gm: fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode
) -> dict[str, Tensor]:
    """Slot -> a fake of what it holds, for fake inputs.

    Args:
        gm: a rewritten graph.
        fakes: its inputs but for the frame.
        mode: the mode of the fakes.
    """
    frame = SlotShapes(layout_of(gm), latent_in(gm, fakes).shape[0])
    environment = mode.shape_env
    assert environment is not None
    with (
        mode, torch.no_grad(), enable_python_dispatcher(),
        environment.ignore_fresh_unbacked_symbols(),
    ):  # fmt: skip
        gm(frame, *fakes)
        for newer, older in reversed(frame.moves):  # what is newer comes to be known first
            frame.slots[older] = _like(frame.slots[newer])
    return frame.slots


def plan_of(gm: fx.GraphModule, args: Sequence[Any], storage: Storage, policy: str) -> Plan:
    """What the slots of a rewritten graph hold for one row of a call with these inputs."""
    declared = layout_of(gm).slots
    mode, fakes = fake_inputs(args)
    rows = latent_in(gm, fakes).shape[0]
    return Plan(
        policy,
        tuple(
            SlotPlan(
                name=name,
                site=declared[name].site,
                shape=shape_of_one(value.shape, declared[name].rows, rows),
                dtype=storage.dtype_of(declared[name], value.dtype),
                across_branches=declared[name].across_branches,
                scaled=storage.scales(declared[name], value.dtype),
            )
            for name, value in slot_shapes(gm, fakes, mode).items()
        ),
    )


def _like(value: Tensor) -> Tensor:
    """Contiguous, and no other slot's memory: two inputs that share it would be taken for one."""
    return torch.empty_like(value, memory_format=torch.contiguous_format)
