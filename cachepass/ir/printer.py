"""A rewritten graph as text: one line per operation, stable across torch versions.

Weights are counted, not listed: what a reader looks for is the flow of streams, the
conditionals and the slots. The same text serves dumps, tests and the documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cachepass.ir import ops
from cachepass.ir.boundary import Layout, place_of
from cachepass.ir.graph import called, is_item, walk

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip


Names = dict[fx.Node, str]


def format_graph(gm: fx.GraphModule) -> str:
    """The whole program: its inputs, its body with all arms, its slots, its regions."""
    layout = gm.meta.get("layout")
    lines: list[str] = []
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and n.target != "frame"]
    named = [n for n in inputs if not _is_weight(n)]
    head = ", ".join(f"{_name(n)}{_type(n)}" for n in named)
    lines.append(f"graph({head})  # and {len(inputs) - len(named)} weights")
    _body(gm, lines, "    ", {})
    if isinstance(layout, Layout) and layout.slots:
        lines.append("slots:")
        lines += [
            f"    {s.name}"
            + (f"  # of site {s.site!r}" if s.site else "  # reference of a signal")
            + (", one for all branches" if s.across_branches else "")
            for s in layout.slots.values()
        ]
    for name, region, calls in _regions(gm):
        lines.append(f"region {name}  # {calls} calls, {_size(region)} operations")
    return "\n".join(lines) + "\n"


def _body(gm: fx.GraphModule, lines: list[str], indent: str, names: Names) -> None:
    """`names`: how the arguments of an arm are called where it is used."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr") or is_item(node):
            continue
        if node.op == "output":
            values = ", ".join(_flat(node.args[0], names))
            if values:
                lines.append(f"{indent}return {values}")
        elif node.target is ops.conditional:
            _, site, compute, reuse, operands, carried = node.args
            gathered = carried is not None and carried[0] is not None
            how = ", row by row" if gathered else ""
            lines.append(f"{indent}{_results(node)} = if not reused {site!r}{how}:")
            _arm(gm, compute, operands, lines, indent, names)
            lines.append(f"{indent}else:")
            _arm(gm, reuse, operands, lines, indent, names)
        elif node.target is ops.guard:
            _, when, arm, operands = node.args
            lines.append(f"{indent}when {when.value}:")
            _arm(gm, arm, operands, lines, indent, names)
        else:
            lines.append(indent + _line(node, names))


def _arm(
    gm: fx.GraphModule, attribute: Any, operands: Any, lines: list[str], indent: str, names: Names
) -> None:
    arm = getattr(gm, str(attribute.target))
    inner = [n for n in arm.graph.nodes if n.op == "placeholder" and n.target != "frame"]
    outer = {i: names.get(o, _name(o)) for i, o in zip(inner, operands, strict=True)}
    _body(arm, lines, indent + "    ", outer)


def _line(node: fx.Node, names: Names) -> str:
    place = place_of(node)
    if node.op == "call_module":
        note = f"  # {place.stack}[{place.block}]" if place else ""
        weights = sum(1 for a in node.args if isinstance(a, fx.Node) and _is_weight(a))
        note += f"{', ' if note else '  # '}{weights} weights" if weights else ""
        return f"{_results(node)} = {node.target}({', '.join(_flat(node.args, names))}){note}"
    values = node.args[1:] if node.target in ops.FRAME_OPS else node.args
    keywords = (f"{k}={', '.join(_flat(v, names))}" for k, v in node.kwargs.items())
    shown = [*_flat(values, names), *keywords]
    call = f"{called(node)}({', '.join(shown)})"
    return call if node.target in ops.EFFECTS else f"{_name(node)}{_type(node)} = {call}"


def _results(node: fx.Node) -> str:
    """Names of a tuple's items instead of the tuple and its items."""
    items = sorted(
        (str(u.args[1]).zfill(4), f"{_name(u)}{_type(u)}") for u in node.users if is_item(u)
    )
    return ", ".join(text for _, text in items) or "_"


def _flat(value: Any, names: Names) -> list[str]:
    if isinstance(value, fx.Node):
        hidden = value.target == "frame" or _is_weight(value)
        return [] if hidden else [names.get(value, _name(value))]
    if isinstance(value, (tuple, list)):
        return [text for v in value for text in _flat(v, names)]
    return [repr(value)]


def _is_weight(node: fx.Node) -> bool:
    return node.op == "placeholder" and bool(node.meta.get("weight"))


def _name(node: fx.Node) -> str:
    return f"%{node.name}"


def _type(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return ""
    kind = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f": {kind}[{', '.join(str(s) for s in value.shape)}]"


def _size(gm: fx.GraphModule) -> int:
    return sum(1 for n in gm.graph.nodes if n.op not in ("placeholder", "output"))


def _regions(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule, int]]:
    calls: dict[str, tuple[fx.GraphModule, int]] = {}
    for graph_module in walk(gm):
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                region = getattr(graph_module, str(node.target))
                calls[str(node.target)] = (
                    region,
                    calls.get(str(node.target), (region, 0))[1] + 1,
                )
    return [(name, region, count) for name, (region, count) in calls.items()]
