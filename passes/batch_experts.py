"""Run the experts of a captured loop as one operation, where each token needs a few of them."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.ir.boundary import Layout
from cachepass.ir.graph import call_target, called, module_paths, value_of
from cachepass.ir.rows import hint_of
from cachepass.moe.grouped import combine, grouped_linear, route
from cachepass.pass_manager import PassResult

_ADDS = frozenset({operator.add, operator.iadd, torch.add, "add"})
_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul, "mul"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_ROW_BY_ROW = frozenset({
    "silu", "gelu", "relu", "leaky_relu", "elu", "mish", "softplus", "tanh", "sigmoid", "square",
    "mul", "add", "sub", "truediv", "pow", "neg", "float", "to", "type_as",
})  # fmt: skip
"""What works on each row by itself, whatever its arguments are."""
_ENTRY = re.compile(r"^(.+)\.(\d+)$")


@dataclasses.dataclass(frozen=True)
class BatchExperts:
    """Replace sums over all experts of a list by routed ones.

    What is looked for is ``sum over e of share[e] * expert[e](x)``, in any order and with any
    first summand, where the shares are zero but for the experts that a top-k chose.

    1. The experts are entries of one module list, all called with the same `x`, alike but for
       their weights, and made of linear layers and operations on single rows.
    2. That a share is zero outside of the choice is found out by trying: what leads from the
       top-k to the shares runs on drawn values. If it always is, the shares are gathered at
       the chosen experts; how they were normalised does not matter.
    3. The graph is left alone if a part of the sum is used elsewhere, or anything is not as above.

    Loops that choose rows by data cannot be captured, so no pass sees them: `cachepass.moe` deals
    with those before capture.
    """

    name: str = "batch-experts"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        if isinstance(gm.meta.get("layout"), Layout):
            if any(called(n) == "topk" for n in gm.graph.nodes):
                raise LookupError("the graph is marked already: run BatchExperts first")
            return PassResult(gm, modified=False)
        modified = False
        for topk in [n for n in gm.graph.nodes if called(n) == "topk"]:
            picks = {user.args[1]: user for user in topk.users if user.target is operator.getitem}
            for total in _totals(gm.graph):
                found = _experts_of(total) if 1 in picks and total.users else None
                if found is not None and _fits(found, topk, picks):
                    _rewrite(gm.graph, found, picks[1])
                    modified = True
        return PassResult(gm, modified=modified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sum:
    """What one loop adds up, the experts in their order."""

    total: fx.Node
    base: fx.Node | None
    """What the sum starts from, unless zeros."""
    x: fx.Node
    shares: Sequence[fx.Node]
    bodies: Sequence[Sequence[fx.Node]]


def _is_one_of(node: Any, targets: frozenset[Any]) -> bool:
    calls = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return calls and node.target in targets and len(node.args) == 2 and not node.kwargs


def _totals(graph: fx.Graph) -> list[fx.Node]:
    """The last nodes of chains of additions of terms."""
    links = {node: None for node in graph.nodes if _is_link(node)}
    return [n for n in links if not (len(n.users) == 1 and next(iter(n.users)) in links)]


def _is_link(node: Any) -> bool:
    return _is_one_of(node, _ADDS) and any(_term(summand) for summand in node.args)


# ------------------------------------------------------------------------- what is found


def _experts_of(total: fx.Node) -> _Sum | None:
    """The experts that a chain of additions sums up, if it is one of those (case 1)."""
    node: Any = total
    terms: list[_Term] = []
    while _is_link(node) and (node is total or len(node.users) == 1):
        first, second = node.args
        term, rest = _term(second), first
        if term is None:
            term, rest = _term(first), second
        assert term is not None  # it is a link
        terms.append(term)
        in_place, node = node.target is operator.iadd, rest
    # What is left over: the term of the first expert, zeros, or what the sum is added to.
    last, base = _term(node), None
    if last is not None:
        terms.append(last)
    elif isinstance(node, fx.Node):
        zeros = called(node) in _ZEROS
        if in_place and not (zeros and len(node.users) == 1):
            return None  # somebody else sees this memory
        base = None if zeros else node
    elif node != 0:
        return None
    ordered = _in_order(terms)
    if ordered is None:
        return None
    prefix, terms = ordered
    bodies = [_body(term.result, f"{prefix}.{e}") for e, term in enumerate(terms)]
    sources = {
        used
        for body in bodies
        for node in body
        for used in node.all_input_nodes
        if used not in body and not used.meta.get("weight")
    }
    alike = len({_shape_of_body(body, sources) for body in bodies}) == 1
    if len(sources) != 1 or not alike or not all(map(_by_row, bodies[0])):
        return None
    shares = [term.share for term in terms]
    return _Sum(total=total, base=base, x=sources.pop(), shares=shares, bodies=bodies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Term:
    share: fx.Node
    result: fx.Node
    entries: dict[str, int]
    """Entries of module lists that the result is of, the innermost first."""


def _term(node: Any) -> _Term | None:
    """A share times what an expert gave."""
    if not _is_one_of(node, _PRODUCTS) or len(node.users) != 1:
        return None
    for result, share in (node.args, node.args[::-1]):
        if not isinstance(result, fx.Node) or not isinstance(share, fx.Node):
            return None
        thin = isinstance(value_of(share), Tensor) and value_of(share).shape[-1:] == (1,)
        same = isinstance(value_of(node), Tensor) and value_of(node).dtype == value_of(result).dtype
        if thin and same and len(result.users) == 1:
            entries = [_ENTRY.match(path) for path, _ in reversed(module_paths(result))]
            found = {match[1]: int(match[2]) for match in entries if match}
            return _Term(share=share, result=result, entries=found)
    return None


def _in_order(terms: Sequence[_Term]) -> tuple[str, list[_Term]] | None:
    """The list that the terms are all entries of, and the terms in its order."""
    for prefix in terms[0].entries if len(terms) > 1 else ():
        numbered = {term.entries.get(prefix): term for term in terms}
        if set(numbered) == set(range(len(terms))):
            return prefix, [numbered[e] for e in range(len(terms))]
    return None


def _body(result: fx.Node, path: str) -> list[fx.Node]:
    """The nodes of an entry that lead to its result, in graph order."""
    inside: dict[fx.Node, None] = {}
    pending = [result]
    while pending:
        node = pending.pop()
        of_entry = any(p == path for p, _ in module_paths(node))
        if of_entry and node.op in ("call_function", "call_method") and node not in inside:
            inside[node] = None
            pending += node.all_input_nodes
    return sorted(inside)


def _shape_of_body(body: Sequence[fx.Node], sources: Collection[fx.Node]) -> str:
    """Equal for bodies that differ in their weights alone."""
    names: dict[fx.Node, str] = {node: f"n{i}" for i, node in enumerate(body)}
    names |= dict.fromkeys(sources, "x")

    def name(node: fx.Node) -> str:
        known = names.setdefault(node, f"w{len(names)}")
        return known if known[0] != "w" else f"{known}{tuple(value_of(node).shape)}"

    return repr([(n.target, fx.map_arg((n.args, n.kwargs), name)) for n in body])


def _by_row(node: fx.Node) -> bool:
    if called(node) == "linear":
        weights = node.args[1:]
        return not node.kwargs and all(
            w is None or (isinstance(w, fx.Node) and w.meta.get("weight")) for w in weights
        )
    if called(node) == "chunk":
        return bool(node.kwargs.get("dim", node.args[-1]) == -1)
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node):
        return called(source) == "chunk"
    plain = not any(n.meta.get("weight") for n in node.all_input_nodes)
    return plain and called(node) in _ROW_BY_ROW


# ---------------------------------------------------------------------------- case 2


def _fits(found: _Sum, topk: fx.Node, picks: dict[Any, fx.Node]) -> bool:
    """Whether the shares are of this top-k's choice and of no other expert."""
    index, scores, x = value_of(picks[1]), topk.args[0], value_of(found.x)
    tensors = isinstance(scores, fx.Node) and all(isinstance(v, Tensor) for v in (index, x))
    if not tensors or not all(isinstance(v.shape[-1], int) for v in (index, x)):
        return False
    if not all(map(hint_of, index.shape)):  # nobody knows how many tokens there are
        return False
    of_experts = value_of(scores).shape[-1] == len(found.shares)  # type: ignore[arg-type]
    last = bool(topk.kwargs.get("dim", topk.args[2] if len(topk.args) > 2 else -1) == -1)
    shapes = {str(value.shape[:-1]) for value in (index, x, *map(value_of, found.shares))}
    return (
        of_experts
        and last
        and len(shapes) == 1
        and all(_is_zero_elsewhere(found.shares, picks, i) for i in range(2))
    )


