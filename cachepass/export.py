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
import json
import operator
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cachepass import capture
from cachepass.errors import CachePassError
from cachepass.ir.boundary import call_inputs, layout_of
from cachepass.lowering.aoti import package
from cachepass.lowering.functional import Functional, functionalize, identifier
from cachepass.lowering.rule import BRANCHES, where_it_stands
from cachepass.lowering.shapes import latent_in, slot_shapes
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.policy import Policy

BRANCH, REQUEST = "branch", "request"
KINDS = (f"{BRANCH}.", f"{REQUEST}.")

METADATA = "cachepass"
"""Key of an ONNX model's metadata: JSON, with the output that each input of the state becomes."""

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
    """
    return _export(
        model, example_inputs, for_model(resolve(policy, options), model), dynamic_shapes
    )


def _export(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    policy: Policy,
    dynamic_shapes: Mapping[str, Any] | None,
) -> ExportedProgram:
    gm, args = _capture(model, example_inputs, dynamic_shapes or {})
    gm = run_passes(gm, default_pipeline(policy.sites, policy.signals())).graph_module
    program = _Program(gm, _functional(gm, policy), args, model)
    numbers = {name: torch.tensor(value) for name, value in _FIRST_CALL.items()}
    given = {name: args[i] for name, i in program.inputs.items()}
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


def export_onnx(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    policy: str | os.PathLike[str] | AnyPolicy = "mixcache",
    options: dict[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> None:
    """A model with its cache as an ONNX file, with `If` nodes whose other branch does not run.

    Inputs and outputs are those of `export`, flat: ``branch.<name>`` and ``request.<name>`` go
    in, ``new.branch.<name>`` and ``new.request.<name>`` come out, and the metadata `cachepass`
    pairs them. `cachepass.onnx.Denoiser` runs it. Weights of more than 2 GB lie beside the file,
    in ``<path>.data``.

    Args:
        model: as in `export`.
        example_inputs: as in `export`.
        path: the file; nothing is left there if the export fails.
        policy: as in `export`.
        options: as in `export`.
        dynamic_shapes: as in `export`.

    Raises:
        CachePassError: the folder is not there, or ONNX has no operator for a node, which it names.
    """
    target = _target(path, ".onnx")
    chosen = for_model(resolve(policy, options), model)
    program = _export(model, example_inputs, chosen, dynamic_shapes)
    inputs, outputs = _flat_names(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own code
            made = torch.onnx.export(
                program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        raise CachePassError(f"the export to ONNX failed: {_reason(error)}") from error
    assert made is not None
    made.model.metadata_props[METADATA] = json.dumps(
        {
            "state": {name: f"new.{name}" for name in inputs if name.startswith(KINDS)},
            "needs_num_steps": chosen.trigger.needs_num_steps,
            "policy": repr(policy),
            "config": _plain(getattr(model, "config", {})),
        }
    )
    with _all_or_nothing(target) as partial:
        made.save(partial)


def export_aoti(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    policy: str | os.PathLike[str] | AnyPolicy = "mixcache",
    options: dict[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> None:
    """A model with its cache, compiled ahead of time: a `.pt2` package of AOTInductor.

    ``torch._inductor.aoti_load_package(path)`` gives a callable with the signature of `export`
    that compiles nothing; C++ loads it as `torch::inductor::AOTIModelPackageLoader`.

    Args:
        model: as in `export`.
        example_inputs: as in `export`.
        path: the file, ending in `.pt2`; nothing is left there if the export fails.
        policy: as in `export`.
        options: as in `export`.
        dynamic_shapes: as in `export`.
    """
    target = _target(path, ".pt2")
    program = export(
        model, example_inputs, policy=policy, options=options, dynamic_shapes=dynamic_shapes
    )
    with _all_or_nothing(target) as partial:
        package(program, partial)


def _target(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    target = pathlib.Path(path)
    if target.suffix != suffix:
        raise CachePassError(f"`path`={str(path)!r}: must end in {suffix}")
    if not target.parent.is_dir():
        raise CachePassError(f"`path`={str(path)!r}: {target.parent} is no folder")
    return target


@contextlib.contextmanager
def _all_or_nothing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to in a folder of its own; all that is there moves to the target's."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield pathlib.Path(folder, target.name)
        for file in sorted(pathlib.Path(folder).iterdir(), key=lambda f: f.name == target.name):
            file.replace(target.with_name(file.name))


def _flat_names(program: ExportedProgram) -> tuple[list[str], list[str]]:
    """Names of all inputs and outputs, in order."""
    given: Any = program.example_inputs
    outputs = pytree.tree_unflatten(
        list(range(program.call_spec.out_spec.num_leaves)), program.call_spec.out_spec
    )
    inputs = [name.removeprefix("state.") for name in _paths(given[1])]
    return inputs, [re.sub(r"^state\.", "new.", name) for name in _paths(outputs)]


def _paths(tree: Any, prefix: str = "") -> Iterator[str]:
    """``a.b`` for the leaves of nested dicts and tuples, in their order."""
    if isinstance(tree, dict):
        for name, inside in tree.items():
            yield from _paths(inside, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(tree, tuple | list):
        for i, inside in enumerate(tree):
            yield from _paths(inside, f"{prefix}.{i}")
    else:
        yield prefix


def _reason(error: BaseException) -> str:
    """What an exporter complains about, in a line: its cause's first one names the node."""
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0][:300]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a model's config."""
    return json.loads(json.dumps(dict(config), default=str))  # type: ignore[no-any-return]


