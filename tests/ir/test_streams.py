from __future__ import annotations

import operator

import torch
from torch import fx, nn

from cachepass.ir import ops
from cachepass.ir.streams import stream_origins


def _graph(names: str) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in names.split()]
    return graph, inputs


def _shaped(graph: fx.Graph, *odd: fx.Node) -> None:
    for node in graph.nodes:
        node.meta["example_value"] = torch.zeros(1, 5 if node in odd else 4, 2)


def test_the_longest_way_comes_first() -> None:
    graph, (hint, x) = _graph("hint x")
    first = graph.call_function(operator.add, (x, graph.call_function(torch.relu, (x,))))
    cast = graph.call_method("float", (first,))
    last = graph.call_function(torch.add, (cast, hint))
    _shaped(graph)
    found = stream_origins(fx.GraphModule(nn.Module(), graph), graph.nodes, [hint, x])
    assert found[last] == [x, hint]
    assert found[hint] == [hint]


def test_what_is_no_sum_has_no_origin() -> None:
    graph, (x, other) = _graph("x other")
    product = graph.call_function(operator.mul, (x, other))
    broadcast = graph.call_function(operator.add, (x, other))
    normed = graph.call_function(torch.relu, (graph.call_function(operator.add, (x, x)),))
    _shaped(graph, broadcast)
    found = stream_origins(fx.GraphModule(nn.Module(), graph), graph.nodes, [x, other])
    assert not {product, broadcast, normed} & set(found)


def test_scaled_sums_go_on_from_their_first_operand() -> None:
    graph, (gate, x) = _graph("gate x")
    out = graph.call_function(torch.addcmul, (x, gate, gate))
    _shaped(graph)
    found = stream_origins(fx.GraphModule(nn.Module(), graph), graph.nodes, [gate, x])
    assert found[out] == [x]


def test_streams_that_run_as_one_for_a_while() -> None:
    graph, (text, image) = _graph("text image")
    both = graph.call_function(torch.cat, ([text, image],), {"dim": 1})
    both = graph.call_function(operator.add, (both, graph.call_function(torch.relu, (both,))))
    every = slice(None)
    first = graph.call_function(operator.getitem, (both, (every, slice(None, 3))))
    last = graph.call_function(operator.getitem, (both, (every, slice(-3, None), every)))
    middle = graph.call_function(operator.getitem, (both, (every, slice(1, 4))))
    for node in graph.nodes:
        node.meta["example_value"] = torch.zeros(1, 6 if node.op == "call_function" else 3, 2)
    for node in (first, last):
        node.meta["example_value"] = torch.zeros(1, 3, 2)
    found = stream_origins(fx.GraphModule(nn.Module(), graph), graph.nodes, [text, image])
    assert found[first] == [text]
    assert found[last] == [image]
    assert middle not in found


def test_regions_and_conditionals_are_looked_into() -> None:
    inner, (a, b) = _graph("a b")
    swapped = (inner.call_function(operator.add, (b, b)), inner.call_function(torch.relu, (a,)))
    inner.output(swapped)
    _shaped(inner)
    region = fx.GraphModule(nn.Module(), inner)

    taken, (_, c, d) = _graph("frame c d")
    taken.output((taken.call_function(operator.add, (c, d)),))
    _shaped(taken)
    arm = fx.GraphModule(nn.Module(), taken)

    graph, (frame, x, y) = _graph("frame x y")
    call = graph.call_module("region", (x, y))
    outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    arms = [graph.get_attr("arm"), graph.get_attr("arm")]
    chosen = graph.call_function(
        ops.conditional, (frame, "site", *arms, (outputs[0], outputs[1]), None)
    )
    out = graph.call_function(operator.getitem, (chosen, 0))
    _shaped(graph)
    root = nn.Module()
    root.add_module("region", region)
    root.add_module("arm", arm)
    found = stream_origins(fx.GraphModule(root, graph), graph.nodes, [x, y])
    assert found[outputs[0]] == [y]
    assert outputs[1] not in found
    assert found[out] == [y]
