"""A graph that is being written, and the arms in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class Scope:
    """A graph that is being written: the whole, or an arm. Values of outer ones are lifted in."""

    def __init__(self, outer: Scope | None = None) -> None:
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.lifted: dict[fx.Node, fx.Node] = {}
        self.state: dict[str, fx.Node] = dict(outer.state) if outer else {}
        self.active: fx.Node | None = outer.active if outer else None
        """(rows,) the rows that compute here; None for all."""

        self.writing: fx.Node | None = None
        """(rows,) the rows that are written; None for all."""

        self._last: fx.Node | None = None

    def placeholder(self, name: str) -> fx.Node:
        """A further input, after those that there are."""
        graph, last = self.graph, self._last
        with graph.inserting_after(last) if last else graph.inserting_before():
            self._last = graph.placeholder(name)
        return self._last

    def here(self, value: Any) -> Any:
        """A node of this or an outer graph, as one of this graph."""
        if not isinstance(value, fx.Node) or value.graph is self.graph:
            return value
        if value not in self.lifted:
            self.lifted[value] = self.placeholder(value.name)
        return self.lifted[value]

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function, with values from anywhere."""
        return self.graph.call_function(function, fx.map_arg(args, self.here))

    def items(self, node: fx.Node, start: int, stop: int) -> list[fx.Node]:
        """Some of the values of a tuple."""
        return [self.call(operator.getitem, node, i) for i in range(start, stop)]

    def module(self) -> fx.GraphModule:
        """What was written."""
        return fx.GraphModule(self.root, self.graph)

    def attach(self, arm: Scope, operands: Sequence[fx.Node], hint: str) -> str:
        """The name of an arm that takes these operands in this order."""
        for operand in reversed(operands):
            inside = arm.here(operand)
            first = next(iter(arm.graph.nodes))
            if first is not inside:
                first.prepend(inside)
        name, count = hint, 0
        while name in self.root:
            count += 1
            name = f"{hint}_{count}"
        self.root[name] = arm.module()
        return name
