"""What every slot of a rewritten graph holds: its shape, learned by running the graph on fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode

from cachepass.ir.boundary import Layout, layout_of
from cachepass.ir.ops import Arm, When


class SlotShapes:
    """A frame (see `ir.ops.Frame`) in which everything is computed, and every write remembered."""

    def __init__(self, layout: Layout, rows: Any) -> None:
        self._layout, self._rows = layout, rows
        self.slots: dict[str, Tensor] = {}
        self.signals: dict[str, int] = {}
        """Number of sums of each signal."""

    def read(self, slot: str, like: Tensor | None) -> Tensor:
        if like is None:
            return self.slots[slot]
        return torch.empty(like.shape, dtype=self._layout.slots[slot].dtype, device=like.device)

    def write(self, slot: str, value: Tensor) -> None:
        self.slots[slot] = value.contiguous()

    def shift(self, newer: str, older: str) -> None:
        if newer in self.slots:
            self.slots[older] = self.slots[newer]

    def weights(self, slot: str, count: int, like: Tensor) -> Tensor:
        return torch.empty(self._rows, count, device=like.device)

    def observe(self, signal: str, slot: str, sums: Tensor) -> None:
        self.signals[signal] = sums.shape[1]

    def decide(self) -> None: ...

    def select(self, site: str, compute: Arm, reuse: Arm, operands: tuple[Any, ...]) -> Any:
        result = compute(self, *operands)
        reuse(self, *operands)  # it may be the only one that reads some slot
        return result

    def guard(self, when: When, arm: Arm, operands: tuple[Any, ...]) -> None:
        arm(self, *operands)


def slot_shapes(
    gm: fx.GraphModule, fakes: Sequence[Any], rows: Any, mode: FakeTensorMode
) -> dict[str, Tensor]:
    """Slot -> a fake of what it holds, for fake inputs.

    Args:
        gm: a rewritten graph.
        fakes: its inputs but for the frame.
        rows: of a call.
        mode: the mode of the fakes.
    """
    layout = layout_of(gm)
    frame = SlotShapes(layout, rows)
    environment = mode.shape_env
    assert environment is not None
    with (
        mode, torch.no_grad(), enable_python_dispatcher(),
        environment.ignore_fresh_unbacked_symbols(),
    ):  # fmt: skip
        # An older value is read before a newer one has moved there: a run for each age.
        for _ in range(2 + max((slot.age for slot in layout.slots.values()), default=0)):
            gm(frame, *fakes)
    return frame.slots
