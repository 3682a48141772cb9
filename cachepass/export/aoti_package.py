"""A cached model as a package of AOTInductor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from cachepass.export.files import all_or_nothing, target_of
from cachepass.export.names import becomes, flat_names
from cachepass.export.program import export
from cachepass.lowering.aoti import package
from cachepass.runtime.policies import AnyPolicy


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
    that compiles nothing; C++ loads it as `torch::inductor::AOTIModelPackageLoader`, and takes and
    gives flat lists. Its metadata says what stands where: `cachepass.inputs` names the inputs in
    front, `cachepass.state` has a line for each input behind them, ``branch|request dtype
    size,size,... place``, place being that of the output that it becomes, -1 if it stays.

    Args:
        model: as in `export`.
        example_inputs: as in `export`.
        path: the file, ending in `.pt2`; nothing is left there if the export fails.
        policy: as in `export`.
        options: as in `export`.
        dynamic_shapes: as in `export`.
    """
    target = target_of(path, ".pt2")
    program = export(
        model, example_inputs, policy=policy, options=options, dynamic_shapes=dynamic_shapes
    )
    with all_or_nothing(target) as partial:
        package(program, partial, _metadata(program))


def _metadata(program: ExportedProgram) -> dict[str, str]:
    inputs, outputs = flat_names(program)
    pairs = becomes(inputs)
    nodes = program.graph.find_nodes(op="placeholder")[-len(inputs) :]
    lines = []
    for name, node in zip(inputs, nodes, strict=True):
        if name in pairs:
            value: Tensor = node.meta["val"]
            place = outputs.index(pairs[name]) if pairs[name] in outputs else -1
            dtype = str(value.dtype).removeprefix("torch.")
            shape = ",".join(str(size) for size in value.shape)
            lines.append(f"{name.partition('.')[0]} {dtype} {shape} {place}")
    front = [name for name in inputs if name not in pairs]
    return {"cachepass.inputs": " ".join(front), "cachepass.state": "\n".join(lines)}
