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
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.attention import flex_attention
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachepass.arguments import Value, is_plain, key_of, tensors_of, values_of
from cachepass.errors import CaptureError
from cachepass.ir import ops
from cachepass.ir.graph import mutated, owner_of

_ASKS = frozenset({
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "is_nonzero", "equal",
    "allclose",
})  # fmt: skip
"""What hands a tensor's values to Python."""

_LEAVES = frozenset({"numpy", "__array__", "__repr__", "__format__"})

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
    """Takes the call's tensors, then `fixed`; returns those of its output, then the stored."""

    key: object
    """What has to be equal: kinds and shapes of arguments, the modules."""

    fixed: Sequence[tuple[nn.Module, str] | Tensor]
    """What a module holds, by its name there; what was found elsewhere, as it was then."""

    conditions: fx.GraphModule
    """From what the graph takes to what Python asked about."""

    answers: Sequence[tuple[Callable[[Any], Any], Any]]
    """How each was asked, and what came out."""

    output: tuple[list[Any], pytree.TreeSpec]
    """The leaves of the output, None for tensors."""

    stored: Sequence[tuple[int, Any]]
    """What the call left in objects that it was given: which value, and what; None for tensors."""

    def arguments(self, values: Sequence[Value]) -> list[Any]:
        """What the graph is called with."""
        fixed = (x if isinstance(x, Tensor) else getattr(*x) for x in self.fixed)
        return [*tensors_of(values), *fixed]

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether Python would be told the same of these arguments."""
        try:
            found = self.conditions(*arguments)
            pairs = zip(self.answers, found, strict=True)
            return all(ask(value) == answer for (ask, answer), value in pairs)
        except Exception:  # sizes that data gave do not fit into what was written down
            return False

    def returned(self, tensors: Sequence[Tensor], values: Sequence[Value]) -> Any:
        """The output of the model, from that of the graph; what it stores is stored."""
        leaves, spec = self.output
        made = iter(tensors)
        output = pytree.tree_unflatten([next(made) if x is None else x for x in leaves], spec)
        for index, what in self.stored:
            values[index].put(next(made) if what is None else what)
        return output


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Make a call of a model and write it down.

    Raises:
        CaptureError: what was written down does not give what the call gave, or what is chosen by
            takes most of the call, or are floating values.
    """
    parameters = tuple(inspect.signature(model.forward).parameters)
    before = values_of(parameters, args, kwargs)
    key = key_of(model, before)
    recorder = _Recorder(model)
    for given in before:
        if isinstance(given.value, Tensor):
            recorder.take(given.value, given.name)
    with torch.no_grad(), _flex_attention_as_it_is(), recorder.modules(), recorder:
        output = model(*args, **kwargs)
    stored = _stored(before, values_of(parameters, args, kwargs))
    for index, _ in stored:  # the call is made again
        before[index].put(before[index].value)
    if recorder.left:
        raise CaptureError(
            "a tensor leaves torch in the forward, to numpy, to vmap or as floating values"
        )
    recording = recorder.finish(output, stored, key)
    _check(recording, before, [output, *(value for _, value in stored)], type(model).__name__)
    return recording


