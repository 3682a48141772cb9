"""Each rule of the verifier has a graph that breaks it, and a text that says how."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from cachepass.errors import VerifyError
from cachepass.ir import ops
from cachepass.ir.boundary import Layout, Slot
from cachepass.ir.verify import verify

X = torch.zeros(2, 3)


def _value(node: fx.Node, value: torch.Tensor = X) -> fx.Node:
    node.meta["example_value"] = value
    return node


class Draft:
    """A small graph ``(frame, x) -> ...`` with one declared slot, to be spoiled."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.graph = fx.Graph()
        self.frame = self.graph.placeholder("frame")
        self.x = _value(self.graph.placeholder("x"))
        self.layout = Layout(slots={"s": Slot(name="s", site="site", dtype=dtype)})
        self.modules: dict[str, Any] = {}

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return _value(self.graph.call_function(target, args))

    def write(self, value: Any, slot: str = "s") -> None:
        self.call(ops.cache_write, self.frame, slot, value)

    def conditional(self, compute: fx.GraphModule, reuse: fx.GraphModule) -> fx.Node:
        self.modules |= {"compute": compute, "reuse": reuse}
        arms = self.graph.get_attr("compute"), self.graph.get_attr("reuse")
        return self.call(ops.conditional, self.frame, "site", *arms, (self.x,), None)

    def module(self, result: Any = None) -> fx.GraphModule:
        self.graph.output(self.x if result is None else result)
        gm = fx.GraphModule(self.modules, self.graph)
        gm.meta = {"layout": self.layout}
        return gm


def _arm(build: Callable[[fx.Graph, fx.Node], tuple[Any, ...]], operands: int = 1) -> Any:
    graph = fx.Graph()
    graph.placeholder("frame")
    given = [_value(graph.placeholder(f"a{i}")) for i in range(operands)]
    graph.output(build(graph, given[0]))
    gm = fx.GraphModule(nn.Module(), graph)
    gm.meta = {}
    return gm


def _add(graph: fx.Graph, a: fx.Node) -> tuple[Any, ...]:
    return (_value(graph.call_function(operator.add, (a, 1))),)


def test_a_legal_graph_passes() -> None:
    draft = Draft()
    copy = draft.call(ops.clone, draft.x)
    draft.call(ops.cache_read, draft.frame, "s", draft.x)
    draft.write(copy)
    draft.conditional(_arm(_add), _arm(_add))
    verify(draft.module())


def _undeclared() -> Draft:
    draft = Draft()
    draft.write(draft.call(ops.clone, draft.x), "other")
    return draft


def _never_written() -> Draft:
    draft = Draft()
    draft.call(ops.cache_read, draft.frame, "s", draft.x)
    return draft


def _wrong_dtype() -> Draft:
    draft = Draft(torch.bfloat16)
    draft.write(draft.call(ops.clone, draft.x))
    return draft


def _aliased() -> Draft:
    draft = Draft()
    draft.write(draft.x)
    return draft


def _written_twice() -> Draft:
    draft = Draft()
    draft.layout.slots["t"] = Slot(name="t", site="site", dtype=torch.float32)
    copy = draft.call(ops.clone, draft.x)
    draft.write(copy)
    draft.write(copy, "t")
    return draft


def _mutated_later() -> Draft:
    draft = Draft()
    copy = draft.call(ops.clone, draft.x)
    draft.write(copy)
    draft.graph.call_method("add_", (copy, 1))
    return draft


def _arms(compute: Any, reuse: Any) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = Draft()
        draft.conditional(compute(), reuse())
        return draft

    return make


def _two(graph: fx.Graph, a: fx.Node) -> tuple[Any, ...]:
    return (*_add(graph, a), *_add(graph, a))


def _half(graph: fx.Graph, a: fx.Node) -> tuple[Any, ...]:
    return (_value(graph.call_method("half", (a,)), X.half()),)


def _flat(graph: fx.Graph, a: fx.Node) -> tuple[Any, ...]:
    return (_value(graph.call_method("flatten", (a,)), X.flatten()),)


def _random(graph: fx.Graph, a: fx.Node) -> tuple[Any, ...]:
    return (_value(graph.call_function(torch.randn_like, (a,))),)


def _region(build: Callable[[fx.Graph, fx.Node], Any]) -> Callable[[], Draft]:
    def make() -> Draft:
        graph = fx.Graph()
        a = graph.placeholder("a0")
        graph.output((build(graph, a),))
        draft = Draft()
        draft.modules["block"] = fx.GraphModule(nn.Module(), graph)
        draft.graph.call_module("block", (draft.x,))
        return draft

    return make


def _write_argument(graph: fx.Graph, a: fx.Node) -> Any:
    return graph.call_method("mul_", (a, 2))


def _write_view(graph: fx.Graph, a: fx.Node) -> Any:
    view = graph.call_method("view", (a, -1))
    return graph.call_method("mul_", (view, 2))


def _open_context(graph: fx.Graph, a: fx.Node) -> Any:
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, True, None))
    return a


def _tuple_operand() -> Draft:
    draft = _region(lambda graph, a: a)()
    call = next(iter(draft.graph.find_nodes(op="call_module")))
    call.args[0].meta["example_value"] = (X, X)
    return draft


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_undeclared, "slot 'other' is not declared in the layout"),
        (_never_written, "slot 's' is read but never written"),
        (_wrong_dtype, r"slot 's' is declared torch.bfloat16 and written with torch.float32"),
        (_aliased, "slot 's' would alias 'x', which is an operand: write a clone"),
        (_written_twice, "clone is written to 2 slots: write clones"),
        (_mutated_later, "clone is handed to cache_write and written to later"),
        (_arms(lambda: _arm(_add, 2), lambda: _arm(_add)), "takes 2 operands, 1 are given"),
        (_arms(lambda: _arm(_add), lambda: _arm(_two)), "arms return 1 and 2 values"),
        (
            _arms(lambda: _arm(_add), lambda: _arm(_half)),
            r"add is torch.float32 computed and torch.float16 reused: the dtype of a slot",
        ),
        (_arms(lambda: _arm(_add), lambda: _arm(_flat)), "has 2 dimensions computed and 1 reused"),
        (_arms(lambda: _arm(_random), lambda: _arm(_add)), r"skip a random draw \(randn_like\)"),
        (_region(_write_argument), "region 'block' writes to its argument 'a0'"),
        (_region(_write_view), "region 'block' writes to its argument 'a0'"),
        (_tuple_operand, "region 'block' is given the tuple 'x': let its items cross"),
        (_region(_open_context), "region 'block' opens or closes a context without its other"),
    ],
)
def test_each_rule(make: Callable[[], Draft], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(make().module())


def test_a_random_draw_inside_a_region_counts() -> None:
    def draw(graph: fx.Graph, a: fx.Node) -> Any:
        return graph.call_function(
            torch.nn.functional.relu, (graph.call_function(torch.rand_like, (a,)),)
        )

    inner = _region(draw)().modules["block"]
    graph = fx.Graph()
    graph.placeholder("frame")
    a = _value(graph.placeholder("a0"))
    graph.output((_value(graph.call_module("block", (a,))),))
    arm = fx.GraphModule({"block": inner}, graph)
    arm.meta = {}
    draft = Draft()
    draft.conditional(arm, _arm(_add))
    with pytest.raises(VerifyError, match="random draw"):
        verify(draft.module())
