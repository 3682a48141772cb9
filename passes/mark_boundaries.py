"""Find stacks of blocks, their sublayers and the inputs that matter. Analysis only."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Sequence

import torch
from torch import fx

from cachepass.errors import CaptureError
from cachepass.ir.boundary import Kind, Layout, Place, Sublayer, place_of
from cachepass.ir.graph import CONTEXTS, module_paths, mutated, same_shape, value_of
from cachepass.pass_manager import PassResult

_CASTS = frozenset({"float", "half", "bfloat16", "to", "type_as", "contiguous"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "flex_attention"})
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")


@dataclasses.dataclass(frozen=True)
class MarkBoundaries:
    """Write the layout of a captured call: which node belongs to which block, and why.

    1. *Inputs*: placeholders that are no weights, in the order of the model's signature. The
       latent is the first one of the shape of an output, one dimension (its channels) aside; else
       the first with at least three dimensions. The timestep is the one that is called so, else
       the first with at most one dimension, of floating ones if there are any.
    2. *Stacks*: entries of an indexed module list (``blocks.0``, ``blocks.1`` ...) that work
       on the latent and are repeated modules with modules of their own. The outermost such list on
       a node's module stack wins, so a list inside a block is part of the block. A list of
       one entry counts if it holds attention.
    3. *Sublayers*: walking back from a block's output through additions and casts to its input
       gives the residual branches; a branch with attention is self- or cross-attention
       by where its keys come from, any other is an MLP. Self-attention is spatial or temporal where
       frames or places are folded into the batch.
    4. What leaves a block is marked with the stream that it belongs to: where it entered the first
       block, if additions lead back there.
    5. An attention that several streams share, or that runs on several as one, is found for each of
       them, to be measured; none can be skipped alone.
    6. The graph is left alone if it is marked already.
    """

    name: str = "mark-boundaries"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        if isinstance(gm.meta.get("layout"), Layout):
            return PassResult(gm, modified=False)  # case 6
        layout = Layout()
        _find_inputs(gm.graph, layout)
        roots = _roots(gm.graph, layout)
        _find_stacks(gm.graph, layout, roots)
        _find_streams(gm.graph, layout, roots)
        for nodes in _blocks(gm.graph):
            assert layout.latent is not None  # else _find_inputs has raised
            _follow_streams(nodes)
            layout.sublayers += _find_sublayers(nodes, layout.latent)
        gm.meta["layout"] = layout
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            gm.graph.placeholder("frame")
        return PassResult(gm, modified=True)


def _find_inputs(graph: fx.Graph, layout: Layout) -> None:
    placeholders = graph.find_nodes(op="placeholder")
    for node in sorted(placeholders, key=lambda n: n.meta.get("order", 0)):
        if node.meta.get("weight") or not isinstance(value_of(node), torch.Tensor):
            continue
        layout.inputs[str(node.meta.get("argument", node.name))] = node
    floating = [n for n in layout.inputs.values() if value_of(n).is_floating_point()]
    outputs = [value_of(n) for n in graph.output_node().all_input_nodes]
    like_output = [n for n in floating if any(_like(value_of(n), o) for o in outputs)]
    layout.latent = next((n for n in (*like_output, *floating) if _ndim(n) >= 3), None)
    if layout.latent is None:
        layout.latent = next(iter(like_output), None)
    for name, node in layout.inputs.items():
        if layout.timestep is None and name in _TIMESTEP_NAMES:
            layout.timestep = node
    if layout.timestep is None:
        named = [n for name, n in layout.inputs.items() if re.search(r"timesteps?$", name)]
        small = [n for n in floating if value_of(n).ndim <= 1]
        small += [n for n in layout.inputs.values() if value_of(n).ndim <= 1]
        layout.timestep = next(iter([*named, *small]), None)
    if layout.latent is None:
        raise CaptureError(
            "no latent among the model's arguments: looked for a floating tensor of the shape of "
            "an output, or with at least three dimensions, "
            f"found {sorted(layout.inputs) or 'no tensors'}"
        )


def _like(value: torch.Tensor, output: object) -> bool:
    """Whether shapes agree in all but one dimension at most, which is not that of the rows."""
    if not isinstance(output, torch.Tensor) or not 2 <= value.ndim == output.ndim:
        return False
    pairs = list(zip(map(str, value.shape), map(str, output.shape), strict=True))
    return pairs[0][0] == pairs[0][1] and sum(a != b for a, b in pairs) <= 1


def _roots(graph: fx.Graph, layout: Layout) -> dict[fx.Node, frozenset[fx.Node]]:
    """The user's inputs that each node's values depend on."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {n: frozenset({n}) for n in layout.inputs.values()}
    for node in graph.nodes:
        if node in roots:
            continue
        used = node.all_input_nodes
        if node.op == "call_method" and node.target in (
            "type_as",
            "expand_as",
            "view_as",
        ):
            used = used[:1]  # the other argument lends its type or shape only
        roots[node] = frozenset().union(*(roots[u] for u in used))
        target = mutated(node)
        if target is not None:
            roots[target] = roots[target] | roots[node]
    return roots


