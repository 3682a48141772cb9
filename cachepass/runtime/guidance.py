"""Guidance whose two branches lie in one batch, taken apart into two calls.

A cached unconditional half cannot be left out of a call of both halves, and what is cached,
decided and measured belongs to a branch. So such a call becomes two, the conditional one
first, and their outputs are joined again; rows do not know each other, so the result is the
same. Only policies with a `cfg` site are worth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachepass.runtime.batch import in_front

Guidance = Literal["concat", "concat-cond-first"]
"""How the branches lie in a batch: the unconditional rows first (as in diffusers), or last."""

CONCATENATED = "cond_uncond"
"""What diffusers' pipelines call the context of such a call."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def latent_among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The latent of a call: its first floating tensor of three dimensions or more."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point():
            return value
    return None


def rows_among(kwargs: Mapping[str, Any]) -> int:
    """The rows of a call: those of its latent, one if it has none."""
    latent = latent_among((), kwargs)
    return latent.shape[0] if latent is not None else 1


def halves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Arguments, Arguments] | None:
    """The arguments of the first and of the second half of the rows.

    None where the latents of the halves are not equal, as those of two branches of one request
    are. What has as many rows as the latent is cut; all else goes to both.
    """
    latent = latent_among(args, kwargs)
    if latent is None or latent.shape[0] % 2:
        return None
    rows = latent.shape[0]
    first, second = latent.chunk(2)
    if not torch.equal(first, second):
        return None

    def half(index: int) -> Arguments:
        def cut(value: Any) -> Any:
            return value.chunk(2)[index] if in_front(value, rows) else value

        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    return half(0), half(1)


def join(first: Any, second: Any) -> Any:
    """Two outputs as one, row after row; of tensors, tuples or what diffusers' models return."""
    return pytree.tree_map(lambda a, b: torch.cat([a, b]), first, second)
