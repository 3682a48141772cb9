"""Calls of several requests as one: which can be, what goes in, and whose what comes out is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from cachepass.errors import CachePassError
from cachepass.runtime.batch import in_front
from cachepass.runtime.guidance import rows_among

Output = Any
"""Of a request's call: a tensor, or a tuple of them where the model returns several."""


Kind = tuple[tuple[str, object], ...]
"""Of each argument of a call, by name, what has to be the same in calls that are one batch."""


def kind_of(given: Mapping[str, Any]) -> Kind:
    """Of a call."""
    rows = rows_among(given)
    found: list[tuple[str, object]] = []
    for name, value in sorted(given.items()):
        if in_front(value, rows):
            found.append((name, (value.shape[1:], value.dtype)))
        else:  # shared by all rows: tensors, also inside of something, have to be the very same
            leaves, tree = tree_flatten(value)
            same = (id(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
            found.append((name, (str(tree), *same)))
    return tuple(found)


def why_apart(kinds: Iterable[Kind]) -> str:
    """What keeps calls of different kinds from being one batch."""
    first, *others = map(dict, kinds)
    differ = {n for other in others for n in {*first, *other} if first.get(n) != other.get(n)}
    return (
        f"called apart from other requests: {', '.join(map(repr, sorted(differ)))} differ in shape "
        "or, where a request's samples do not lie in front, in value"
    )


def shapes_of(given: Mapping[str, Any]) -> object:
    """Equal for calls whose rows hold as much."""
    leaves, tree = tree_flatten(dict(sorted(given.items())))
    rows = rows_among(given)

    def kind(leaf: Any) -> object:
        if isinstance(leaf, Tensor):
            return leaf.shape[1:] if in_front(leaf, rows) else leaf.shape, leaf.dtype
        # A number of steps or a size; a timestep that is a float is another in each step.
        return leaf if isinstance(leaf, (int, str)) else type(leaf)

    return str(tree), tuple(map(kind, leaves))


def joined(name: str, given: Sequence[Mapping[str, Any]]) -> Any:
    """One argument of a call, from those of calls of one kind."""
    first = given[0][name]
    if len(given) == 1 or not in_front(first, rows_among(given[0])):
        return first
    return torch.cat([g[name] for g in given])


def taken_apart(made: Any, samples: Sequence[int]) -> Sequence[Output]:
    """The output of each request, from that of a call for all of them; each has some samples."""
    leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    if not leaves and isinstance(getattr(made, "sample", None), Tensor):  # an object of its own
        leaves = [made.sample]
    if not leaves:
        raise CachePassError(f"the model returned a {type(made).__name__}, and no tensor in it")
    split = [_parts(leaf, samples) for leaf in leaves]
    return [parts[0] if len(parts) == 1 else parts for parts in zip(*split, strict=True)]


def _parts(leaf: Tensor, samples: Sequence[int]) -> Sequence[Tensor]:
    if not in_front(leaf, sum(samples)):
        return [leaf] * len(samples)
    parts: Sequence[Tensor] = leaf.split(list(samples))
    return parts
