"""Inductor on one region: its code, and what was taken for granted to make it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.output_code import CompiledFxGraph, OutputCode
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from cachepass.errors import CachePassError
from cachepass.ir.rows import symbols_in
from cachepass.runtime.inputs import signature_of

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
            if hold(compiled.guards, hints(mode)):
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


def hold(guards: Sequence[sympy.Basic], values: Mapping[sympy.Symbol, int]) -> bool:
    """Whether what was taken for granted is true of these values."""
    return all(guard.xreplace(values) == True for guard in guards)  # noqa: E712


def hints(mode: FakeTensorMode, but: Collection[sympy.Symbol] = ()) -> dict[sympy.Symbol, int]:
    """What symbols are in the call at hand."""
    assert mode.shape_env is not None
    return {s: v for s, v in mode.shape_env.backed_var_to_val.items() if s not in but}


def strides_of(value: Any, known: Mapping[sympy.Symbol, int] | None = None) -> Any:
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
    known = hints(mode, but=frozenset().union(*map(symbols_in, sizes)))
    strides = tuple(strides_of(result, known) for result in results)
    guards = [guard.expr.xreplace(known) for guard in environment.guards[guards_before:]]
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
    sizes: list[tuple[int, int, sympy.Expr]] = [
        (i, dim, size.node.expr)
        for i, value in enumerate(inputs)
        if isinstance(value, Tensor)
        for dim, size in enumerate(cast(Sequence[Any], value.shape))
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
