"""lowering="regions": Inductor for each distinct region, FX's own code for the rest.

The graph is lowered for one signature of inputs at a time, outside of dynamo's tracing
context. Compiling inside of it would add guards to a shape environment that dynamo has
finished with and nobody would check them; with concrete shapes there are none to add.
Both arms of every conditional are lowered, so nothing compiles after the first call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.output_code import CompiledFxGraph, OutputCode
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from cachepass.errors import CachePassError
from cachepass.ir import ops
from cachepass.ir.boundary import Slot, layout_of
from cachepass.ir.rows import symbols_in
from cachepass.lowering.patch import replaced
from cachepass.lowering.shapes import fake_inputs, latent_in
from cachepass.runtime.inputs import Inputs, signature_of
from cachepass.runtime.program import Driver

Compiled = Callable[..., Any]
Signature = tuple[Any, ...]
Strides = tuple[tuple[sympy.Expr, ...] | None, ...]
"""Of a region's results, where they are tensors."""


@dataclasses.dataclass(frozen=True)
class CompiledRegion:
    """A region's code, and what is true of it."""

    code: Compiled
    """Takes the inputs as one list."""
    strides: Strides
    guards: Sequence[sympy.Basic]
    """What was taken for granted about the number of rows."""


class RegionCompiler:
    """Compiles regions with Inductor, each once per signature of its inputs."""

    def __init__(self, mode: str | None = None) -> None:
        self._patches = patches_of(mode)
        self._compiled: dict[tuple[int, Signature], list[CompiledRegion]] = {}
        self._regions: list[fx.GraphModule] = []  # keeps ids in `_compiled` from being reused
        self.count = 0
        self.seconds = 0.0
        """Spent in `lower`, most of it in Inductor and the C++ compiler."""

    def __call__(
        self, region: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode
    ) -> CompiledRegion:
        """The compiled region for fake or plain `inputs`."""
        made = self._compiled.setdefault((id(region), signature_of(inputs)), [])
        for compiled in made:
            if _hold(compiled.guards, _hints(mode)):
                return compiled
        made.append(_compile(region, inputs, mode, self._patches))
        self._regions.append(region)
        self.count += 1
        return made[-1]


