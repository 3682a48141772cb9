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
from cachepass.ir.boundary import Layout, Place, place_of
from cachepass.ir.graph import called, contexts, module_paths, mutated, value_of
from cachepass.ir.sublayers import attention_key, find_sublayers, ndim
from cachepass.pass_manager import PassResult

_SPLITS = frozenset({"chunk", "split", "tensor_split"})
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")


@dataclasses.dataclass(frozen=True)
class MarkBoundaries:
    """Write the layout of a captured call: which node belongs to which block, and why.

    1. *Inputs*: placeholders that are no weights, in the order of the model's signature. The
       latent is the first one of the shape of an output, else the first that differs from one in
       a single dimension (its channels), else the first with at least three dimensions, or with
       two and of integers (entries of a codebook). The
       timestep is the one that is called so, else the first with at most one dimension, of
       floating ones if there are any.
    2. *Stacks*: entries of an indexed module list (``blocks.0``, ``blocks.1`` ...) that work
       on the latent and are repeated modules with modules of their own. The outermost such list on
       a node's module stack wins, so a list inside a block is part of the block. A list of
       one entry counts if it holds attention.
    3. *Sublayers*: walking back from a block's output through additions, casts, norms behind a
       sum, masks and parts that are put together again to its input, or to what a projection makes
       of that, gives the residual branches. One that is computed from no stream is a hint that is
       put in. A branch with attention is self- or cross-attention by where its keys come from, any
       other is an MLP. Self-attention is spatial or temporal where frames or places are folded into
       the batch.
    4. An attention that several streams share, or that runs on several as one, is found for each of
       them, to be measured; none can be skipped alone.
    5. The graph is left alone if it is marked already.
    6. Where a block begins by taking one part of a stream, and nobody the others (tokens that are
       split among processes, by a hook of the block), the stream begins with that part.
    """

    name: str = "mark-boundaries"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        if isinstance(gm.meta.get("layout"), Layout):
            return PassResult(gm, modified=False)  # case 5
        layout = Layout()
        _find_inputs(gm.graph, layout)
        roots = _roots(gm.graph, layout)
        _find_stacks(gm.graph, layout, roots)
        _leave_out_shares(gm.graph, layout, roots)
        _find_streams(gm.graph, layout, roots)
        for nodes in _blocks(gm.graph):
            assert layout.latent is not None  # else _find_inputs has raised
            layout.sublayers += find_sublayers(nodes, layout.latent)
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
    differing = {n: min((_differing(value_of(n), o) for o in outputs), default=9) for n in floating}
    like_output = sorted((n for n in floating if differing[n] <= 1), key=differing.__getitem__)
    large = [
        n for n in layout.inputs.values()
        if ndim(n) >= 3 or (ndim(n) == 2 and value_of(n).dtype == torch.int64)  # or tokens
    ]  # fmt: skip
    layout.latent = next(iter([*like_output, *large]), None)
    layout.listed = layout.latent is not None and "[" in str(layout.latent.meta.get("argument"))
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


def _differing(value: torch.Tensor, output: object) -> int:
    """In how many dimensions an input differs from an output; many if in that of the rows."""
    if not isinstance(output, torch.Tensor) or not 2 <= value.ndim == output.ndim:
        return 9
    pairs = list(zip(map(str, value.shape), map(str, output.shape), strict=True))
    return sum(a != b for a, b in pairs) if pairs[0][0] == pairs[0][1] else 9


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
            if attention_key(node) is not None:
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
            f"{lists or 'no module list'}{_from_line(graph)}. Without blocks there is nothing to "
            "skip: use torch.compile for this model"
        )


def _from_line(graph: fx.Graph) -> str:
    """The first line that computes something, if capture has written it down."""
    traces = (node.meta.get("stack_trace") or "" for node in graph.nodes)
    lines = (re.search(r'File "([^"]+)", line (\d+), in forward', trace) for trace in traces)
    first = next(filter(None, lines), None)
    return f" in the forward, from {first[1]}:{first[2]} on" if first else ""


def _keep_pairs_together(nodes: Sequence[fx.Node]) -> None:
    """The two ends of a context and what stands between them belong to one block."""
    for inside in contexts(nodes):
        # The ends themselves may belong to no module.
        places = dict.fromkeys(p for n in inside if (p := place_of(n)) is not None)
        if len(places) == 1:
            for n in inside:
                n.meta.setdefault("place", *places)


def _leave_out_shares(
    graph: fx.Graph, layout: Layout, roots: dict[fx.Node, frozenset[fx.Node]]
) -> None:
    """See case 6."""
    for node in graph.nodes:
        if place_of(node) is None or called(node) not in _SPLITS:
            continue
        source, parts = node.all_input_nodes[0], list(node.users)
        enters = place_of(source) != place_of(node) and layout.latent in roots[source]
        if enters and len(parts) == 1 and parts[0].target is operator.getitem:
            for taken in (node, *parts):
                del taken.meta["place"]


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
    streams = [n for n in entering if layout.latent in roots[n] and ndim(n) == 3]
    tokens = {str(value_of(n).shape[1]) for n in streams}  # text: sizes may be symbols
    for node in graph.nodes:
        if node is placed[0]:
            break
        if node.op == "placeholder" or ndim(node) != 5 or layout.latent not in roots[node]:
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
