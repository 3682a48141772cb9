"""Capture for models that choose by data: one call is made, and what it does is written down.

Dynamo captures a call without making it, so it has to stop where Python asks for a value (``if
mask.all()``, a boolean index whose size nobody knows). Here the call is made on real tensors, each
operation becomes a node, and what Python asked for becomes a *condition*: the recording holds for
calls where the conditions come out the same. They are computed from the call's inputs before it,
by as much of the graph as they need.

Slower to capture than dynamo and fixed in all sizes: the second choice.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachepass.errors import CaptureError

_ASKS = frozenset({
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "is_nonzero", "equal",
    "allclose",
})  # fmt: skip
"""What hands a tensor's values to Python."""

_LEAVES = frozenset({"numpy", "__array__", "__repr__", "__format__"})

_SIZED_BY_DATA = frozenset({"nonzero", "masked_select", "unique", "argwhere", "unique_consecutive"})

_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem, "__setitem__": operator.setitem,
    "__add__": operator.add, "__sub__": operator.sub, "__mul__": operator.mul,
    "__truediv__": operator.truediv, "__matmul__": operator.matmul, "__pow__": operator.pow,
    "__iadd__": operator.iadd, "__isub__": operator.isub, "__imul__": operator.imul,
}  # fmt: skip
"""As dynamo writes them."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """A call as a graph, and when it is that of another call."""

    gm: fx.GraphModule
    """Takes the call's tensors and the model's weights, returns the tensors of its output."""

    key: object
    """What has to be equal: kinds and shapes of arguments, the modules."""

    weights: Sequence[tuple[nn.Module, str]]
    conditions: fx.GraphModule
    """From the call's tensors (and the weights) to what Python asked about."""

    answers: Sequence[tuple[Callable[[Any], Any], Any]]
    """How each was asked, and what came out."""

    output: tuple[list[Any], pytree.TreeSpec]
    """The leaves of the output, None for tensors."""

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """What the graph is called with."""
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        return [*tensors, *(getattr(owner, name) for owner, name in self.weights)]

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether Python would be told the same of these arguments."""
        found = self.conditions(*arguments)
        pairs = zip(self.answers, found, strict=True)
        return all(ask(value) == answer for (ask, answer), value in pairs)

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """The output of the model, from that of the graph."""
        leaves, spec = self.output
        made = iter(tensors)
        return pytree.tree_unflatten([next(made) if x is None else x for x in leaves], spec)


def key_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """Equal for calls that one recording may serve."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    facts = tuple(
        (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)
        for x in leaves
    )
    return facts, str(spec), tuple(id(m) for m in model.modules())


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Make a call of a model and write it down.

    Raises:
        CaptureError: what was written down does not give what the call gave, or what is chosen by
            takes most of the call, or are floating values.
    """
    parameters = tuple(inspect.signature(model.forward).parameters)
    leaves = pytree.tree_leaves_with_path((args, dict(kwargs)))
    recorder = _Recorder(model)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            recorder.take(leaf, _name(path, parameters))
    with torch.no_grad(), recorder.modules(), recorder:
        output = model(*args, **kwargs)
    if recorder.left:
        raise CaptureError("a tensor leaves torch in the forward, to numpy or as floating values")
    recording = recorder.finish(output, key_of(model, args, kwargs))
    _check(recording, [leaf for _, leaf in leaves], output, type(model).__name__)
    return recording


def _name(path: Any, parameters: Sequence[str]) -> str:
    """The argument of a path into ``(args, kwargs)``, with what is inside of it."""
    (_, first, *inside) = path
    name = parameters[first.idx] if isinstance(first, pytree.SequenceKey) else first.key
    return f"{name}{pytree.keystr(tuple(inside))}"


def _check(recording: Recording, leaves: Sequence[Any], output: Any, name: str) -> None:
    """The graph has to give what the call gave, bit by bit."""
    arguments = recording.arguments(leaves)
    with torch.no_grad():
        same = recording.holds(arguments)
        found = recording.gm(*arguments) if same else ()
    expected = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    if not same or not all(map(torch.equal, found, expected)):
        raise CaptureError(
            f"a call of {name} was recorded, and the recording gives something else (random "
            "numbers, autocast inside of the model, or values that leave torch)"
        )


class _Recorder(TorchFunctionMode):
    """Writes each call of torch into a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        """By the identity of the tensors, which `kept` keeps alive."""
        self.kept: list[Any] = []
        self.conditions: list[tuple[fx.Node, Callable[[Any], Any], Any]] = []
        self.constants: dict[str, Tensor] = {}
        self.weights: list[tuple[nn.Module, str]] = []
        self.stack: list[tuple[str, str]] = []
        self.left = False
        """Whether values went where nothing is written down."""
        self._owners = {
            id(value): (owner, name)
            for owner in model.modules()
            for name, value in (*owner._parameters.items(), *owner._buffers.items())
            if value is not None
        }
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._thread = threading.get_ident()
        self._fakes = FakeTensorMode()

    # ----------------------------------------------------------------- inputs

    def take(self, value: Tensor, name: str) -> None:
        """A tensor of the call becomes a placeholder."""
        node = self._placeholder(value, name)
        node.meta["tensor_dict"] = {}

    def _placeholder(self, value: Tensor, name: str) -> fx.Node:
        placeholders = self.graph.find_nodes(op="placeholder")
        at = placeholders[-1] if placeholders else self.graph._root
        with self.graph.inserting_after(at):
            node = self.graph.placeholder(re.sub(r"\W+", "_", name))
        node.meta["argument"] = name
        self._remember(value, node)
        return node

    def _node_of(self, value: Tensor) -> fx.Node:
        if id(value) in self.nodes:
            return self.nodes[id(value)]
        owner = self._owners.get(id(value))
        if owner is None:  # made by something that is no call of torch
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            node = self.graph.get_attr(name)
            self._remember(value, node)
            return node
        module, name = owner
        node = self._placeholder(value, f"{self._paths[id(module)]}.{name}".lstrip("."))
        # How dynamo marks what stays from call to call.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
        self.weights.append(owner)
        return node

    # ------------------------------------------------------------- operations

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _LEAVES and any(isinstance(a, Tensor) for a in pytree.tree_leaves(args)):
            self.left = True
        if name in _ASKS:
            return self._ask(func, name, args, kwargs)
        result = func(*args, **kwargs)
        made = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        if made or name == "__setitem__":
            self._write(func, name, args, kwargs, result)
        return result

    def _ask(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        answer = func(*args, **kwargs)
        # Another one in each call, as a rule: nothing that a recording could hold for.
        self.left |= any(isinstance(x, float) for x in pytree.tree_leaves(answer))
        tensors = [a for a in args if isinstance(a, Tensor)]
        others = [a for a in args if not isinstance(a, Tensor)]
        if len(tensors) == 1:
            node = self._node_of(tensors[0])
            self.conditions.append((node, lambda v: func(v, *others, **kwargs), answer))
        else:
            mine = tuple(self._node_of(t) for t in tensors)
            node = self.graph.call_function(_pair, mine)
            self.conditions.append((node, lambda v: func(*v, *others, **kwargs), answer))
        return answer

    def _write(
        self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], result: Any
    ) -> None:
        arguments, keywords = pytree.tree_map(self._operand, (args, dict(kwargs)))
        if name == "__get__":  # x.T, x.data
            node = self.graph.call_function(getattr, (*arguments[:1], func.__self__.__name__))
        elif name in _OPERATORS:
            node = self.graph.call_function(_OPERATORS[name], tuple(arguments), keywords)
        elif hasattr(Tensor, name) and (
            getattr(Tensor, name) is func or getattr(func, "__module__", "") == "torch._tensor"
        ):
            node = self.graph.call_method(name, tuple(arguments), keywords)
        else:
            node = self.graph.call_function(func, tuple(arguments), keywords)
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self.stack}
        sized = name in _SIZED_BY_DATA or (
            name == "__getitem__"
            and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in _flat(args[1]))
        )
        self._remember(result, node)
        if sized and isinstance(result, Tensor):
            self.conditions.append((node, _shape, tuple(result.shape)))

    def _operand(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, slice):
            return slice(*map(self._bound, (value.start, value.stop, value.step)))
        return value

    def _bound(self, value: Any) -> Any:
        """Python asks for a tensor that bounds a slice, without a word to the mode."""
        if not isinstance(value, Tensor):
            return value
        self.conditions.append((self._node_of(value), int, int(value)))
        return int(value)

    def _remember(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            self.kept.append(value)
            with torch._C.DisableTorchFunction(), self._fakes:
                node.meta["example_value"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
            # What is written in place is the node that it was.
            self.nodes.setdefault(id(value), node)
        elif isinstance(value, (tuple, list)):
            parts = []
            for i, part in enumerate(value):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                    self._remember(part, item)
                    parts.append(item.meta["example_value"])
            node.meta["example_value"] = tuple(parts)

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Follow which module computes, in this thread."""

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == self._thread and id(module) in self._paths:
                self.stack.append((self._paths[id(module)], type(module).__qualname__))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if threading.get_ident() == self._thread and id(module) in self._paths:
                self.stack.pop()

        before = hooks.register_module_forward_pre_hook(enter)
        after = hooks.register_module_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    # ----------------------------------------------------------------- result

    def finish(self, output: Any, key: object) -> Recording:
        leaves, spec = pytree.tree_flatten(output)
        returned = tuple(self._node_of(x) for x in leaves if isinstance(x, Tensor))
        root = nn.Module()
        for name, value in self.constants.items():
            root.register_buffer(name, value)
        conditions = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        asked = {node for node, _, _ in self.conditions}
        needed = _needed(self.graph, asked)
        for node in self.graph.nodes:
            if node.op == "placeholder" or node in needed:
                copied[node] = conditions.node_copy(node, copied.__getitem__)
        conditions.output(tuple(copied[node] for node, _, _ in self.conditions))
        asking = sum(n.op.startswith("call") for n in conditions.nodes)
        if asking > sum(n.op.startswith("call") for n in self.graph.nodes) / 2:
            raise CaptureError("what the model chooses by takes most of the model to compute")
        self.graph.output(returned)
        for node in list(self.graph.find_nodes(op="call_function", target=_pair)):
            self.graph.erase_node(node)
        return Recording(
            gm=fx.GraphModule(root, self.graph),
            key=key,
            weights=self.weights,
            conditions=fx.GraphModule(root, conditions),
            answers=[(ask, answer) for _, ask, answer in self.conditions],
            output=([None if isinstance(x, Tensor) else x for x in leaves], spec),
        )


def _needed(graph: fx.Graph, asked: set[fx.Node]) -> set[fx.Node]:
    """What the asked nodes are computed from; and what writes to that."""
    writers: dict[fx.Node, list[fx.Node]] = collections.defaultdict(list)
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        writes = node.target in (operator.setitem, operator.iadd, operator.imul, operator.isub)
        method = node.op == "call_method" and str(node.target).endswith("_")
        if isinstance(target, fx.Node) and (writes or method):
            writers[target].append(node)
    found: set[fx.Node] = set()
    pending = list(asked)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [*node.all_input_nodes, *writers[node]]
    return found


def _pair(*values: Any) -> tuple[Any, ...]:
    return values


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _flat(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)