def patches_of(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a `mode` of torch.compile."""
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise CachePassError(f"unknown `mode`={mode!r}: must be one of {', '.join(modes)}")
    # CUDA graphs stay off: slots keep what compiled code returns, and the next replay of a graph
    # would write to that memory.
    return {**modes[mode], "triton.cudagraphs": False} if mode is not None else {}


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
    return count == rows.node.hint or _hold(guards, {rows.node.expr: max(count, 2)})


def _hold(guards: Sequence[sympy.Basic], values: Mapping[sympy.Symbol, int]) -> bool:
    return all(guard.xreplace(values) == True for guard in guards)  # noqa: E712


def _hints(mode: FakeTensorMode, but: Collection[sympy.Symbol] = ()) -> dict[sympy.Symbol, int]:
    """What symbols are in the call at hand."""
    assert mode.shape_env is not None
    return {s: v for s, v in mode.shape_env.backed_var_to_val.items() if s not in but}


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
                compiled = self._compiler(region, inputs, self._mode)
                self._guards.update(compiled.guards)
                values[node] = self._run(region, inputs, compiled.strides)
                taken = tuple(copies[a] if isinstance(a, fx.Node) else a for a in node.args)
                copies[node] = graph.call_function(
                    _named(compiled.code, str(node.target)), ([*taken],)
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
        environment, hints = self._mode.shape_env, _hints(self._mode, but={rows.node.expr})
        assert environment is not None
        return [*self._guards, *(guard.expr.xreplace(hints) for guard in environment.guards)]

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
        for operand, way in zip(operands, carried[0] if carried is not None else (), strict=False):
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
        if strides is None or strides == _strides_of(value):
            return value
        environment = self._mode.shape_env
        assert environment is not None
        numbers = [environment.create_symintnode(n, hint=None) for n in strides]
        return value.new_empty_strided(value.shape, numbers)


def _strides_of(value: Any, known: Mapping[sympy.Symbol, int] | None = None) -> Any:
    """A tensor's, with numbers for the symbols that are known."""
    if not isinstance(value, Tensor):
        return None
    found = [n.node.expr if isinstance(n, torch.SymInt) else n for n in value.stride()]
    return tuple(sympy.sympify(n).xreplace(known or {}) for n in found)


def _compile(
    region: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, patches: dict[str, Any]
) -> CompiledRegion:
    """Inductor's own code for a region, without what AOTAutograd wraps around it.

    The wrappers regenerate views of inputs, apply mutations and handle grad mode. A region has
    nothing of that as a rule, is called a dozen times in each call, and would spend half of its
    time between kernels there.
    """
    codes: list[OutputCode] = []

    def keep(*args: Any, **kwargs: Any) -> OutputCode:
        codes.append(compile_fx_inner(*args, **kwargs))
        return codes[-1]

    environment = mode.shape_env
    assert environment is not None
    guards_before = len(environment.guards)
    given = [_as_symbol(i, value, environment) for i, value in enumerate(inputs)]
    count = _count_among(inputs)
    if count is not None:
        given.append(_share(given, count))
    context = torch._guards.TracingContext(mode)
    context.fakify_first_call = True  # which returns fakes with the strides of compiled results
    # AOTAutograd's cache would hand out the wrapped code alone; Inductor's own serves as well.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._guards.tracing(context), torch.no_grad(), uncached, warnings.catch_warnings():
        # Of ours is FrequencySplit alone, on tensors of the latent's size: eager serves there.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for comp")
        wrapped: Any = compile_fx(
            _fresh(region, counted=count is not None),
            given,
            inner_compile=keep,
            config_patches=patches or None,
        )
        with mode:
            results = wrapped(*given)
    # It is compiled for one value of each number, whatever symbol stands for it meanwhile.
    sizes = [n for i in inputs for n in (i.shape if isinstance(i, Tensor) else (i,))]
    hints = _hints(mode, but=frozenset().union(*map(symbols_in, sizes)))
    strides = tuple(_strides_of(result, hints) for result in results)
    guards = [guard.expr.xreplace(hints) for guard in environment.guards[guards_before:]]
    facts = context.fw_metadata
    nothing_to_wrap = (
        facts is not None
        and not facts.num_mutated_inp_runtime_indices
        and not facts.num_outputs_aliased
        and not facts.num_intermediate_bases
        and not facts.tokens
        and not torch._C._is_any_autocast_enabled()
    )
    if not nothing_to_wrap or len(codes) != 1 or not isinstance(codes[0], CompiledFxGraph):
        return CompiledRegion(_with_count(lambda values: wrapped(*values), count), strides, guards)
    code: Any = codes[0].current_callable
    return CompiledRegion(_with_count(lambda values: code(values), count), strides, guards)


Count = tuple[int, int, int]
"""Where the number of rows can be had: an input, a dimension of it, how much of it is one row's."""


def _count_among(inputs: Sequence[Any]) -> Count | None:
    """Set where no input tells the number of rows, but only multiples of it (frames of all rows).

    Inductor's code can do nothing with a multiple of what it does not know.
    """
    sizes = [
        (i, dim, size.node.expr)
        for i, value in enumerate(inputs)
        if isinstance(value, Tensor)
        for dim, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    ]
    known = {expression for _, _, expression in sizes if expression.is_Symbol}
    for i, dim, expression in sizes:
        for symbol in expression.free_symbols - known:
            if (expression / symbol).is_Integer:
                return i, dim, int(expression / symbol)
    return None


def _share(inputs: Sequence[Any], count: Count) -> Any:
    place, dim, each = count
    return inputs[place].shape[dim] // each


def _with_count(code: Compiled, count: Count | None) -> Compiled:
    if count is None:
        return code
    return lambda values: code([*values, _share(values, count)])


def _as_symbol(place: int, value: Any, environment: ShapeEnv) -> Any:
    """A number as a symbol of its own: AOTAutograd takes that of the rows if they are as many."""
    if type(value) is not int:
        return value
    source = ConstantSource(f"number_{place}")
    symbol = environment.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
    return environment.create_symintnode(symbol, hint=value, source=source)


def _make_contiguous(arm: fx.GraphModule, index: int) -> None:
    """Let an arm return its i-th result in contiguous memory."""
    output = arm.graph.output_node()
    results: Any = output.args[0]
    with arm.graph.inserting_before(output):
        value = arm.graph.call_method("contiguous", (results[index],))
    output.args = ((*results[:index], value, *results[index + 1 :]),)
    arm.recompile()


def _fresh(region: fx.GraphModule, *, counted: bool) -> fx.GraphModule:
    """A copy for Inductor to own, without the capture's fakes and stack traces.

    `counted` where it is given the number of rows besides, last.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in region.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    if counted:
        last = list(graph.find_nodes(op="placeholder"))[-1]
        with graph.inserting_after(last):
            graph.placeholder("rows")
    return fx.GraphModule(region, graph)


def _named(compiled: Compiled, name: str) -> Compiled:
    """FX prints calls by name: give the generated driver readable ones."""
    compiled.__name__ = compiled.__qualname__ = name
    compiled.__module__ = "cachepass.compiled"
    return compiled
