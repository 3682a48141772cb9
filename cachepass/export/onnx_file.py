"""A cached model as a file of ONNX."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from cachepass.errors import CachePassError
from cachepass.export.files import all_or_nothing, target_of
from cachepass.export.names import becomes, flat_names
from cachepass.export.program import program_of
from cachepass.lowering.conditional import equal_outputs
from cachepass.runtime.policies import AnyPolicy, for_model, resolve

METADATA = "cachepass"
"""Key of the metadata: JSON, with the output that each input of the state becomes."""

_LARGEST_FILE = 256 * 2**20
"""Bytes of weights inside of a file. A message of protobuf holds 2 GB, and while onnxruntime loads
it, it holds a weight once more for each branch around it."""


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
    pairs them. `cachepass.onnx.Denoiser` runs it. Weights of more than 256 MB lie beside the file,
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
    target = target_of(path, ".onnx")
    chosen = for_model(resolve(policy, options), model)
    program = program_of(model, example_inputs, chosen, dynamic_shapes)
    inputs, outputs = flat_names(program)
    try:
        with _quiet(), equal_outputs():
            _choose_in_words(program)
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise CachePassError(f"the export to ONNX failed: {_reason(error)}") from error
    assert made is not None
    made.model.metadata_props[METADATA] = json.dumps(
        {
            "state": becomes(inputs),
            "needs_num_steps": chosen.trigger.needs_num_steps,
            "policy": repr(policy),
            "config": _plain(getattr(model, "config", {})),
        }
    )
    _sink_weights(made.model.graph)
    weights = [v.const_value for g in made.model.graphs() for v in g.initializers.values()]
    size = sum(weight.nbytes for weight in weights if weight is not None)
    with all_or_nothing(target) as partial:
        made.save(partial, external_data=size > _LARGEST_FILE)


def _choose_in_words(program: ExportedProgram) -> None:
    """Rewrite choices between booleans: onnxruntime has no kernel of `Where` for them."""
    aten = torch.ops.aten
    for part in program.graph_module.modules():
        for node in list(part.graph.nodes) if isinstance(part, fx.GraphModule) else ():
            of_booleans = getattr(node.meta.get("val"), "dtype", None) == torch.bool
            if not of_booleans or node.target not in (aten.where.self, aten.masked_fill.Scalar):
                continue

            def call(target: Any, *args: Any, like: fx.Node = node) -> fx.Node:
                made = like.graph.call_function(target, args)
                made.meta = dict(like.meta)
                return made

            with part.graph.inserting_before(node):
                if node.target is aten.where.self:
                    mask, a, b = node.args
                    a = call(aten.logical_and.default, a, mask)
                else:
                    b, mask, fill = node.args
                    a = mask if fill else None
                b = call(
                    aten.logical_and.default, b, call(aten.logical_not.default, mask, like=mask)
                )
                chosen = b if a is None else call(aten.logical_or.default, a, b)
            node.replace_all_uses_with(chosen)
            if part is program.graph_module:
                program.graph_signature.replace_all_uses(node.name, chosen.name)
            part.graph.erase_node(node)


def _sink_weights(graph: Any) -> None:
    """Move a weight into the branch that alone uses it.

    onnxruntime packs weights for its matrix products at load, but none that a branch inside of a
    branch takes from outside (1.31: a call that computes is 3 % slower).
    """
    arms = {inner: arm for arm in _arms(graph) for inner in (arm, *arm.subgraphs())}
    for name, weight in list(graph.initializers.items()):
        users = {arms.get(use.node.graph) for use in weight.uses()}
        if len(users) == 1 and not weight.is_graph_output() and (arm := users.pop()) is not None:
            del graph.initializers[name]
            arm.register_initializer(weight)
    for arm in _arms(graph):
        _sink_weights(arm)


def _arms(graph: Any) -> list[Any]:
    """The branches of the conditionals that stand in a graph itself."""
    conditionals = [node for node in graph if node.op_type == "If"]
    return [attribute.as_graph() for node in conditionals for attribute in node.attributes.values()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter has to say of its own code, of torchvision and of folding."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What is in the way: the operator, its node, its module, and the line of the user's code."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    reason = (str(causes[-1]).strip().splitlines() or [repr(causes[-1])])[0][:300]
    found = [node for node in map(_node_in, causes) if node is not None]
    if not found:
        return reason
    node = found[-1]
    module = (node.meta.get("custom") or {}).get("module")
    # The last lines of a trace are the code and its markers.
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    code = [line for line in lines if line.strip("^~ ")][-2:]
    return "; ".join(
        (
            f"node {node.name!r}" + (f" in module {module!r}" if module else ""),
            *([": ".join(code)] if code else []),
            reason,
            "compute it otherwise, or take cachepass.export or export_aoti, which run all of torch",
        )
    )


def _node_in(error: BaseException) -> fx.Node | None:
    """The node at which the exporter was: it decomposes a graph of its own, and says the name."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    nodes = [frame.f_locals.get("node") for frame in frames]
    return next((node for node in reversed(nodes) if isinstance(node, fx.Node)), None)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a model's config."""
    return json.loads(json.dumps(dict(config), default=str))  # type: ignore[no-any-return]
