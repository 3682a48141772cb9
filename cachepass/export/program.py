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

import inspect
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cachepass import capture
from cachepass.errors import CachePassError
from cachepass.export.names import BRANCH, REQUEST
from cachepass.export.open_sizes import check_open, hold_to, open_sizes_of
from cachepass.ir.boundary import call_inputs, layout_of
from cachepass.lowering.conditional import equal_outputs
from cachepass.lowering.functional import Entry, Functional, functionalize, identifier
from cachepass.lowering.rule import BRANCHES, where_it_stands
from cachepass.lowering.shapes import latent_in, slot_shapes
from cachepass.pass_manager import run_passes
from cachepass.passes import BatchExperts, default_pipeline
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.policy import Policy

_FIRST_CALL = where_it_stands(0, None, BRANCHES[0])


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
        CachePassError: the model is compiled, or a size that is to stay open is fixed by it.
    """
    chosen = for_model(resolve(policy, options), model)
    return program_of(model, example_inputs, chosen, dynamic_shapes)


def program_of(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    policy: Policy,
    dynamic_shapes: Mapping[str, Any] | None,
) -> ExportedProgram:
    """`export` of a policy that fits the model."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise CachePassError(
            "`model` is compiled: export takes the plain module (cachepass.restore gives a "
            "pipeline its own back)"
        )
    open_sizes = open_sizes_of(example_inputs, dynamic_shapes or {})
    gm, args = capture.capture_call(model, example_inputs, open_sizes)
    passes = default_pipeline(policy.sites, policy.signals())
    # A program that runs elsewhere has no operation of ours.
    passes = tuple(p for p in passes if not isinstance(p, BatchExperts))
    gm = run_passes(gm, passes).graph_module
    program = _Program(gm, _functional(gm, policy), args, model)
    numbers = {name: torch.tensor(value) for name, value in _FIRST_CALL.items()}
    given = {name: args[i] for name, i in program.inputs.items()}
    state = program.cold_state()
    shapes: dict[str, Any] | None = None
    if open_sizes:
        # Whatever follows from an open size is open, too; torch.export finds out how.
        shapes = {identifier(name): sizes for name, sizes in open_sizes.items()}
        shapes = {name: shapes.get(name) for name in (*given, *numbers)}
        shapes["state"] = program.open_state()
    with torch.no_grad(), equal_outputs():
        exported = torch.export.export(
            program, (), {**given, **numbers, "state": state}, dynamic_shapes=shapes, strict=False
        )
    check_open(exported, open_sizes)
    _forget_generated_code(exported)
    return exported


