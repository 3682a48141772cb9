"""Sublayers of a block: the branches that are added to its streams, and of what kind they are."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Sequence

import torch
from torch import fx

from cachepass.ir.boundary import Kind, Sublayer, place_of
from cachepass.ir.graph import (
    called,
    contexts,
    is_view,
    joins,
    module_paths,
    mutated,
    owner_of,
    same_shape,
    value_of,
)
from cachepass.ir.rows import hint_of

_CASTS = frozenset({"float", "half", "bfloat16", "to", "type_as", "contiguous"})
_ATTENTION = frozenset(
    {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}
)
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "__matmul__", "einsum"})
_SUMS = frozenset({"add", "iadd"})
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})


def find_sublayers(nodes: Sequence[fx.Node], latent: fx.Node) -> list[Sublayer]:
    """The sublayers of a block with these nodes; see `passes.mark_boundaries` for the rules."""
    inside = set(nodes)
    leaving = [n for n in nodes if any(u not in inside for u in n.users)]
    leaving = [n for n in leaving if ndim(n) == 3] or [n for n in leaving if ndim(n) == 2]
    outputs = dict.fromkeys(_handed_on(n, inside) for n in leaving)
    spines = {output: _spine(_whole(output, inside), inside) for output in outputs}
    sums = {node for spine in spines.values() for node in spine.sums}
    found: list[Sublayer] = []
    claimed: set[fx.Node] = set()
    for output, spine in spines.items():
        if spine.stream is None:
            continue
        cut = output if _whole(output, inside) is not output else None
        for residual in reversed(spine.residuals):
            cone, behind = _cone(residual, nodes), _behind(residual, nodes, sums)
            used = {u for n in behind for u in n.all_input_nodes}
            if used.isdisjoint((spine.stream, *spine.sums)):  # a hint that is put in, say
                continue
            joint = cut is not None or (_attention_in(behind) and not _attention_in(cone))
            if not joint and (not cone or claimed & set(cone)):
                continue
            work = behind if joint else cone
            own = () if joint else cone  # case 4
            claimed |= set(own)
            place = place_of(residual)
            assert place is not None
            kind = _kind(work, spine.stream, inside, latent)
            found.append(Sublayer(_sublayer_name(work), kind, place.block, residual, own, cut))
    return found


def _whole(output: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """What a stream is a slice of, if it is one: text and image may run as one."""
    source = output.args[0] if output.args else None
    is_slice = (
        output.target is operator.getitem
        and isinstance(source, fx.Node)
        and source in inside
        and ndim(source) == ndim(output)
    )
    return source if is_slice else output  # type: ignore[return-value]


def _handed_on(output: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The stream of which an output is a projection, as a hint of a control block is."""
    source = output.args[0] if output.args else None
    projected = called(output) == "linear" and isinstance(source, fx.Node) and source in inside
    same = projected and ndim(source) == ndim(output)  # type: ignore[arg-type]
    return source if same else output  # type: ignore[return-value]


