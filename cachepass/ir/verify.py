"""The legal shape of a graph, checked after every pass. The rules are the functions below."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cachepass.errors import VerifyError
from cachepass.ir import ops
from cachepass.ir.boundary import Layout
from cachepass.ir.graph import contexts, is_end, mutated, owner_of, walk

_RANDOM = frozenset({torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like,
                     torch.bernoulli, torch.multinomial, torch.normal})  # fmt: skip


def verify(gm: fx.GraphModule) -> None:
    """Check all rules on a graph and its arms.

    Raises:
        VerifyError: names the rule and the node.
    """
    layout = gm.meta.get("layout")
    slots = layout.slots if isinstance(layout, Layout) else {}
    read: set[str] = set()
    written: set[str] = set()
    for part in walk(gm):
        _check_mutations(part)
        for node in part.graph.nodes:
            if node.target is ops.conditional:
                _check_arms(part, node)
            elif node.target in (ops.cache_read, ops.cache_write, ops.cache_shift):
                # (frame, slot, ...), of a shift (frame, newer, older)
                names = node.args[1:3] if node.target is ops.cache_shift else node.args[1:2]
                for name in names:
                    if name not in slots:
                        raise VerifyError(
                            f"{node.name}: slot {name!r} is not declared in the layout"
                        )
                (read if node.target is ops.cache_read else written).add(names[-1])
                if node.target is ops.cache_write:
                    _check_write(part, node, slots[names[-1]].dtype)
            elif node.op == "call_module":
                _check_operands(node)
                _check_region(getattr(part, str(node.target)), str(node.target))
    for name in sorted(read - written):
        raise VerifyError(f"slot {name!r} is read but never written: no reuse could be exact")


def _check_arms(gm: fx.GraphModule, node: fx.Node) -> None:
    """Both arms take the operands and return equally many values of equal dtype and shape."""
    arguments: Any = node.args  # (frame, site, compute, reuse, operands, carried)
    _, site, compute, reuse, operands, carried = arguments
    given = carried[0] if carried is not None else None
    if given is not None and len(given) != len(operands):
        raise VerifyError(
            f"conditional {site!r}: it is said of {len(given)} operands how they carry rows, "
            f"{len(operands)} are given"
        )
    results = []
    for attribute in (compute, reuse):
        arm = getattr(gm, str(attribute.target))
        taken = [n for n in arm.graph.nodes if n.op == "placeholder"]
        if len(taken) != len(operands) + 1:
            raise VerifyError(
                f"conditional {site!r}: an arm takes {len(taken) - 1} operands, "
                f"{len(operands)} are given"
            )
        output = next(iter(arm.graph.find_nodes(op="output")))
        results.append(output.args[0])
        if attribute is compute and _draws(arm):
            raise VerifyError(
                f"conditional {site!r} would skip a random draw ({_draws(arm)}): a region that "
                "draws random numbers is no site, because skipping it changes later draws"
            )
    if len(results[0]) != len(results[1]):
        raise VerifyError(
            f"conditional {site!r}: arms return {len(results[0])} and {len(results[1])} values"
        )
    for a, b in zip(*results, strict=True):
        left, right = a.meta.get("example_value"), b.meta.get("example_value")
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            if left.dtype != right.dtype:
                raise VerifyError(
                    f"conditional {site!r}: {a.name} is {left.dtype} computed and "
                    f"{right.dtype} reused: the dtype of a slot must be that of its stream"
                )
            if left.ndim != right.ndim:
                raise VerifyError(
                    f"conditional {site!r}: {a.name} has {left.ndim} dimensions computed and "
                    f"{right.ndim} reused"
                )


def _draws(gm: fx.GraphModule) -> str:
    for part in walk(gm):
        for node in part.graph.nodes:
            if node.op == "call_function" and node.target in _RANDOM:
                return str(node.name)
            if node.op == "call_module":
                found = _draws(getattr(part, str(node.target)))
                if found:
                    return found
    return ""


def _check_write(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    """A slot has one dtype and memory of its own: no argument's, no other slot's."""
    arguments: Any = node.args  # (frame, slot, value)
    value = arguments[2]
    known = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    if isinstance(known, torch.Tensor) and known.dtype != dtype:
        raise VerifyError(
            f"slot {node.args[1]!r} is declared {dtype} and written with {known.dtype} "
            f"({value.name}): declare the dtype of what is written"
        )
    if not isinstance(value, fx.Node) or (value.op == "placeholder" and "owned" not in value.meta):
        raise VerifyError(
            f"slot {node.args[1]!r} would alias {getattr(value, 'name', value)!r}, which is an "
            "operand: write a clone"
        )
    writers = [u for u in value.users if u.target is ops.cache_write]
    if len(writers) > 1:
        raise VerifyError(f"{value.name} is written to {len(writers)} slots: write clones")


def _check_mutations(gm: fx.GraphModule) -> None:
    """No frame operation may see memory that is written to after it."""
    written_at: dict[fx.Node, int] = {}
    nodes = list(gm.graph.nodes)
    for position, node in enumerate(nodes):
        target = mutated(node)
        if target is not None:
            written_at[target] = position
    for position, node in enumerate(nodes):
        if node.op == "call_function" and node.target in ops.FRAME_OPS:
            for used in node.all_input_nodes:
                if written_at.get(used, -1) > position:
                    raise VerifyError(
                        f"{used.name} is handed to {node.target.__name__} and written to later"
                    )


def _check_operands(node: fx.Node) -> None:
    """A region is given tensors and numbers; what a tuple holds crosses its edge item by item."""
    for used in node.all_input_nodes:
        if isinstance(used.meta.get("example_value"), (tuple, list)):
            raise VerifyError(
                f"region {node.target!r} is given the tuple {used.name!r}: let its items cross"
            )


def _check_region(region: fx.GraphModule, name: str) -> None:
    """A region writes to no argument of its own and splits no context pair."""
    ends = 0
    for node in region.graph.nodes:
        target = mutated(node)
        base = owner_of(target) if target is not None else None
        if base is not None and base.op == "placeholder":
            raise VerifyError(
                f"region {name!r} writes to its argument {base.name!r} ({node.name}): the "
                "memory is shared with another region"
            )
        ends += is_end(node)
    if ends != 2 * len(list(contexts(region.graph.nodes))):
        raise VerifyError(f"region {name!r} opens or closes a context without its other half")