def _find_stacks(graph: fx.Graph, layout: Layout, roots: dict[fx.Node, frozenset[fx.Node]]) -> None:
    entry = re.compile(r"^(.*?)\.?(\d+)$")
    members: dict[str, dict[int, str]] = collections.defaultdict(dict)
    deep: set[str] = set()
    live: set[str] = set()
    attends: set[str] = set()
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    for node in nodes:
        paths = module_paths(node)
        for depth, (path, kind) in enumerate(paths):
            match = entry.match(path)
            if match is None:
                continue
            prefix = match[1]
            members[prefix][int(match[2])] = kind
            if depth + 1 < len(paths):
                deep.add(prefix)
            if layout.latent in roots[node]:
                live.add(prefix)
            if getattr(node.target, "__name__", "") in _ATTENTION:
                attends.add(prefix)
    stacks = set()
    for prefix, entries in members.items():
        if prefix not in deep:  # layers
            continue
        if prefix not in live:
            layout.outside[prefix or "self"] = "it does not work on the latent"
        elif prefix not in attends and max(collections.Counter(entries.values()).values()) < 2:
            layout.outside[prefix or "self"] = "nothing is repeated in it, and nothing attends"
        else:
            stacks.add(prefix)
    counter: dict[tuple[str, int], int] = {}
    for node in nodes:
        for path, _ in module_paths(node):
            match = entry.match(path)
            if match and match[1] in stacks:
                key = (match[1], int(match[2]))
                block = counter.setdefault(key, len(counter))
                node.meta["place"] = Place(match[1] or "self", block)
                break
    _keep_pairs_together(nodes)
    inside = tuple(f"{prefix}." for prefix in (*layout.outside, *stacks))
    layout.outside = {k: why for k, why in layout.outside.items() if not k.startswith(inside)}
    for prefix, _ in counter:
        layout.stacks[prefix or "self"] = layout.stacks.get(prefix or "self", 0) + 1
    if layout.blocks < 2:
        lists = {prefix or "self": len(entries) for prefix, entries in members.items()}
        raise CaptureError(
            "no stack of repeated blocks: looked for a ModuleList or Sequential whose entries have "
            "modules of their own and work on the latent, at least two in all; found "
            f"{lists or 'no module list'}. Without blocks there is nothing to skip: use "
            "torch.compile for this model"
        )


def _keep_pairs_together(nodes: Sequence[fx.Node]) -> None:
    """What stands between the two ends of a context belongs where its first end does."""
    entered: list[Place | None] = []
    for node in nodes:
        name = getattr(node.target, "__name__", "")
        if entered and entered[-1] is not None:
            node.meta.setdefault("place", entered[-1])
        if name in CONTEXTS:
            entered.append(place_of(node))
        elif entered and name in CONTEXTS.values():
            entered.pop()