class _Captured(Exception):  # noqa: N818 - no error: it ends a call whose graph is wanted alone
    pass


def _capture(
    model: nn.Module, inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The graph of one call, and what it was called with."""
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(captured: fx.GraphModule, _: Sequence[Any]) -> Any:
        gm = capture.own_graph(captured)

        def call(*args: Any) -> Any:
            found.append((gm, args))
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
        nodes, arguments = call_inputs(gm), layout_of(gm).inputs
        names = {node: identifier(name) for name, node in arguments.items()}
        self.inputs = {names[node]: i for i, node in enumerate(nodes) if node in names}
        """Name of an input -> its place in the captured call."""

        # Sizes that stay open, by their symbol: where a call tells them.
        sizes = {
            str(size): (name, dimension)
            for name, i in self.inputs.items()
            for dimension, size in enumerate(nodes[i].meta["example_value"].shape)
            if not isinstance(size, int)
        }
        self._concrete = {
            symbol: args[self.inputs[name]].shape[dimension]
            for symbol, (name, dimension) in sizes.items()
        }
        owned = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._sources: list[Callable[[Mapping[str, Any]], Any]] = []
        """How each input of the graph is had from those of a call."""

        for node, value in zip(nodes, args, strict=True):
            symbol = str(node.meta.get("example_value"))
            if node in names:
                source: Any = operator.itemgetter(names[node])
            elif isinstance(value, Tensor):
                source = self._weight(identifier(owned.get(id(value), node.name)), value)
            elif symbol in sizes:
                source = _size(*sizes[symbol])
            else:
                source = _constant(value)
            self._sources.append(source)
        self._keys = {
            entry.name: (REQUEST if entry.shared else BRANCH, identifier(entry.name))
            for entry in whole.state
        }

    def _weight(self, name: str, value: Tensor) -> Callable[[Mapping[str, Any]], Tensor]:
        self.register_buffer(name, value.detach())
        return lambda _: self.get_buffer(name)

    def cold_state(self) -> dict[str, dict[str, Tensor]]:
        """The state before a request's first call."""
        state: dict[str, dict[str, Tensor]] = {BRANCH: {}, REQUEST: {}}
        for entry in self._whole.state:
            kind, key = self._keys[entry.name]
            shape = [_evaluate(size, self._concrete) for size in entry.example.shape]
            state[kind][key] = entry.cold(shape)
        return state

    def forward(self, **kwargs: Any) -> dict[str, Any]:
        """See the module."""
        whole, state = self._whole, kwargs["state"]
        before = [state[kind][key] for kind, key in (self._keys[e.name] for e in whole.state)]
        numbers = [kwargs[name] for name in _FIRST_CALL]
        made = self.gm(*(source(kwargs) for source in self._sources), *numbers, *before)
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


def _evaluate(size: Any, known: Mapping[str, int]) -> int:
    """A symbolic size for the example's own sizes."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: known[str(symbol)] for symbol in expression.free_symbols}))
