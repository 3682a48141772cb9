"""Surgery on FX graphs: cut a run of nodes out, put a call or a conditional in its place.

FX keeps nested graphs as attributes of the owning GraphModule. The functions here keep
those attributes where the nodes that name them are, so that passes need not care.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from cachepass.ir import ops
from cachepass.ir.boundary import layout_of
from cachepass.ir.rows import carried

BuildArm = Callable[[fx.Graph, fx.Node, dict[fx.Node, fx.Node]], Sequence[fx.Node]]
"""Fills the graph of an arm: (graph, frame, outer node -> inner node) -> its outputs."""

CONTEXTS = {
    "_enter_autocast": "_exit_autocast",
    "_vmap_increment_nesting": "_vmap_decrement_nesting",
    "_sdpa_kernel": "_sdpa_kernel",  # what was allowed before is allowed again
}
"""How capture writes contexts that something runs in: two operations, by name."""


def contexts(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """Each context: its two ends and what stands between them."""
    entered: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        name = called(node)
        leaves = bool(entered) and name == CONTEXTS[entered[-1][0]]
        if name in CONTEXTS and not leaves:
            entered.append((name, []))
        for _, inside in entered:
            inside.append(node)
        if leaves:
            yield entered.pop()[1]


def is_end(node: fx.Node) -> bool:
    """Whether a context begins or ends here."""
    return called(node) in CONTEXTS or called(node) in CONTEXTS.values()


_MUTATING_FUNCTIONS = frozenset({
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior,
    operator.ixor, operator.ilshift, operator.irshift,
})  # fmt: skip


def is_frame_op(node: fx.Node) -> bool:
    """Whether a node is one that only the driver can run."""
    return node.op == "call_function" and node.target in ops.FRAME_OPS


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one result of a region or a conditional."""
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and isinstance(source, fx.Node)
        and (source.op == "call_module" or source.target is ops.conditional)
    )