def _is_zero_elsewhere(shares: Sequence[fx.Node], picks: dict[Any, fx.Node], seed: int) -> bool:
    """Run what leads to the shares, on a drawn choice, its values and arguments of the call.

    Sizes that are symbols are those of the call that was captured.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(node: fx.Node) -> Any:
        if node.meta.get("weight"):
            raise LookupError("what goes through weights is no question of the choice")
        like: Any = value_of(node)
        if not isinstance(like, Tensor):
            return hint_of(like)
        shape = [hint_of(size) for size in like.shape]
        return (torch.randn(shape, generator=generator) * 10**seed).to(like.dtype)

    index = value_of(picks[1])
    tokens = [hint_of(size) for size in index.shape[:-1]]
    order = torch.rand(*tokens, len(shares), generator=generator).argsort(-1)
    chosen = order[..., : index.shape[-1]].to(index.dtype)
    known: dict[fx.Node, Any] = {picks[1]: chosen}

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node is picks.get(0) or node.op == "placeholder":
                known[node] = drawn(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                known[node] = call_target(node.target, *_on_cpu((args, kwargs)))
        return known[node]

    try:
        table = torch.cat([value(share) for share in shares], -1)
    except Exception:  # what runs here is the user's: it may need what was not drawn
        return False
    return not bool(table.scatter(-1, chosen, 0).any())


def _on_cpu(arguments: Any) -> Any:
    """Arguments of a call that is tried on drawn values, with no device of the model's."""
    return fx.node.map_aggregate(
        arguments,
        lambda value: torch.device("cpu") if isinstance(value, torch.device) else value,
    )


