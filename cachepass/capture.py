"""From dynamo's graph to ours: which placeholder is what, and what to say if there is none."""

from __future__ import annotations

import contextlib
import inspect
import logging
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported, UserError
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from cachepass.arguments import values_of
from cachepass.errors import CaptureError
from cachepass.ir.graph import acts, called, drop_unused, module_paths, value_of
from cachepass.record import Recording, record, record_or_none

FAILURES = (Unsupported, UserError)
"""What dynamo raises for a call that it cannot capture."""

_KNOWN = "isolate_recompiles" in inspect.signature(torch.compile).parameters
ISOLATED: Mapping[str, Any] = {"isolate_recompiles": True} if _KNOWN else {}
"""For `torch.compile`: models of one class would share dynamo's entries otherwise.

torch 2.11 does not know the argument. It tells them apart by their backends, and counts the
captures of all of them together.
"""

_LOGGING = frozenset({"debug", "info", "warning", "error", "exception", "critical", "log"})
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "truediv", "floordiv", "pow", "rsub"})


def own_graph(captured: fx.GraphModule, parameters: Sequence[str] = ()) -> fx.GraphModule:
    """A copy of dynamo's graph (which dynamo goes on to use) with its inputs labelled.

    Weights (parameters and buffers) get ``meta["weight"]``; every placeholder gets the name
    that the user knows it by as ``meta["argument"]``.

    Args:
        captured: dynamo's graph, fresh in a backend.
        parameters: names of the forward's parameters, for arguments passed by position.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    # Inputs first: so an argument gets its own name and a value of that name another one.
    for placeholder in captured.graph.find_nodes(op="placeholder"):
        node = graph.create_node(
            "placeholder",
            placeholder.target,
            placeholder.args,
            name=_name_of(placeholder, parameters),
        )
        node.meta = dict(placeholder.meta)
        copies[placeholder] = node
        static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
        value = node.meta.get("example_value")
        node.meta["weight"] = static is not None or isinstance(value, torch.nn.Parameter)
        name = placeholder.meta.get("argument") or _argument(placeholder, parameters)
        node.meta["argument"] = name
        (first,) = re.findall(r"^\w*", name)
        # Dynamo's order is that of first use.
        node.meta["order"] = [*parameters, first].index(first)
    graph.output(graph.graph_copy(captured.graph, copies))
    _compute_sizes_where_used(graph)
    drop_unused(graph, _is_needed)
    gm = fx.GraphModule(captured, graph)
    gm.meta = {"computation": _computation(graph)}
    return gm


def _compute_sizes_where_used(graph: fx.Graph) -> None:
    """Let each user compute a size that follows from others.

    Dynamo computes it once, in the block that asks first: it would leave that block, where
    nothing but tensors is kept, and be absent where the block is skipped.
    """
    for size in reversed(list(graph.nodes)):  # those that it follows from come later
        values = map(value_of, (size, *size.all_input_nodes))
        if size.op != "call_function" or not all(isinstance(v, torch.SymInt) for v in values):
            continue
        for user in list(size.users):
            with graph.inserting_before(user):
                own = graph.node_copy(size)
            own.meta["nn_module_stack"] = user.meta.get("nn_module_stack", {})
            user.replace_input_with(size, own)
        graph.erase_node(size)


def _is_needed(node: fx.Node) -> bool:
    """Whether it is more than a value: registered operations may do whatever they like."""
    registered = isinstance(node.target, (OpOverload, OpOverloadPacket, HigherOrderOperator))
    return registered or acts(node) or not isinstance(value_of(node), Tensor)


def _computation(graph: fx.Graph) -> int:
    """What is computed, whatever the sizes: one number for all captures of the same code."""
    nodes = [
        (node.op, called(node), _constants(node))
        for node in graph.nodes
        if node.op.startswith("call") and isinstance(node.meta.get("example_value"), torch.Tensor)
    ]
    return hash(tuple(nodes))


def _constants(node: fx.Node) -> tuple[Any, ...]:
    """Arguments that are neither tensors nor sizes: an int is one in arithmetic alone."""
    kinds = (float, str, bool, int) if called(node) in _ARITHMETIC else (float, str, bool)
    return tuple(a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, kinds))


class SizedByDataError(CaptureError):
    """A graph with sizes that are known at run time only is in the way of the passes."""


class _Captured(Exception):  # noqa: N818 - no error: it ends a call whose graph is wanted alone
    pass


def capture_call(
    model: nn.Module, inputs: Mapping[str, Any], open_sizes: Mapping[str, Mapping[int, Any]]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The graph of one call, which is not made, and what it was called with.

    Args:
        model: not compiled.
        inputs: keyword arguments.
        open_sizes: of inputs, dimensions that are captured as symbols.

    Raises:
        CaptureError: the call cannot be captured as one graph.
    """
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []
    parameters = tuple(inspect.signature(model.forward).parameters)

    def backend(captured: fx.GraphModule, _: Sequence[Any]) -> Any:
        gm = own_graph(captured, parameters)
        for node in gm.graph.nodes:
            for path, _ in module_paths(node)[-1:]:  # for errors: torch hands `custom` on
                node.meta["custom"] = {"module": path}

        def call(*args: Any) -> Any:
            found.append((gm, args))
            raise _Captured

        return call

    given = {}
    for name, value in inputs.items():
        given[name] = value.clone() if isinstance(value, Tensor) else value
        for dimension in open_sizes.get(name, ()):
            torch._dynamo.maybe_mark_dynamic(given[name], dimension)
    # Open is what was asked for, whatever sizes dynamo has seen before. Nothing of it is kept, so
    # it does not count how often: see `ISOLATED`.
    fixed = torch._dynamo.config.patch(
        specialize_float=True, automatic_dynamic_shapes=False, recompile_limit=sys.maxsize
    )
    recorded: Recording | None = None
    marked = "_is_torch_compile" in vars(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, **ISOLATED)
    try:
        with torch.no_grad(), fixed:
            try:
                compiled(**given)
            except FAILURES:
                recorded = record_or_none(model, (), inputs)
                # That was a plain call: see `CachedModule`.
                with logging_ignored():
                    compiled(**given)
    except _Captured:
        return found[0]
    except FAILURES as error:
        recorded = recorded or record_or_none(model, (), inputs)
        if recorded is None:
            raise explain_failure(error, type(model).__name__) from error
        return _as_captured(recorded, parameters, inputs)
    finally:
        if not marked:  # torch.compile leaves a flag on the user's module
            vars(model).pop("_is_torch_compile", None)
    raise CaptureError(f"the call of {type(model).__name__} computes nothing")


