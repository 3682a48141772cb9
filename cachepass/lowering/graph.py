"""lowering="graph": one Inductor program for a whole call, the decision and both arms inside.

Compiled for one signature of inputs at a time, outside of dynamo's tracing context, as
regions are (see there).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cachepass.ir.boundary import layout_of
from cachepass.lowering.conditional import exact_operands
from cachepass.lowering.functional import Entry, Functional, functionalize
from cachepass.lowering.regions import patches_of
from cachepass.lowering.rule import BRANCHES
from cachepass.lowering.shapes import slot_shapes
from cachepass.runtime.frame import Frame
from cachepass.runtime.policy import Policy

Compiled = Callable[..., Any]


class GraphCompiler:
    """Makes drivers of whole graphs; counts what it compiled."""

    def __init__(self, mode: str | None, inner: str) -> None:
        self._patches = patches_of(mode)
        self._eager = inner == "eager"
        self.count = 0
        self.seconds = 0.0

    def __call__(self, gm: fx.GraphModule, args: Sequence[Any], policy: Policy) -> Compiled:
        """The driver for inputs like `args`: called as ``driver(frame, *args)``."""
        started = time.perf_counter()
        mode = FakeTensorMode(shape_env=ShapeEnv())
        with mode, torch.no_grad():
            fakes = [
                mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a
                for a in args
            ]
        inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n.target != "frame"]
        latent_node = layout_of(gm).latent
        assert latent_node is not None
        latent = fakes[inputs.index(latent_node)]
        slots = slot_shapes(gm, fakes, latent.shape[0], mode)
        with mode:
            whole = functionalize(gm, policy, slots, latent)
            # One each: equal objects would be taken for one input.
            numbers = [torch.zeros((), dtype=torch.int64, device=latent.device) for _ in range(3)]
        call: Compiled = whole.gm
        if not self._eager:
            given = [*fakes, *numbers, *(entry.example for entry in whole.state)]
            call = self._inductor(whole.gm, given, mode)
        self.count += 1
        self.seconds += time.perf_counter() - started
        return _driver(call, whole)

    def _inductor(self, gm: fx.GraphModule, given: Sequence[Any], mode: FakeTensorMode) -> Compiled:
        context = torch._guards.TracingContext(mode)
        with torch._guards.tracing(context), torch.no_grad(), exact_operands():
            compiled: Any = compile_fx(gm, list(given), config_patches=self._patches or None)
        return compiled  # type: ignore[no-any-return]


def _driver(call: Compiled, whole: Functional) -> Compiled:
    shared = {entry.name for entry in whole.state if entry.shared}

    def driver(frame: Frame, *args: Any) -> tuple[Any, ...]:
        kept = frame.session.tensors

        def key(name: str) -> tuple[str | None, str]:
            return (None if name in shared else frame.branch, name)

        state = [
            kept[key(e.name)] if key(e.name) in kept else cold(e, _device(args))
            for e in whole.state
        ]
        made = call(*args, *_numbers(frame, _device(args)), *state)
        first, last = whole.results, whole.results + len(whole.sites)
        results, reused, new = made[:first], made[first:last], made[last:]
        for name, value in zip(whole.changed, new, strict=True):
            kept[key(name)] = value
        masks = dict(zip(whole.sites, (mask.tolist() for mask in reused), strict=True))
        frame.reused = [
            frozenset(site for site, rows in masks.items() if rows[row])
            for row in range(frame.rows)
        ]
        return tuple(results)

    return driver


def cold(entry: Entry, device: torch.device) -> Tensor:
    """A tensor of the state before the first call."""
    return torch.zeros(entry.example.shape, dtype=entry.example.dtype, device=device)


def _device(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _numbers(frame: Frame, device: torch.device) -> list[Tensor]:
    """Where a call stands: see `functional.Functional`."""
    steps = frame.session.num_steps
    branch = BRANCHES.index(frame.branch) if frame.branch in BRANCHES else len(BRANCHES) - 1
    numbers = (frame.step, -1 if steps is None else steps, branch)
    return [torch.tensor(n, device=device) for n in numbers]