# --------------------------------------------------------------------------- rewriting


def _rewrite(graph: fx.Graph, found: _Sum, index: fx.Node) -> None:
    total, like = found.total, value_of(found.total)
    origin = {k: v for k, v in total.meta.items() if k in ("nn_module_stack", "stack_trace")}

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        node = graph.create_node(op, target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with like.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
            node.meta = {**origin, "example_value": call_target(target, *given)}
        return node

    experts, k = len(found.shares), value_of(index).shape[-1]
    with graph.inserting_before(total):
        table = emit(torch.cat, list(found.shares), -1)
        weight = emit("reshape", emit("gather", table, -1, index), -1, k)
        routing = emit(route, emit("reshape", index, -1, k), experts)
        rows, offsets, place = (emit(operator.getitem, routing, i) for i in range(3))
        tokens = emit("reshape", found.x, -1, value_of(found.x).shape[-1])
        copies: dict[Any, fx.Node] = {}
        for position, node in enumerate(found.bodies[0]):
            if called(node) == "linear":
                direct = node.args[0] is found.x
                twins = [body[position] for body in found.bodies]
                biased = len(node.args) > 2 and node.args[2] is not None
                copies[node] = emit(
                    grouped_linear,
                    tokens if direct else copies[node.args[0]],
                    rows if direct else None,
                    offsets,
                    [twin.args[1] for twin in twins],
                    [twin.args[2] for twin in twins] if biased else [],
                )
                continue
            if found.x in node.all_input_nodes and found.x not in copies:
                copies[found.x] = emit("index_select", tokens, 0, rows)
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = emit(node.target, *args, **kwargs)
        result = emit(combine, copies[found.bodies[0][-1]], place, weight, found.x)
        if found.base is not None:
            result = emit(operator.add, found.base, result)
    total.replace_all_uses_with(result)
    _erase(graph, total)


def _erase(graph: fx.Graph, last: fx.Node) -> None:
    """A node that nobody uses any more, and what served it alone."""
    pending = collections.deque([last])
    while pending:
        node = pending.popleft()
        if not node.users and node.op in ("call_function", "call_method"):
            used = node.all_input_nodes
            graph.erase_node(node)
            pending.extend(dict.fromkeys(used))