def _find_streams(
    graph: fx.Graph, layout: Layout, roots: dict[fx.Node, frozenset[fx.Node]]
) -> None:
    """The timestep embedding that enters the blocks, and the patch grid before flattening."""
    placed = [n for n in graph.nodes if place_of(n)]
    first = [n for n in placed if place_of(n) == place_of(placed[0])]
    entering = {u: None for n in first for u in n.all_input_nodes if place_of(u) is None}
    candidates = [
        n
        for n in entering
        if isinstance(value_of(n), torch.Tensor)
        and value_of(n).is_floating_point()
        and layout.timestep in roots[n]
        and layout.latent not in roots[n]
    ]
    layout.timestep_embedding = min(candidates, key=lambda n: len(roots[n]), default=None)
    streams = [n for n in entering if layout.latent in roots[n] and _ndim(n) == 3]
    tokens = {str(value_of(n).shape[1]) for n in streams}  # text: sizes may be symbols
    for node in graph.nodes:
        if node is placed[0]:
            break
        if node.op == "placeholder" or _ndim(node) != 5 or layout.latent not in roots[node]:
            continue
        _, _, frames, height, width = value_of(node).shape
        if str(frames * height * width) in tokens:
            layout.patches = node


def _blocks(graph: fx.Graph) -> list[list[fx.Node]]:
    blocks: dict[int, list[fx.Node]] = collections.defaultdict(list)
    for node in graph.nodes:
        place = place_of(node)
        if place is not None:
            blocks[place.block].append(node)
    return list(blocks.values())


def _find_sublayers(nodes: Sequence[fx.Node], latent: fx.Node) -> list[Sublayer]:
    inside = set(nodes)
    outputs = [n for n in nodes if _ndim(n) == 3 and any(u not in inside for u in n.users)]
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
            joint = cut is not None or (_attention_in(behind) and not _attention_in(cone))
            if not joint and (not cone or claimed & set(cone)):
                continue
            work = behind if joint else cone
            own = () if joint else cone  # case 5
            claimed |= set(own)
            place = place_of(residual)
            assert place is not None
            kind = _kind(work, spine.stream, inside, latent)
            found.append(Sublayer(_sublayer_name(work), kind, place.block, residual, own, cut))
    return found


def _follow_streams(nodes: Sequence[fx.Node]) -> None:
    inside = set(nodes)
    for output in nodes:
        if _ndim(output) < 2 or all(u in inside for u in output.users):
            continue
        entered = _spine(output, inside).stream
        if entered is not None and entered not in inside:
            output.meta["stream"] = entered.meta.setdefault("stream", entered.name)


