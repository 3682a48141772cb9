"""Names of a program's inputs and outputs, flat and in their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

BRANCH, REQUEST = "branch", "request"
"""The two parts of the state."""

_STATE = (f"{BRANCH}.", f"{REQUEST}.")


def flat_names(program: ExportedProgram) -> tuple[list[str], list[str]]:
    """(inputs, outputs): ``branch.<name>`` is state going in, ``new.branch.<name>`` coming out."""
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


def becomes(inputs: Iterable[str]) -> dict[str, str]:
    """Input of the state -> the output that takes its place, if there is one."""
    return {name: f"new.{name}" for name in inputs if name.startswith(_STATE)}
