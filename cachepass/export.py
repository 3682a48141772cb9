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
import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cachepass import capture
from cachepass.errors import CachePassError
from cachepass.ir.boundary import layout_of
from cachepass.lowering.aoti import package
from cachepass.lowering.functional import Functional, functionalize, identifier
from cachepass.lowering.shapes import slot_shapes
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.policy import Policy

BRANCH, REQUEST = "branch", "request"
KINDS = (f"{BRANCH}.", f"{REQUEST}.")


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


METADATA = "cachepass"
"""Key of an ONNX model's metadata: JSON, with the output that each input of the state becomes."""


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
    program = export(
        model, example_inputs, policy=policy, options=options, dynamic_shapes=dynamic_shapes
    )
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
    names = {
        "output": "output", "reused": "reused", f"state.{BRANCH}": f"new.{BRANCH}",
        f"state.{REQUEST}": f"new.{REQUEST}",
    }  # fmt: skip
    flat = list(_paths(outputs))
    for old, new in names.items():
        flat = [new + name[len(old) :] if name.startswith(old) else name for name in flat]
    inputs = [name.removeprefix("state.") for name in _paths(given[1])]
    return inputs, flat


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


@dataclasses.dataclass
class _Call:
    """One captured call, and what it was called with."""

    gm: fx.GraphModule
    args: tuple[Any, ...]


class _Captured(Exception):  # noqa: N818 - no error: it ends a call whose graph is wanted alone
    pass


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
            "reused": dict(zip(whole.sites, made[first:last], strict=True)),
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