def recorded_call(
    model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """As `capture_call`, of a call that is made: all sizes are known (see `cachepass.record`)."""
    parameters = tuple(inspect.signature(model.forward).parameters)
    return _as_captured(record(model, (), inputs), parameters, inputs)


def _as_captured(
    recording: Recording, parameters: Sequence[str], inputs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    values = values_of(parameters, (), inputs)
    return own_graph(recording.gm, parameters), tuple(recording.arguments(values))


def sized_by_data(gm: fx.GraphModule) -> bool:
    """Whether the sizes of some value in a captured graph are known at run time only."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes]
    return any(isinstance(v, Tensor) and free_unbacked_symbols(v) for v in values)


def logging_ignored() -> contextlib.AbstractContextManager[Any]:
    """Capture what a model computes, without what it logs.

    Libraries put methods of their own on the class of loggers, which log something once.
    """
    methods = {m for n, m in vars(logging.Logger).items() if n.removesuffix("_once") in _LOGGING}
    ignored = torch._dynamo.config.ignore_logging_functions | methods
    manager: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
        ignore_logging_functions=ignored
    )
    return manager


def _argument(placeholder: fx.Node, parameters: Sequence[str]) -> str:
    """``L['kwargs']['hidden_states']`` or ``L['args'][0]`` or ``L['x']`` -> a name."""
    graph_argument = placeholder.meta.get("grapharg")
    source = graph_argument.source.name if graph_argument is not None else str(placeholder.target)
    by_position = re.match(r"^L\['args'\]\[(\d+)\](.*)$", source)
    if by_position:
        index, inside = int(by_position[1]), by_position[2]
        return (parameters[index] if index < len(parameters) else f"args[{index}]") + inside
    return re.sub(r"^L\['(?:kwargs'\]\[')?([^']*)'\]", r"\1", source)


def _name_of(placeholder: fx.Node, parameters: Sequence[str]) -> str:
    name = placeholder.meta.get("argument") or _argument(placeholder, parameters)
    return name if name.isidentifier() else str(placeholder.name)


def explain_failure(error: Exception, model: str) -> CaptureError:
    """Dynamo's reason, the line of user code and what to do there, as one CaptureError."""
    text = str(error)
    said, _, code = text.partition("from user code:")
    reason = re.sub(r"\s*\(unhinted.*", "", said.split("\n")[0].strip()).rstrip(".")
    # Torch's advice on its own annotations: a model is rather changed than annotated.
    reason = re.sub(r"^Consider annotating your code using \S+ ", "", reason)
    explanation = _after("Explanation", said)[:1]
    about = " ".join([reason, *explanation])
    advice = next((do for pattern, do in _ADVICE if re.search(pattern, about)), None)
    if advice is None:
        hints = [hint for hint in _after("Hint", said) if not _FOR_TORCH.search(hint)]
        advice = " ".join([*hints, "Or move this code" if hints else "Move this code"])
        advice += " out of the model's forward"
    parts = ". ".join(part.rstrip(".") for part in (reason, *explanation, advice))
    return CaptureError(
        f"the call of {model} cannot be captured as one graph. At {_line_of_user(code or text)}: "
        f"{parts}. cachepass rewrites whole graphs: torch.compile(model, fullgraph=True) has to "
        "work"
    )


_ADVICE = (
    (
        "[Dd]ata-dependent",
        (
            "A graph cannot follow what a tensor holds: select with torch.where, or decide before "
            "the call and hand the model a Python value"
        ),
    ),
    (
        "`print`|logging|_warnings",
        (
            "Leave it out while the call is captured (`if not torch.compiler.is_compiling():`), or "
            "for good"
        ),
    ),
    (
        "Observed exception",
        (
            "The model itself raises this: call it without cachepass, with the same arguments, to "
            "see the error"
        ),
    ),
)
"""What to do about the commonest reasons; of others, torch's hints are told."""

_FOR_TORCH = re.compile("PyTorch|GitHub")
"""Hints to report an issue."""


def _after(word: str, text: str) -> list[str]:
    return re.findall(rf"^\s*{word}: (.*\S)\s*$", text, flags=re.MULTILINE)


def _line_of_user(text: str) -> str:
    """The innermost line outside of torch; where another file called it, that line, too."""
    library = str(pathlib.Path(inspect.getfile(torch)).parent)
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.+))?', text)
    own = [frame for frame in frames if not frame[0].startswith(library)]
    if not own:
        return "an unknown line"

    def told(frame: tuple[str, ...]) -> str:
        path, line, function, code = frame
        return f"{path}:{line} in {function}" + (f" (`{code.strip()}`)" if code else "")

    inner, of_model = own[-1], [frame for frame in own if frame[0] == own[0][0]][-1]
    return told(inner) + (f", called from {told(of_model)}" if of_model is not inner else "")