def _whole(output: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """What a stream is a slice of, if it is one: text and image may run as one."""
    source = output.args[0] if output.args else None
    is_slice = (
        output.target is operator.getitem
        and isinstance(source, fx.Node)
        and source in inside
        and _ndim(source) == 3
    )
    return source if is_slice else output  # type: ignore[return-value]


def _behind(residual: fx.Node, nodes: Sequence[fx.Node], sums: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes of the block that the residual is made by, from the streams on."""
    behind = {residual}
    for node in reversed(nodes):
        if node not in sums and any(user in behind for user in node.users):
            behind.add(node)
    return tuple(n for n in nodes if n in behind)


def _strip(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    while node in inside and node.op == "call_method" and node.target in _CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _joins(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether several streams enter the block here, as one."""
    name = getattr(node.target, "__name__", node.target)
    return name in ("cat", "concat") and not inside & set(node.all_input_nodes)


@dataclasses.dataclass(frozen=True)
class _Spine:
    residuals: Sequence[fx.Node]
    """From the last to the first."""
    stream: fx.Node | None
    """Where it enters; None if it cannot be told."""
    sums: Sequence[fx.Node]


def _spine(output: fx.Node, inside: set[fx.Node]) -> _Spine:
    """The way of a stream through a block, back from its output."""
    like = value_of(output)

    def terms(node: fx.Node) -> list[fx.Node]:
        name = getattr(node.target, "__name__", node.target)
        if name != "add" or len(node.all_input_nodes) != 2:
            return []
        return [n for n in node.all_input_nodes if _ndim(n) == 3 and same_shape(value_of(n), like)]

    def reaches(node: fx.Node) -> bool:
        node = _strip(node, inside)
        if node not in inside or _joins(node, inside):
            return not node.meta.get("weight")
        return any(reaches(t) for t in terms(node))

    residuals: list[fx.Node] = []
    sums: list[fx.Node] = []
    node = _strip(output, inside)
    while node in inside and not _joins(node, inside):
        pair = terms(node)
        through = [t for t in pair if reaches(t)]
        if len(pair) == 2 and not inside & set(pair):  # two that enter as one (positions)
            break
        if len(pair) != 2 or len(through) != 1:
            return _Spine(residuals, None, sums)
        residual = pair[0] if through[0] is pair[1] else pair[1]
        if residual not in inside:
            return _Spine(residuals, None, sums)
        residuals.append(residual)
        sums.append(node)
        node = _strip(through[0], inside)
    return _Spine(residuals, node, sums)


def _cone(residual: fx.Node, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes that serve the residual alone."""
    cone = {residual}
    if len(residual.users) != 1:
        return ()
    for node in reversed(nodes):
        if node in cone:
            continue
        written = mutated(node)
        if written is not None and not node.users:
            if all(u in cone or mutated(u) is written for u in written.users):
                cone.add(node)
        elif node.users and all(u in cone for u in node.users):
            cone.add(node)
    # Items are taken where their tuple is made: a tuple is no operand of a region.
    return tuple(n for n in nodes if n in cone and not (_takes_item(n) and n.args[0] not in cone))


def _takes_item(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and isinstance(source, fx.Node)
        and isinstance(source.meta.get("example_value"), (tuple, list))
    )


def _attention_in(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if getattr(n.target, "__name__", "") in _ATTENTION]


def _kind(cone: Sequence[fx.Node], stream: fx.Node, inside: set[fx.Node], latent: fx.Node) -> Kind:
    attention = _attention_in(cone)
    if not attention:
        return Kind.MLP
    call = attention[-1]
    key = call.kwargs["key"] if "key" in call.kwargs else call.args[min(1, len(call.args) - 1)]
    seen: set[fx.Node] = set()
    pending = [key] if isinstance(key, fx.Node) else []
    while pending:
        node = pending.pop()
        if node is stream:
            return _self_kind(call, value_of(latent))
        if node in inside and node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return Kind.CROSS_ATTENTION


def _self_kind(call: fx.Node, latent: torch.Tensor) -> Kind:
    """Over all tokens, over those of a frame, or over the frames at one place.

    Told by the sizes that attention is called with: (batch, heads, tokens, channels). Where frames
    or places are folded into the batch, it is larger than the latent's.
    """
    key = call.all_input_nodes[min(1, len(call.all_input_nodes) - 1)]
    if _ndim(key) < 3 or latent.ndim != 5 or str(value_of(key).shape[0]) == str(latent.shape[0]):
        return Kind.SELF_ATTENTION
    frames = {str(latent.shape[1]), str(latent.shape[2])}  # channels first or frames first
    channels = str(latent.shape[1])
    tokens = str(value_of(key).shape[-2])
    if tokens in frames and (tokens != channels or str(latent.shape[2]) == channels):
        return Kind.TEMPORAL_ATTENTION
    return Kind.SPATIAL_ATTENTION


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


def _ndim(node: fx.Node) -> int:
    value = value_of(node)
    return value.ndim if isinstance(value, torch.Tensor) else -1