def record_or_none(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Recording | None:
    """As `record`; None where that fails: the error of dynamo that led here has a line."""
    with contextlib.suppress(Exception):
        return record(model, args, kwargs)
    return None


def _stored(before: Sequence[Value], after: Sequence[Value]) -> list[tuple[int, Any]]:
    """What a call left in objects: which of the values is which one now."""
    if [v.name for v in before] != [v.name for v in after]:
        raise CaptureError("the forward changes how an object is built that it is given")
    found = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        tensors = isinstance(old.value, Tensor) or isinstance(new.value, Tensor)
        if old.value is not new.value and (tensors or old.value != new.value):
            if not isinstance(new.value, Tensor) and not is_plain(new.value):
                raise CaptureError(f"the forward leaves a {type(new.value).__name__} in {new.name}")
            found.append((index, new.value))
    return found


@contextlib.contextmanager
def _flex_attention_as_it_is() -> Iterator[None]:
    """Without a compiler of its own, which would capture the recorder, too."""
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def _check(recording: Recording, given: Sequence[Value], made: Any, name: str) -> None:
    """The graph has to give what the call gave and stored, bit by bit."""
    arguments = recording.arguments(given)
    with torch.no_grad():
        same = recording.holds(arguments)
        found = recording.gm(*arguments) if same else ()
    expected = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
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
        self.fixed: list[tuple[nn.Module, str] | Tensor] = []
        self.functions: dict[str, FunctionType] = {}
        self.stack: list[tuple[str, str]] = []
        self.left = False
        """Whether values went where nothing is written down."""
        self._owners = {
            id(value): (owner, name)
            for owner in model.modules()
            for name, value in (
                *owner._parameters.items(),
                *owner._buffers.items(),
                *vars(owner).items(),
            )
            if isinstance(value, Tensor)
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
        self.left |= torch._C._functorch.is_functorch_wrapped_tensor(value)  # inside of a vmap
        name, fixed = f"constant_{len(self.fixed)}", self._owners.get(id(value), value)
        if isinstance(fixed, tuple):
            name = f"{self._paths[id(fixed[0])]}.{fixed[1]}".lstrip(".")
        node = self._placeholder(value, name)
        # How dynamo marks what stays from call to call.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
        self.fixed.append(fixed)
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
        self._remember(result, node, sized=self._sized_by_data(func, args, kwargs))

    def _sized_by_data(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether the shape of a result depends on more than shapes."""

        def fake(value: Any) -> Any:
            return (
                self._node_of(value).meta["example_value"] if isinstance(value, Tensor) else value
            )

        with torch._C.DisableTorchFunction(), self._fakes, torch.no_grad():
            try:
                func(*pytree.tree_map(fake, args), **pytree.tree_map(fake, dict(kwargs)))
            except (DynamicOutputShapeException, DataDependentOutputException):
                return True
            except Exception:  # what fakes cannot do else
                return False
        return False

    def _operand(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, slice):
            return slice(*map(self._bound, (value.start, value.stop, value.step)))
        if isinstance(value, FunctionType):  # how flex attention is told of masks and scores
            name = f"function_{len(self.functions)}"
            self.functions[name] = value
            return self.graph.get_attr(name)
        return value

    def _bound(self, value: Any) -> Any:
        """Python asks for a tensor that bounds a slice, without a word to the mode."""
        if not isinstance(value, Tensor):
            return value
        self.conditions.append((self._node_of(value), int, int(value)))
        return int(value)

    def _remember(self, value: Any, node: fx.Node, *, sized: bool = False) -> None:
        if isinstance(value, Tensor):
            if sized:  # from here on it has the size that it has now
                self.conditions.append((node, _shape, tuple(value.shape)))
                stack = node.meta["nn_module_stack"]
                node = self.graph.call_function(ops.of_shape, (node, tuple(value.shape)))
                node.meta["nn_module_stack"] = stack
            self.kept.append(value)
            node.meta["example_value"] = self._fake_of(value)
            # What is written in place is the node that it was.
            self.nodes.setdefault(id(value), node)
        elif isinstance(value, (tuple, list)):
            parts = []
            for i, part in enumerate(value):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                    self._remember(part, item, sized=sized)
                    parts.append(self.nodes[id(part)].meta["example_value"])
            node.meta["example_value"] = tuple(parts)

    def _fake_of(self, value: Tensor) -> Tensor:
        """Of tensors that share memory, the fakes share it, too."""
        with torch._C.DisableTorchFunction(), self._fakes:
            if value._base is not None and value._base.dtype != value.dtype:  # torch has no fake
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
            return self._fakes.from_tensor(value)

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

    def finish(self, output: Any, stored: Sequence[tuple[int, Any]], key: object) -> Recording:
        leaves, spec = pytree.tree_flatten(output)
        left = [*leaves, *(value for _, value in stored)]
        returned = tuple(self._node_of(x) for x in left if isinstance(x, Tensor))
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
            gm=fx.GraphModule(self.functions, self.graph),
            key=key,
            fixed=self.fixed,
            conditions=fx.GraphModule(self.functions, conditions),
            answers=[(ask, answer) for _, ask, answer in self.conditions],
            output=(list(map(_unless_tensor, leaves)), spec),
            stored=[(index, _unless_tensor(value)) for index, value in stored],
        )


def _needed(graph: fx.Graph, asked: set[fx.Node]) -> set[fx.Node]:
    """What the asked nodes are computed from; and what writes to that."""
    writers: dict[fx.Node, list[fx.Node]] = collections.defaultdict(list)
    for node in graph.nodes:
        if (target := mutated(node)) is not None:
            writers[owner_of(target)].append(node)
    found: set[fx.Node] = set()
    pending = list(asked)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [*node.all_input_nodes, *writers[owner_of(node)]]
    return found


def _pair(*values: Any) -> tuple[Any, ...]:
    return values


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _unless_tensor(value: Any) -> Any:
    return None if isinstance(value, Tensor) else value
