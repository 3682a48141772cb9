"""A cached model as a file of ONNX."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cachepass.errors import CachePassError
from cachepass.export.files import all_or_nothing, target_of
from cachepass.export.program import BRANCH, REQUEST, program_of
from cachepass.lowering.conditional import equal_outputs
from cachepass.runtime.policies import AnyPolicy, for_model, resolve

METADATA = "cachepass"
"""Key of the metadata: JSON, with the output that each input of the state becomes."""

_KINDS = (f"{BRANCH}.", f"{REQUEST}.")


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
    target = target_of(path, ".onnx")
    chosen = for_model(resolve(policy, options), model)
    program = program_of(model, example_inputs, chosen, dynamic_shapes)
    inputs, outputs = _flat_names(program)
    try:
        with warnings.catch_warnings(), equal_outputs():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own code
            made = torch.onnx.export(
                program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        raise CachePassError(f"the export to ONNX failed: {_reason(error)}") from error
    assert made is not None
    made.model.metadata_props[METADATA] = json.dumps(
        {
            "state": {name: f"new.{name}" for name in inputs if name.startswith(_KINDS)},
            "needs_num_steps": chosen.trigger.needs_num_steps,
            "policy": repr(policy),
            "config": _plain(getattr(model, "config", {})),
        }
    )
    with all_or_nothing(target) as partial:
        made.save(partial)


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