def _forget_generated_code(program: ExportedProgram) -> None:
    """Drop traces that lead into code which FX wrote: they tell nobody anything, in megabytes."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if "<eval_with_key>" in (node.stack_trace or ""):
                del node.meta["stack_trace"]


def _functional(gm: fx.GraphModule, policy: Policy) -> Functional:
    fakes = [node.meta["example_value"] for node in call_inputs(gm)]
    latent: Any = latent_in(gm, fakes)
    slots = slot_shapes(gm, fakes, latent.fake_mode)
    with latent.fake_mode:
        return functionalize(gm, policy, slots, latent)


class _Program(nn.Module):
    """What is exported: weights inside, inputs by name, state as two dicts."""

    def __init__(
        self, gm: fx.GraphModule, whole: Functional, args: Sequence[Any], model: nn.Module
    ) -> None:
        super().__init__()
        self.gm, self._whole = whole.gm, whole
        self.weights = nn.Module()  # a place of their own, as they may have any name
        nodes, arguments = call_inputs(gm), layout_of(gm).inputs
        names = {node: identifier(name) for name, node in arguments.items()}
        self.inputs = {names[node]: i for i, node in enumerate(nodes) if node in names}
        """Name of an input -> its place in the captured call."""

        # Sizes that stay open, by their symbol: where a call tells them.
        self._sizes = {
            size.node.expr: (name, dimension)
            for name, i in self.inputs.items()
            for dimension, size in enumerate(nodes[i].meta["example_value"].shape)
            if not isinstance(size, int)
        }
        symbols = {str(symbol): place for symbol, place in self._sizes.items()}
        self._example = {name: args[i] for name, i in self.inputs.items()}
        owned = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._sources: list[Callable[[Mapping[str, Any]], Any]] = []
        """How each input of the graph is had from those of a call."""

        for node, value in zip(nodes, args, strict=True):
            symbol = str(node.meta.get("example_value"))
            if node in names:
                source: Any = operator.itemgetter(names[node])
            elif isinstance(value, Tensor):
                source = self._weight(identifier(owned.get(id(value), node.name)), value)
            elif symbol in symbols:
                source = _size(*symbols[symbol])
            else:
                source = _constant(value)
            self._sources.append(source)
        self._keys = {
            entry.name: (REQUEST if entry.shared else BRANCH, identifier(entry.name))
            for entry in whole.state
        }
        # By name, which torch.export asks for: its dynamic shapes fit no **kwargs.
        self.forward = self._call_by_name()

    def _call_by_name(self) -> Callable[..., dict[str, Any]]:
        def forward(**given: Any) -> dict[str, Any]:
            return self._call(given)

        names = (*self.inputs, *_FIRST_CALL, "state")
        by_name = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
        return forward

    def _weight(self, name: str, value: Tensor) -> Callable[[Mapping[str, Any]], Tensor]:
        self.weights.register_buffer(name, value.detach())
        return lambda _: self.weights.get_buffer(name)

    def cold_state(self) -> dict[str, dict[str, Tensor]]:
        """The state before a request's first call."""
        state: dict[str, dict[str, Tensor]] = {BRANCH: {}, REQUEST: {}}
        for entry in self._whole.state:
            kind, key = self._keys[entry.name]
            state[kind][key] = entry.cold(self._shape(entry, self._example))
        return state

    def open_state(self) -> dict[str, dict[str, dict[int, Any]]]:
        """The sizes of the state that follow from open ones of the inputs."""
        found: dict[str, dict[str, dict[int, Any]]] = {BRANCH: {}, REQUEST: {}}
        for entry in self._whole.state:
            kind, key = self._keys[entry.name]
            sizes = enumerate(entry.example.shape)
            found[kind][key] = {i: Dim.AUTO for i, size in sizes if not isinstance(size, int)}
        return found

    def _shape(self, entry: Entry, given: Mapping[str, Any]) -> list[Any]:
        """Of a tensor of the state, for a call's inputs."""
        known = {s: given[name].shape[i] for s, (name, i) in self._sizes.items()}
        return [
            size if isinstance(size, int)
            else sympy_interp(PythonReferenceAnalysis, known, size.node.expr)
            for size in entry.example.shape
        ]  # fmt: skip

    def _call(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """See the module."""
        whole, state = self._whole, given["state"]
        before = []
        for entry in whole.state:
            kind, key = self._keys[entry.name]
            hold_to(state[kind][key], self._shape(entry, given))
            before.append(state[kind][key])
        numbers = [given[name] for name in _FIRST_CALL]
        # Node by node, which is how torch learns where one comes from.
        inputs = (source(given) for source in self._sources)
        with fx.traceback.preserve_node_meta():
            made = fx.Interpreter(self.gm).run(*inputs, *numbers, *before)
        results, reused, changed = whole.parts(made)
        new: dict[str, dict[str, Tensor]] = {BRANCH: {}, REQUEST: {}}
        for name, value in zip(whole.changed, changed, strict=True):
            kind, key = self._keys[name]
            new[kind][key] = value
        return {
            "output": results[0] if len(results) == 1 else tuple(results),
            "reused": dict(zip(whole.sites, reused, strict=True)),
            "state": new,
        }


def _size(name: str, dimension: int) -> Callable[[Mapping[str, Any]], Any]:
    return lambda kwargs: kwargs[name].shape[dimension]


def _constant(value: Any) -> Callable[[Mapping[str, Any]], Any]:
    return lambda _: value