def mutated(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one writes to, if any."""
    if node.op == "call_function":
        place = _place_of_inplace(node.target)
        positional = node.args[place] if place is not None and place < len(node.args) else False
        in_place = node.target in _MUTATING_FUNCTIONS or _in_place_by_name(node)
        if in_place or positional is True or node.kwargs.get("inplace") is True:
            return _as_node(node.args[0] if node.args else node.kwargs.get("input"))
        return _as_node(node.kwargs.get("out"))
    if node.op == "call_method" and _in_place_by_name(node):
        return _as_node(node.args[0])
    return None


def _in_place_by_name(node: fx.Node) -> bool:
    name, python = called(node), getattr(node.target, "__module__", "") == "_operator"
    return name.endswith("_") and not name.endswith("__") and not python  # operator.and_ is none


@functools.cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins tell none
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def acts(node: fx.Node) -> bool:
    """Whether a node is there for more than its value; fx knows of few that are."""
    return is_end(node) or mutated(node) is not None or bool(node.is_impure())


def drop_unused(graph: fx.Graph, needed: Callable[[fx.Node], bool]) -> None:
    """Erase what nobody uses and what is not `needed` for another reason (see `acts`)."""
    for node in reversed(graph.nodes):
        if not node.users and not needed(node):
            graph.erase_node(node)


def _as_node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


_VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "movedim", "unflatten", "flatten", "chunk", "split",
    "tensor_split", "unbind", "squeeze", "unsqueeze", "expand", "narrow", "select", "of_shape",
    "__getitem__", "getitem",
})  # fmt: skip


def is_view(node: fx.Node) -> bool:
    """Whether a node shows another's memory, or may; parts, and items of them, as well."""
    return called(node) in _VIEWS and bool(node.args) and isinstance(node.args[0], fx.Node)


def owner_of(node: fx.Node) -> fx.Node:
    """Whose memory a chain of views shows."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def joins(node: fx.Node) -> bool:
    """Whether a node puts several values together as one."""
    return called(node) in ("cat", "concat")


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are equal by their symbols, without adding a guard."""
    return tuple(map(str, a.shape)) == tuple(map(str, b.shape))


def inputs_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes outside of a run that it uses, in order of first use; attributes left out."""
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in inside and used.op != "get_attr":
                found[used] = None
    return list(found)


def outputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes of a run that are used outside of it, in graph order."""
    inside = set(nodes)
    return [n for n in nodes if any(user not in inside for user in n.users)]


def frame_of(gm: fx.GraphModule) -> fx.Node:
    """The placeholder of the frame: the first of every graph that holds frame operations."""
    first: fx.Node = next(iter(gm.graph.nodes))
    if first.op != "placeholder" or first.target != "frame":
        raise LookupError("the graph has no `frame` placeholder")
    return first


def copy_into(
    graph: fx.Graph, nodes: Iterable[fx.Node], mapping: dict[fx.Node, fx.Node]
) -> set[str]:
    """Copy nodes to another graph; returns the attributes that the copies name."""
    attributes: set[str] = set()

    def convert(node: fx.Node) -> fx.Node:
        if node not in mapping and node.op == "get_attr":
            mapping[node] = graph.node_copy(node)
            attributes.add(str(node.target))
        return mapping[node]

    for node in nodes:
        for used in node.all_input_nodes:
            convert(used)
        if node.op in ("get_attr", "call_module"):
            attributes.add(str(node.target))
        if node not in mapping:
            mapping[node] = graph.node_copy(node, convert)
    return attributes


def _take(graph: fx.Graph, operands: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Placeholders of an arm for what it is given, by outer node."""
    mapping = {}
    for operand in operands:
        mapping[operand] = graph.placeholder(operand.name)
        mapping[operand].meta = dict(operand.meta)
    return mapping


def build_arm(
    owner: fx.GraphModule,
    operands: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    build: BuildArm,
) -> fx.GraphModule:
    """An arm ``(frame, *operands) -> tuple``: copies of `nodes`, then what `build` adds."""
    graph = fx.Graph()
    frame = graph.placeholder("frame")
    mapping = {frame_of(owner): frame, **_take(graph, operands)}
    attributes = copy_into(graph, nodes, mapping)
    outputs = build(graph, frame, mapping)
    graph.output(tuple(outputs))
    # `build` may have added guards of its own: their arms hang on the frame node's meta
    arms = frame.meta.pop("arms", {})
    root = {name: getattr(owner, name) for name in sorted(attributes)} | arms
    gm = fx.GraphModule(root, graph)
    gm.meta = {}
    return gm


def attach(gm: fx.GraphModule, module: nn.Module, hint: str) -> str:
    """Give a sub-module a free attribute name that starts with `hint`."""
    name, count = hint, 0
    while hasattr(gm, name):
        count += 1
        name = f"{hint}_{count}"
    gm.add_submodule(name, module)
    return name


def insert_conditional(
    gm: fx.GraphModule,
    site: str,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    *,
    extra: Sequence[fx.Node] = (),
    extend: BuildArm,
    reuse: BuildArm,
) -> fx.Node:
    """Replace a run of nodes by a conditional whose compute arm holds them.

    Args:
        gm: the owning graph, edited in place.
        site: the site that the decision is asked for.
        nodes: the run; all that it uses is defined before its first node, or moves along.
        outputs: the nodes of the run that are used outside of it.
        extra: nodes before the run that the arms use besides.
        extend: adds to the compute arm (guards that write caches); its result is dropped.
        reuse: builds the reuse arm and returns one node for each output.
    """
    frame = frame_of(gm)
    operands = [n for n in dict.fromkeys((*inputs_of(nodes), *extra)) if n is not frame]

    def finish(graph: fx.Graph, inner: fx.Node, mapping: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        extend(graph, inner, mapping)
        return [mapping[o] for o in outputs]

    compute_arm = build_arm(gm, operands, nodes, finish)
    reuse_arm = build_arm(gm, operands, (), reuse)
    graph = gm.graph
    with graph.inserting_after(nodes[-1]):
        compute = graph.get_attr(attach(gm, compute_arm, f"compute_{site}"))
    with graph.inserting_after(compute):
        taken = graph.get_attr(attach(gm, reuse_arm, f"reuse_{site}"))
    with graph.inserting_after(taken):
        how = carried(layout_of(gm), operands, outputs)
        arguments = (frame, site, compute, taken, tuple(operands), how)
        cond = graph.call_function(ops.conditional, arguments)
    cond.meta["example_value"] = tuple(o.meta.get("example_value") for o in outputs)
    if outputs and "place" in outputs[0].meta:
        cond.meta["place"] = outputs[0].meta["place"]
    replace_outputs(graph, cond, outputs)
    for node in reversed(nodes):
        graph.erase_node(node)
    for attribute in graph.find_nodes(op="get_attr"):
        if not attribute.users:  # of a conditional that moved into an arm
            graph.erase_node(attribute)
    return cond


def call_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """All nodes of a call that follow `decide`: what a decision for the call can skip."""
    nodes = list(gm.graph.nodes)
    decide = next(i for i, n in enumerate(nodes) if n.target is ops.decide)
    return nodes[decide + 1 : -1]


def replace_outputs(graph: fx.Graph, call: fx.Node, outputs: Sequence[fx.Node]) -> None:
    """Let everybody who used `outputs` use the items of the tuple that `call` returns."""
    at = call
    for i, output in enumerate(outputs):
        with graph.inserting_after(at):
            item = graph.call_function(operator.getitem, (call, i))
        item._rename(output.name)
        item.meta = {
            k: v for k, v in output.meta.items() if k in ("example_value", "place", "stream")
        }
        output.replace_all_uses_with(item)
        at = item


def add_guard(
    graph: fx.Graph,
    frame: fx.Node,
    when: ops.When,
    operands: Sequence[fx.Node],
    build: BuildArm,
    *,
    owner: fx.GraphModule | None = None,
) -> fx.Node:
    """Append a guard whose arm is filled by `build`, at the graph's insertion point.

    Inside `build` callbacks the graph has no module yet: leave `owner` out there.
    """
    inner_graph = fx.Graph()
    inner_frame = inner_graph.placeholder("frame")
    build(inner_graph, inner_frame, _take(inner_graph, operands))
    inner_graph.output(())
    arm = fx.GraphModule(nn.Module(), inner_graph)
    arm.meta = {}
    if owner is not None:
        name = attach(owner, arm, f"guard_{when.name.lower()}")
    else:
        arms: dict[str, nn.Module] = frame.meta.setdefault("arms", {})
        name = f"guard_{when.name.lower()}_{len(arms)}"
        arms[name] = arm
    attribute = graph.get_attr(name)
    with graph.inserting_after(attribute):
        return graph.call_function(ops.guard, (frame, when, attribute, tuple(operands)))


def nested(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The arms that a graph's conditionals and guards name, in order."""
    return [
        getattr(gm, str(n.target))
        for n in gm.graph.nodes
        if n.op == "get_attr" and isinstance(getattr(gm, str(n.target), None), fx.GraphModule)
    ]


def walk(gm: fx.GraphModule) -> Iterable[fx.GraphModule]:
    """A graph and all arms below it, outermost first."""
    yield gm
    for arm in nested(gm):
        yield from walk(arm)


def value_of(node: fx.Node) -> Tensor:
    """The fake of what a node returns; None where capture left none."""
    value: Tensor = node.meta.get("example_value")  # type: ignore[assignment]
    return value


def memory_of(node: fx.Node) -> int | None:
    """What tells the memory of a tensor from that of others, as long as the graph's fakes live.

    None for a value that has none.
    """
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def called(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls; empty if it calls none."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target))


def call_target(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a node's function, or the method of that name, returns."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def module_paths(node: fx.Node) -> list[tuple[str, str]]:
    """(path, class name) of the modules around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        (_module_path(path), kind if isinstance(kind, str) else kind.__qualname__)
        for path, kind in stack.values()
    ]


@functools.cache
def _module_path(source: str) -> str:
    """How dynamo spells a module, as users do: the same few for all nodes of a graph."""
    path = re.sub(r"\.?__dict__\['_modules'\]|\._modules", "", source)
    path = re.sub(r"\['([^']+)'\]", r".\1", path)
    # A hook that took the place of a module's forward calls that one, bound to the module.
    path = re.sub(r"^.*\.forward\.__self__\b\.?", "L.self.", path)
    # The model is a local of its forward, under the name that this gives it (`self`, as a rule).
    path = re.sub(r"^L\.\w+\.?(self\.?)?", "", path).lstrip(".")
    return path.removeprefix("_orig_mod.")
