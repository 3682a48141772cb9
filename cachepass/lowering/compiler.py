"""Inductor on one region: its code, and what was taken for granted to make it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

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

    counted: bool
    """Whether it is given the number of rows besides, last."""


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
        self, region: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, rows: Any
    ) -> CompiledRegion:
        """The compiled region for fake or plain `inputs`, of so many rows."""
        made = self._compiled.setdefault((id(region), signature_of(inputs)), [])
        for compiled in made:
            if hold(compiled.guards, hints(mode)):
                return compiled
        made.append(_compile(region, inputs, mode, rows, self._patches))
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
    region: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, rows: Any,
    patches: dict[str, Any],
) -> CompiledRegion:  # fmt: skip
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
    counted = _leaves_rows_open(inputs)
    if counted:
        given.append(rows)
    context = torch._guards.TracingContext(mode)
    context.fakify_first_call = True  # which returns fakes with the strides of compiled results
    # AOTAutograd's cache would hand out the wrapped code alone; Inductor's own serves as well.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._guards.tracing(context), torch.no_grad(), uncached, warnings.catch_warnings():
        # Of ours is FrequencySplit alone, on tensors of the latent's size: eager serves there.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for comp")
        wrapped: Any = compile_fx(
            _fresh(region, counted=counted),
            given,
            inner_compile=keep,
            config_patches=patches or None,
        )
        with mode:
            results = wrapped(*given)
    # It is compiled for one value of each number, whatever symbol stands for it meanwhile.
    known = hints(mode, but=frozenset().union(*map(symbols_in, _sizes_of(inputs))))
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
        return CompiledRegion(lambda values: wrapped(*values), strides, guards, counted)
    code: Any = codes[0].current_callable
    return CompiledRegion(lambda values: code(values), strides, guards, counted)


def _leaves_rows_open(inputs: Sequence[Any]) -> bool:
    """Whether inputs hold multiples of the rows alone (frames of all rows).

    Inductor's code can do nothing with a multiple of what it does not know.
    """
    used = [n.node.expr for n in _sizes_of(inputs) if isinstance(n, torch.SymInt)]
    known = {expression for expression in used if expression.is_Symbol}
    return any(expression.free_symbols - known for expression in used)


def _sizes_of(inputs: Sequence[Any]) -> list[Any]:
    """All sizes of tensors among a region's inputs, and its numbers."""
    return [n for i in inputs for n in (i.shape if isinstance(i, Tensor) else (i,))]


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
