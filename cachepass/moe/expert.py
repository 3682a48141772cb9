"""What an expert computes, as a program for the rows of all experts at once.

An expert is traced with torch.fx. If it is made of linear layers and of operations without
weights, the linear ones become `grouped_linear` and the others stay: they work row by row (which
the matcher checks by running it), so that the experts' rows may lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cachepass.moe.grouped import grouped_linear


@dataclass(frozen=True, kw_only=True)
class Program:
    """One expert's forward over sorted rows, without weights of its own.

    Called with the tokens, rows and offsets of `route`, then, for each of `layers`, a list of
    all experts' weights and one of their biases.
    """

    graph: fx.GraphModule
    layers: Sequence[str]
    """Linear layers, by their names in an expert."""
    width: int
    """Of what goes in."""

    def __call__(
        self, tokens: Tensor, rows: Tensor, offsets: Tensor, experts: Sequence[nn.Module]
    ) -> Tensor:
        """The results of all choices, in the order of `rows`."""
        operands: list[list[Tensor]] = []
        for name in self.layers:
            linears: list[Any] = [expert.get_submodule(name) for expert in experts]
            operands.append([linear.weight for linear in linears])
            biased = linears[0].bias is not None
            operands.append([linear.bias for linear in linears] if biased else [])
        result: Tensor = self.graph(tokens, rows, offsets, *operands)
        return result


def trace_expert(expert: nn.Module) -> Program:
    """The program of an expert.

    Raises:
        ValueError: why it has none.
    """
    try:
        traced = fx.symbolic_trace(expert)
    except Exception as error:  # whatever the user's forward does with a proxy
        raise ValueError(f"an expert cannot be traced: {error}") from error
    taken = [node for node in traced.graph.find_nodes(op="placeholder") if node.users]
    if len(taken) != 1:
        raise ValueError(f"an expert uses {len(taken)} arguments, not one")
    graph = fx.Graph()
    source, rows, offsets = (graph.placeholder(name) for name in ("tokens", "rows", "offsets"))
    layers: dict[str, tuple[fx.Node, fx.Node]] = {}
    for node in traced.graph.find_nodes(op="call_module"):
        if type(_child(traced, node)) is nn.Linear and str(node.target) not in layers:
            name = f"layer{len(layers)}"
            operands = graph.placeholder(name), graph.placeholder(f"{name}_bias")
            layers[str(node.target)] = operands
    if not layers:
        raise ValueError("an expert has no linear layer")
    copies: dict[fx.Node, fx.Node] = {}
    if not all(str(user.target) in layers for user in taken[0].users):
        # Something else than a linear layer looks at the rows: they are gathered here.
        copies[taken[0]] = graph.call_method("__getitem__", (source, rows))
    modules: dict[str, nn.Module] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and str(node.target) in layers:
            direct = node.args[0] is taken[0] and taken[0] not in copies
            x = source if direct else copies[node.args[0]]
            copies[node] = graph.call_function(
                grouped_linear, (x, rows if direct else None, offsets, *layers[str(node.target)])
            )
        elif node.op in ("call_function", "call_method"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node.op == "call_module" and not _has_weights(_child(traced, node)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            modules[str(node.target)] = _child(traced, node)
        elif node.op == "output":
            graph.output(copies[node.args[0]])
        elif node.op != "placeholder":
            raise ValueError(
                f"an expert uses {node.target}: only linear layers may have weights, and they "
                "have to be called as modules"
            )
    first = next(user for user in traced.graph.nodes if str(user.target) in layers)
    width = _child(traced, first).in_features
    program = fx.GraphModule(modules, graph, "Experts")
    return Program(graph=program, layers=tuple(layers), width=width)


def _child(traced: fx.GraphModule, node: fx.Node) -> Any:
    return traced.get_submodule(str(node.target))


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))
