"""A cached model as a program that needs neither cachepass nor the model's code.

The functional graph of `lowering="graph"`, with the weights inside, under a signature that a
runner can use without knowing the policy::

    program(**inputs, step, num_steps, branch, state) -> {"output", "reused", "state"}

`step`, `num_steps` (-1: not known) and `branch` (0 cond, 1 uncond, 2 any other) are () int64.
`state` is {"branch": {...}, "request": {...}}: the first is kept for each branch of a request,
the second once for all. A request starts with zeros. What a call returns under "state"
replaces what it was given; what it does not return stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from cachepass import capture
from cachepass.errors import CachePassError
from cachepass.ir.boundary import layout_of
from cachepass.lowering.functional import Functional, functionalize, identifier
from cachepass.lowering.shapes import slot_shapes
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.policy import Policy

BRANCH, REQUEST = "branch", "request"


def export(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    policy: str | os.PathLike[str] | AnyPolicy = "mixcache",
    options: dict[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """A model with its cache, as one program of torch.export; see the module for its signature.

    Args:
        model: a diffusion transformer, not compiled.
        example_inputs: keyword arguments of one call of it.
        policy: as in `compile`.
        options: as in `compile`.
        dynamic_shapes: input -> {dimension: `torch.export.Dim`}, as in torch.export.

    Returns:
        The program. Its `example_inputs` are those of a request's first call.

    Raises:
        PolicyError: the policy decides on the host only.
        CaptureError: the call cannot be captured.
    """
    chosen = for_model(resolve(policy, options), model)
    call = _capture(model, example_inputs, dynamic_shapes or {})
    gm = run_passes(call.gm, default_pipeline(chosen.sites, chosen.signals())).graph_module
    whole = _functional(gm, chosen)
    program = _Program(gm, whole, call, model)
    numbers = {name: torch.tensor(value) for name, value in _FIRST_CALL.items()}
    given = {name: call.args[i] for name, i in program.inputs.items()}
    state = program.cold_state()
    shapes: dict[str, Any] | None = None
    if dynamic_shapes:
        auto = torch.export.Dim.AUTO
        shapes = {name: dynamic_shapes.get(name) for name in given}
        shapes |= dict.fromkeys(numbers)
        shapes["state"] = {
            kind: {name: dict.fromkeys(range(value.ndim), auto) for name, value in of.items()}
            for kind, of in state.items()
        }
        shapes = {"kwargs": shapes}
    with torch.no_grad():
        return torch.export.export(
            program, (), {**given, **numbers, "state": state}, dynamic_shapes=shapes, strict=False
        )


_FIRST_CALL = {"step": 0, "num_steps": -1, "branch": 0}


@dataclasses.dataclass
class _Call:
    """One captured call, and what it was called with."""

    gm: fx.GraphModule
    args: tuple[Any, ...]


class _Captured(Exception):
    """Ends a call whose graph is all that is wanted."""


def _capture(
    model: nn.Module, inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> _Call:
    found: list[_Call] = []

    def backend(captured: fx.GraphModule, _: Sequence[Any]) -> Any:
        gm = capture.own_graph(captured)

        def call(*args: Any) -> Any:
            found.append(_Call(gm, args))
            raise _Captured

        return call

    given = {}
    for name, value in inputs.items():
        given[name] = value.clone() if isinstance(value, Tensor) else value
        for dimension in dynamic_shapes.get(name) or ():
            torch._dynamo.mark_dynamic(given[name], dimension)
    floats = torch._dynamo.config.patch(specialize_float=True)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, isolate_recompiles=True)  # type: ignore[call-overload]
    with torch.no_grad(), floats, contextlib.suppress(_Captured):
        compiled(**given)
    return found[0]


def _functional(gm: fx.GraphModule, policy: Policy) -> Functional:
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n.target != "frame"]
    fakes = [node.meta["example_value"] for node in inputs]
    latent_node = layout_of(gm).latent
    assert latent_node is not None
    latent = latent_node.meta["example_value"]
    slots = slot_shapes(gm, fakes, latent.shape[0], latent.fake_mode)
    with latent.fake_mode:
        return functionalize(gm, policy, slots, latent)


class _Program(nn.Module):
    """What is exported: weights inside, inputs by name, state as two dicts."""

    def __init__(
        self, gm: fx.GraphModule, whole: Functional, call: _Call, model: nn.Module
    ) -> None:
        super().__init__()
        self.whole, self.call = whole.gm, whole
        nodes = [n for n in gm.graph.find_nodes(op="placeholder") if n.target != "frame"]
        names = {node: str(name) for name, node in layout_of(gm).inputs.items()}
        self.inputs = {identifier(names[n]): i for i, n in enumerate(nodes) if n in names}
        """Name of an input -> its place in the captured call."""

        by_node = {nodes[i]: name for name, i in self.inputs.items()}
        owned = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._sources: list[tuple[str, Any]] = []
        for i, node in enumerate(nodes):
            value = call.args[i]
            if node in by_node:
                self._sources.append(("input", by_node[node]))
            elif isinstance(value, Tensor):
                name = identifier(owned.get(id(value), node.name))
                if name not in self._buffers:
                    self.register_buffer(name, value.detach())
                self._sources.append(("weight", name))
            else:
                self._sources.append(_size(node, by_node) or ("constant", value))
        sizes = {
            str(dimension): (name, place)
            for name, i in self.inputs.items()
            for place, dimension in enumerate(nodes[i].meta["example_value"].shape)
        }
        self._concrete = {
            text: call.args[self.inputs[n]].shape[d] for text, (n, d) in sizes.items()
        }
        self.keys = {
            entry.name: (REQUEST if entry.shared else BRANCH, identifier(entry.name))
            for entry in whole.state
        }

    def cold_state(self) -> dict[str, dict[str, Tensor]]:
        """The state before a request's first call."""
        state: dict[str, dict[str, Tensor]] = {BRANCH: {}, REQUEST: {}}
        for entry in self.call.state:
            kind, key = self.keys[entry.name]
            shape = [_evaluate(size, self._concrete) for size in entry.example.shape]
            state[kind][key] = torch.zeros(shape, dtype=entry.example.dtype)
        return state

    def forward(self, **kwargs: Any) -> dict[str, Any]:
        """See the module."""
        args = []
        for kind, what in self._sources:
            if kind == "input":
                args.append(kwargs[what])
            elif kind == "weight":
                args.append(self.get_buffer(what))
            elif kind == "size":
                args.append(kwargs[what[0]].shape[what[1]])
            else:
                args.append(what)
        state, whole = kwargs["state"], self.call
        before = [state[kind][key] for kind, key in (self.keys[e.name] for e in whole.state)]
        made = self.whole(*args, *(kwargs[name] for name in _FIRST_CALL), *before)
        first, last = whole.results, whole.results + len(whole.sites)
        new: dict[str, dict[str, Tensor]] = {BRANCH: {}, REQUEST: {}}
        for name, value in zip(whole.changed, made[last:], strict=True):
            kind, key = self.keys[name]
            new[kind][key] = value
        output = made[0] if first == 1 else tuple(made[:first])
        return {
            "output": output,
            "reused": dict(zip(map(identifier, whole.sites), made[first:last], strict=True)),
            "state": new,
        }


def _size(node: fx.Node, inputs: Mapping[fx.Node, str]) -> tuple[str, Any] | None:
    """A number among a graph's inputs, as the size of one of its tensors."""
    wanted = str(node.meta.get("example_value"))
    for tensor, name in inputs.items():
        for dimension, size in enumerate(tensor.meta["example_value"].shape):
            if not isinstance(size, int) and str(size) == wanted:
                return "size", (name, dimension)
    return None


def _evaluate(size: Any, known: Mapping[str, int]) -> int:
    """A symbolic size for the example's own sizes."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: known[str(symbol)] for symbol in expression.free_symbols}))


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` if all goes well and is gone otherwise."""
    target = pathlib.Path(path)
    if not target.parent.is_dir():
        raise CachePassError(f"`path`={str(path)!r}: {target.parent} is no folder")
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