def _behind(residual: fx.Node, nodes: Sequence[fx.Node], sums: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes of the block that the residual is made by, from the streams on."""
    behind = {residual}
    for node in reversed(nodes):
        if node not in sums and any(user in behind for user in node.users):
            behind.add(node)
    return tuple(n for n in nodes if n in behind)


def _strip(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """What a stream is before it was cast, normalized (behind a sum) or masked."""
    while node in inside and node.args:
        name = called(node)
        masked = name == "mul" and len(node.args) == 2 and _is_mask(node.args[1])
        if not masked and name not in _NORMS and (name not in _CASTS or node.op != "call_method"):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_mask(node: object) -> bool:
    """One number for each token."""
    return isinstance(node, fx.Node) and ndim(node) >= 2 and str(value_of(node).shape[-1]) == "1"


def _joins(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether several streams enter the block here, as one."""
    return joins(node) and not inside & set(node.all_input_nodes)


@dataclasses.dataclass(frozen=True)
class _Spine:
    """The way of a stream through a block: what is added to it."""

    residuals: Sequence[fx.Node]
    """From the last to the first."""
    stream: fx.Node | None
    """Where it enters; None if it cannot be told."""
    sums: Sequence[fx.Node]


def _spine(output: fx.Node, inside: set[fx.Node]) -> _Spine:
    """The way of a stream through a block, back from its output."""
    like = value_of(output)

    def terms(node: fx.Node) -> list[fx.Node]:
        if called(node) not in _SUMS or len(node.all_input_nodes) != 2:
            return []
        tensors = [n for n in node.all_input_nodes if ndim(n) == like.ndim]
        return [n for n in tensors if same_shape(value_of(n), like)]

    def reaches(node: fx.Node) -> bool:
        node = _strip(node, inside)
        if node not in inside or _joins(node, inside):
            return not node.meta.get("weight")
        if (parted := _parted(node, inside)) is not None:
            return reaches(parted[0])
        return any(reaches(t) for t in terms(node))

    residuals: list[fx.Node] = []
    sums: list[fx.Node] = []
    node = _strip(output, inside)
    while node in inside and not _joins(node, inside):
        if (parted := _parted(node, inside)) is not None:
            node, parts = _strip(parted[0], inside), parted[1]
            for part in parts:
                residuals += part.residuals
                sums += part.sums
            continue
        pair = terms(node)
        through = [t for t in pair if reaches(t)]
        if len(pair) == 2 and not inside & set(pair):  # two that enter as one (positions)
            break
        if len(pair) == 2 and not through:  # one that is made in the block (of a long skip, say)
            through = [a for a, b in (pair, pair[::-1]) if a in _before(b, inside)]
        if len(pair) != 2 or len(through) != 1:
            return _Spine(residuals, node if residuals else None, sums)
        residual = pair[0] if through[0] is pair[1] else pair[1]
        if residual not in inside:
            return _Spine(residuals, None, sums)
        residuals.append(residual)
        sums.append(node)
        node = _strip(through[0], inside)
    return _Spine(residuals, node, sums)


def _parted(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, list[_Spine]] | None:
    """Of a stream that was cut and is put together here: the whole, and the ways of its parts."""
    if not joins(node) or not set(node.all_input_nodes) <= inside:
        return None
    parts = [_spine(part, inside) for part in node.all_input_nodes]
    starts = [s.stream or part for s, part in zip(parts, node.all_input_nodes, strict=True)]
    cut, *others = {n.args[0] if n.target is operator.getitem else None for n in starts}
    if others or not isinstance(cut, fx.Node) or called(cut) not in ("split", "chunk"):
        return None
    return cut.all_input_nodes[0], parts


def _before(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """What a node is computed from in the block."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for used in pending.pop().all_input_nodes:
            if used in inside and used not in found:
                found.add(used)
                pending.append(used)
    return found


def _cone(residual: fx.Node, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes that serve the residual alone; none if they would leave a context without its ends."""
    cone = {residual}
    if len(residual.users) != 1:
        return ()
    for node in reversed(nodes):
        if node in cone:
            continue
        written = mutated(node)
        if written is not None and not node.users:
            own = owner_of(written)
            readers = [u for u in _touching(own) if mutated(u) is None and not is_view(u)]
            if own in nodes and readers and all(u in cone for u in readers):
                cone.add(node)
        elif node.users and all(u in cone for u in node.users):
            cone.add(node)
    for first, *between, last in contexts(nodes):
        if not cone.isdisjoint(between):
            if not cone.issuperset(between):
                return ()
            cone |= {first, last}
    # Items are taken where their tuple is made: a tuple is no operand of a region.
    return tuple(n for n in nodes if n in cone and not (_takes_item(n) and n.args[0] not in cone))


def _touching(node: fx.Node) -> list[fx.Node]:
    """Who reads or writes a node's memory, through views too."""
    found = []
    for user in node.users:
        found.append(user)
        if is_view(user):
            found += _touching(user)
    return found


def _takes_item(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and isinstance(source, fx.Node)
        and isinstance(source.meta.get("example_value"), (tuple, list))
    )


def attention_key(node: fx.Node) -> fx.Node | None:
    """The key of an attention; None if a node is none.

    Attention that is written out, with or without a softmax, shows as a product of activations.
    """
    name = called(node)
    if name in _ATTENTION:
        key = node.kwargs["key"] if "key" in node.kwargs else node.args[1]
        return key if isinstance(key, fx.Node) else None
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if name not in _PRODUCTS or len(operands) < 2 or any(o.meta.get("weight") for o in operands):
        return None
    return operands[-1] if min(ndim(o) for o in operands) >= 3 else None


def _attention_in(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if attention_key(n) is not None]


def _kind(cone: Sequence[fx.Node], stream: fx.Node, inside: set[fx.Node], latent: fx.Node) -> Kind:
    attention = _attention_in(cone)
    for call in attention:
        seen: set[fx.Node] = set()
        pending = [attention_key(call)]
        while pending:
            node = pending.pop()
            if node is stream:
                return _self_kind(call, value_of(latent))
            if node in inside and node not in seen:
                assert node is not None
                seen.add(node)
                pending += node.all_input_nodes
    return Kind.CROSS_ATTENTION if attention else Kind.MLP


def _self_kind(call: fx.Node, latent: torch.Tensor) -> Kind:
    """Over all tokens, over those of a frame, or over the frames at one place.

    Told by the sizes that attention is called with, (batch, heads, tokens, channels) or of scores
    (batch, heads, tokens, tokens). Where frames or places are folded into the batch, it is larger
    than the latent's.
    """
    of = attention_key(call) if called(call) in _ATTENTION else call
    assert of is not None
    value = value_of(of)
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or latent.ndim != 5:
        return Kind.SELF_ATTENTION
    rows, tokens = hint_of(value.shape[0]), hint_of(value.shape[-1 if of is call else -2])
    folded = rows // hint_of(latent.shape[0])
    if folded <= 1:
        return Kind.SELF_ATTENTION
    channels, other = hint_of(latent.shape[1]), hint_of(latent.shape[2])
    frames = {channels, other}  # channels first or frames first
    if (tokens in frames) != (folded in frames):
        return Kind.TEMPORAL_ATTENTION if tokens in frames else Kind.SPATIAL_ATTENTION
    temporal = tokens in frames and (tokens != channels or other == channels)
    return Kind.TEMPORAL_ATTENTION if temporal else Kind.SPATIAL_ATTENTION


def _sublayer_name(cone: Sequence[fx.Node]) -> str:
    """The child of the block that does most of the work."""
    children: collections.Counter[str] = collections.Counter()
    for node in cone:
        place = place_of(node)
        for path, _ in module_paths(node):
            match = re.match(rf"^{re.escape(place.stack)}\.\d+\.([^.]+)", path) if place else None
            if match:
                children[match[1]] += 1
                break
    return children.most_common(1)[0][0] if children else "branch"


def ndim(node: fx.Node) -> int:
    """Dimensions of a node's value; -1 if it is no tensor."""
    value = value_of(node)
    return value.ndim if isinstance(value, torch.Tensor) else -1
