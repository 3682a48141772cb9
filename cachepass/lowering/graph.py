"""lowering="graph": one Inductor program for a whole call, the decision and both arms inside.

Compiled for one signature of inputs at a time, outside of dynamo's tracing context, as
regions are (see there).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode

from cachepass.errors import SessionError
from cachepass.ir.boundary import call_inputs
from cachepass.lowering.compiler import patches_of
from cachepass.lowering.conditional import exact_operands
from cachepass.lowering.functional import Functional, functionalize
from cachepass.lowering.rule import where_it_stands
from cachepass.lowering.shapes import fake_inputs, latent_in, slot_shapes
from cachepass.lowering.share import share_regions
from cachepass.runtime.frame import Frame
from cachepass.runtime.policy import Policy
from cachepass.runtime.program import Driver

Compiled = Callable[..., Any]


class GraphCompiler:
    """Makes drivers of whole graphs; counts what it compiled."""

    def __init__(self, mode: str | None, inner: str) -> None:
        self._patches = patches_of(mode)
        self._eager = inner == "eager"
        self.count = 0
        self.seconds = 0.0

    def __call__(self, gm: fx.GraphModule, args: Sequence[Any], policy: Policy) -> Driver:
        """The driver for inputs like `args`."""
        started = time.perf_counter()
        mode, fakes = fake_inputs(args)
        latent = latent_in(gm, fakes)
        slots = slot_shapes(gm, fakes, mode)
        with mode:
            shared = () if self._eager else share_regions(gm)
            named = zip(call_inputs(gm), fakes, strict=True)
            fixed = {node.name: value for node, value in named if isinstance(value, int)}
            whole = functionalize(gm, policy, slots, latent, shared=shared, numbers=fixed)
            # One each: equal objects would be taken for one input.
            numbers = [latent.new_zeros((), dtype=torch.int64) for _ in range(3)]
        call: Compiled = whole.gm
        if not self._eager:
            given = [*fakes, *numbers, *(entry.example for entry in whole.state)]
            call = self._inductor(whole.gm, given, mode)
        self.count += 1
        self.seconds += time.perf_counter() - started
        return _driver(call, whole, latent.device, latent.shape[0])

    def _inductor(self, gm: fx.GraphModule, given: Sequence[Any], mode: FakeTensorMode) -> Compiled:
        context = torch._guards.TracingContext(mode)
        with torch._guards.tracing(context), torch.no_grad(), exact_operands():
            compiled: Any = compile_fx(gm, list(given), config_patches=self._patches or None)
        return compiled  # type: ignore[no-any-return]


def _driver(call: Compiled, whole: Functional, device: torch.device, rows: int) -> Driver:
    def run(frame: Frame, *args: Any) -> tuple[Any, ...]:
        first, *others = frame.rows
        if any(row.session is not first.session or row.branch != first.branch for row in others):
            raise SessionError(
                "rows of several sessions or branches: a whole graph keeps the state of one at a "
                "time. Compile the model with lowering='regions'"
            )
        session, branch = first.session, first.branch
        kept = session.tensors
        keys = {e.name: (None if e.shared else branch, e.name) for e in whole.state}
        state = [kept[keys[e.name]] if keys[e.name] in kept else e.cold() for e in whole.state]
        where = where_it_stands(first.step, session.num_steps, branch)
        numbers = (torch.tensor(number, device=device) for number in where.values())
        results, reused, new = whole.parts(call(*args, *numbers, *state))
        for name, value in zip(whole.changed, new, strict=True):
            kept[keys[name]] = value
        masks = dict(zip(whole.sites, (mask.tolist() for mask in reused), strict=True))
        for i, row in enumerate(frame.rows):
            row.reused = frozenset(site for site, rows in masks.items() if rows[i])
        frame.apart = False  # a block runs for all rows
        return tuple(results)

    return Driver(run, takes=rows.__eq__)
