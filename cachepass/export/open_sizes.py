"""Sizes that a program leaves open: asked for, carried over to the state, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from cachepass.errors import CachePassError
from cachepass.lowering.functional import identifier


def open_sizes_of(
    inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> dict[str, dict[int, Any]]:
    """Input -> dimension -> a hint with the bounds that were asked for."""
    found: dict[str, dict[int, Any]] = {}
    for name, dimensions in dynamic_shapes.items():
        if not isinstance(inputs.get(name), Tensor):
            raise CachePassError(
                f"`dynamic_shapes` names {name!r}, which is no tensor among `example_inputs`: "
                f"{', '.join(k for k, v in inputs.items() if isinstance(v, Tensor))}"
            )
        places = dimensions.items() if isinstance(dimensions, Mapping) else enumerate(dimensions)
        found[name] = {
            place: Dim.AUTO(min=getattr(dim, "min", None), max=getattr(dim, "max", None))
            for place, dim in places
            if dim is not None and dim != Dim.STATIC
        }
    return {name: sizes for name, sizes in found.items() if sizes}


def check_open(program: ExportedProgram, open_sizes: Mapping[str, Mapping[int, Any]]) -> None:
    """Raise where a size that was to stay open is fixed in the program."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for name, sizes in open_sizes.items():
        shape = nodes[identifier(name)].meta["val"].shape
        for place in sizes:
            if is_concrete_int(shape[place]):
                raise CachePassError(
                    f"`dynamic_shapes` opens dimension {place} of {name!r}, but the model's graph "
                    f"holds for {shape[place]} alone: leave it out, or give an example in which "
                    "open sizes are at least 2 and differ from each other"
                )


def hold_to(value: Tensor, shape: Sequence[Any]) -> None:
    """Let the sizes of a tensor of the state be those that the inputs tell."""
    for size, wanted in zip(value.shape, shape, strict=True):
        torch._check(size == wanted)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            # torch does so itself where nothing is divided. Both arms of a conditional have to
            # return sizes that are the same expressions.
            size.node.shape_env._set_replacement(size.node.expr, wanted.node.expr, "state")
