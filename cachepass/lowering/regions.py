"""lowering="regions": Inductor for each distinct region, FX's own code for the rest.

The graph is lowered for one signature of inputs at a time, outside of dynamo's tracing
context. Compiling inside of it would add guards to a shape environment that dynamo has
finished with and nobody would check them; with concrete shapes there are none to add.
Both arms of every conditional are lowered, so nothing compiles after the first call.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses import FakeTensorMode

from cachepass.ir import ops
from cachepass.ir.boundary import Slot, layout_of
from cachepass.lowering.compiler import (
    Compiled,
    RegionCompiler,
    Signature,
    Strides,
    hints,
    hold,
    strides_of,
)
from cachepass.lowering.patch import replaced
from cachepass.lowering.shapes import fake_inputs, latent_in
from cachepass.runtime.frame import Frame
from cachepass.runtime.inputs import Inputs, signature_of
from cachepass.runtime.program import Driver


def lower(
    gm: fx.GraphModule,
    args: Sequence[Any],
    compiler: RegionCompiler,
) -> Driver:
    """The driver for inputs like `args`, with any number of rows if that is a symbol in `gm`."""
    layout, inputs = layout_of(gm), Inputs(gm)
    started = time.perf_counter()
    mode, fakes = fake_inputs(args, inputs.carried, inputs.rows(args))
    rows = latent_in(gm, fakes).shape[0]
    lowering = _Lowering(layout.slots, rows, compiler, mode)
    on_cpu = all(a.device.type == "cpu" for a in args if isinstance(a, Tensor))
    # Triton's kernels are bundled into the cache as soon as a region is done: no waiting there.
    with _one_wait_for_all() if on_cpu else contextlib.nullcontext():
        lowered, _ = lowering.lower(gm, [None, *fakes])
    compiler.seconds += time.perf_counter() - started
    if isinstance(rows, torch.SymInt) and rows.node.expr.is_Symbol:
        holds = functools.partial(_holds, lowering.guards_on(rows), rows)
        return Driver(lowered.forward, functools.cache(holds))
    return Driver(lowered.forward, int(rows).__eq__)


def _holds(guards: Sequence[sympy.Basic], rows: torch.SymInt, count: int) -> bool:
    """Whether what was taken for granted about the number of rows is true of this one.

    That it is more than one is always granted, and has no consequence for what is computed.
    """
    return count == rows.node.hint or hold(guards, {rows.node.expr: max(count, 2)})


@contextlib.contextmanager
def _one_wait_for_all() -> Iterator[None]:
    """Let the C++ compiler work on all regions at once; what is left of it is waited for here.

    Inductor hands its kernels to compilers in the background, and waits for them before it
    returns a region: one core would idle while the next region is lowered (a fifth of the time
    of a cold start). Other threads that compile are not concerned.
    """
    me = threading.get_ident()
    left: list[tuple[AsyncCompile, dict[str, Any]]] = []

    def make(wait: Any) -> Any:
        def later(self: AsyncCompile, scope: dict[str, Any]) -> None:
            if threading.get_ident() == me:
                left.append((self, scope))
            else:
                wait(self, scope)

        return later

    try:
        with replaced(AsyncCompile, "wait", make):
            yield
    finally:
        for compiling, scope in left:
            compiling.wait(scope)


class _Lowering:
    """Runs a graph on fakes to learn what every region is called with, arms included."""

    def __init__(
        self, slots: dict[str, Slot], rows: int, compiler: RegionCompiler, mode: FakeTensorMode
    ) -> None:
        self._slots, self._rows, self._compiler, self._mode = slots, rows, compiler, mode
        self._kept: dict[str, Tensor] = {}
        self._guards: set[sympy.Basic] = set()
        self._results: dict[tuple[int, Signature], Any] = {}

    def lower(self, gm: fx.GraphModule, args: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
        graph = fx.Graph()
        values: dict[fx.Node, Any] = {}
        copies: dict[fx.Node, fx.Node] = {}
        arms: dict[str, fx.GraphModule] = {}
        given = iter(args)
        result: Any = None
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                copies[node] = graph.node_copy(node)
                continue
            inputs = fx.map_arg(node.args, values.get)
            if node.op == "output":
                result = inputs[0]
                graph.output(fx.map_arg(node.args[0], copies.__getitem__))
            elif node.op == "get_attr":
                values[node] = str(node.target)
                copies[node] = graph.node_copy(node)
            elif node.op == "call_module":
                region = getattr(gm, str(node.target))
                compiled = self._compiler(region, inputs, self._mode, self._rows)
                self._guards.update(compiled.guards)
                values[node] = self._run(region, inputs, compiled.strides)
                taken = [copies[a] if isinstance(a, fx.Node) else a for a in node.args]
                if compiled.counted:
                    taken.append(graph.call_function(_count, (next(iter(graph.nodes)),)))
                copies[node] = graph.call_function(
                    _named(compiled.code, str(node.target)), (taken,)
                )
            else:
                if node.target is ops.conditional:
                    self._lay_out(graph, node, values, copies)
                    inputs = fx.map_arg(node.args, values.get)
                values[node] = self._interpret(gm, node, inputs, arms)
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.target is ops.cache_write and not inputs[2].is_contiguous():
                    # A slot has one layout, which does not depend on who reads or wrote it.
                    with graph.inserting_before(copies[node]):
                        value = graph.call_method("contiguous", (copies[node].args[2],))
                    copies[node].update_arg(2, value)
        lowered = fx.GraphModule(dict(arms), graph)
        return lowered, result

    def guards_on(self, rows: torch.SymInt) -> list[sympy.Basic]:
        """What was taken for granted about the number of rows, here and where regions were made."""
        environment, known = self._mode.shape_env, hints(self._mode, but={rows.node.expr})
        assert environment is not None
        return [*self._guards, *(guard.expr.xreplace(known) for guard in environment.guards)]

    def _lay_out(
        self,
        graph: fx.Graph,
        node: fx.Node,
        values: dict[fx.Node, Any],
        copies: dict[fx.Node, fx.Node],
    ) -> None:
        """Make operands contiguous that rows may be gathered out of: what is gathered is."""
        operands: Any = node.args[4]
        carried: Any = node.args[5]
        ways = (carried and carried[0]) or [None] * len(operands)
        for operand, way in zip(operands, ways, strict=True):
            if isinstance(way, int) and not values[operand].is_contiguous():
                values[operand] = self._contiguous(values[operand])
                copies[operand] = graph.call_method("contiguous", (copies[operand],))

    def _interpret(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        inputs: Any,
        arms: dict[str, fx.GraphModule],
    ) -> Any:
        if node.target is ops.conditional:
            _, _, compute, reuse, operands, _ = inputs
            arms[compute], result = self.lower(getattr(gm, compute), [None, *operands])
            arms[reuse], other = self.lower(getattr(gm, reuse), [None, *operands])
            # What follows is compiled for one layout, whichever arm was taken.
            for i, (a, b) in enumerate(zip(result, other, strict=True)):
                if a.stride() != b.stride() or not a.is_contiguous():
                    for arm in (arms[compute], arms[reuse]):
                        _make_contiguous(arm, i)
            return tuple(self._contiguous(a) for a in result)
        if node.target is ops.guard:
            _, _, arm, operands = inputs
            arms[arm], _ = self.lower(getattr(gm, arm), [None, *operands])
        elif node.target is ops.cache_write:
            self._kept[inputs[1]] = self._contiguous(inputs[2])
        elif node.target is ops.cache_read:
            if len(inputs) < 3:
                return self._kept[inputs[1]]
            with self._mode:
                slot, like = self._slots[inputs[1]], inputs[2]
                return torch.empty(like.shape, dtype=slot.dtype, device=like.device)
        elif node.target is ops.weights:
            _, _, count, like = inputs
            with self._mode:
                return torch.empty(self._rows, count, device=like.device)
        elif node.op == "call_function" and node.target not in ops.FRAME_OPS:
            assert callable(node.target)
            return node.target(*inputs)  # an item of a tuple
        return None

    def _contiguous(self, value: Tensor) -> Tensor:
        with self._mode:
            return value.contiguous()

    def _run(self, region: fx.GraphModule, inputs: Sequence[Any], strides: Strides) -> Any:
        """A region's results on fakes, computed once per signature."""
        key = (id(region), signature_of(inputs))
        if key not in self._results:
            environment = self._mode.shape_env
            assert environment is not None
            # Sizes that depend on data (Mochi counts its prompt's tokens) stay in their region.
            with (
                self._mode, torch.no_grad(), enable_python_dispatcher(),
                environment.ignore_fresh_unbacked_symbols(),
            ):  # fmt: skip
                results = region(*inputs)
                # Inductor's decompositions may lay out a result in another way than eager does: a
                # concatenation of one tensor keeps its strides.
                self._results[key] = tuple(
                    self._laid_out(*pair) for pair in zip(results, strides, strict=True)
                )
        return self._results[key]

    def _laid_out(self, value: Any, strides: tuple[sympy.Expr, ...] | None) -> Any:
        if strides is None or strides == strides_of(value):
            return value
        environment = self._mode.shape_env
        assert environment is not None
        numbers = [environment.create_symintnode(n, hint=None) for n in strides]
        return value.new_empty_strided(value.shape, numbers)


def _make_contiguous(arm: fx.GraphModule, index: int) -> None:
    """Let an arm return its i-th result in contiguous memory."""
    output = arm.graph.output_node()
    results: Any = output.args[0]
    with arm.graph.inserting_before(output):
        value = arm.graph.call_method("contiguous", (results[index],))
    output.args = ((*results[:index], value, *results[index + 1 :]),)
    arm.recompile()


def _count(frame: Frame) -> int:
    """The rows that the call, or an arm, is run for."""
    return len(frame.rows)


def _named(compiled: Compiled, name: str) -> Compiled:
    """FX prints calls by name: give the generated driver readable ones."""
    compiled.__name__ = compiled.__qualname__ = name
    compiled.__module__ = "cachepass.compiled"
    return compiled
