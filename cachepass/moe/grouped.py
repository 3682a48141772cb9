"""A linear layer for each expert, over rows that are sorted by expert, as one operation.

What a routed layer computes is `route`, experts in which each linear layer is `grouped_linear`
(what lies between works on rows, and on all of them at once), and `combine`. To a capture none of
it looks at data, so it is held whole. How the product is computed depends on where it runs:

- CPU: one product after another, over the experts that have rows. Where they have few, most of
  the time would go into laying weights out for the product: then a packed copy is used, which is
  kept. `torch.nn.functional.grouped_mm` does the same there, for empty experts too (docs/moe.md).
- CUDA: the Triton kernel, which reads the weights through a list of pointers. Without Triton, or
  where weights lie in several ways, `grouped_mm` on a packed copy; where that does not take them
  either, one product after another.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cachepass.errors import CachePassError

MOST_EXPERTS = 1024
"""What the kernel's task map holds: a program looks at all of it at once."""

PACK_BELOW = 128
"""Rows for each expert, on average, from which on a packed copy gains nothing on a CPU."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SAMPLES = 8


def route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices of experts by expert.

    Args:
        index: the experts of each token, (tokens, k).
        experts: how many there are.

    Returns:
        rows: the token of each choice, in the order of experts.
        offsets: int32, where the choices of each expert end.
        place: where each choice, in the order of tokens, was sorted to.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    numbers = torch.arange(experts, device=index.device, dtype=index.dtype)
    offsets = torch.searchsorted(flat[order], numbers, right=True, out_int32=True)
    return order // index.shape[-1], offsets, order.argsort()


def combine(results: Tensor, place: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The weighted sum of what the experts of each token gave.

    A sum over each token's own choices, in their order: equal in every run, unlike atomic adds.

    Args:
        results: of each choice, (choices, out), sorted by expert.
        place: where each choice, in the order of tokens, was sorted to.
        weight: of each choice, (tokens, k).
        x: the tokens as they came, (..., in).

    Returns:
        (..., out).
    """
    chosen = results.index_select(0, place).view(*weight.shape, -1)
    total = (chosen * weight.unsqueeze(-1)).sum(-2).to(results.dtype)
    return total.view(*x.shape[:-1], total.shape[-1])


@torch.library.custom_op("cachepass::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """Row by row, the linear layer of the expert that the row belongs to.

    Args:
        x: (tokens, in) if there are `rows`, else (choices, in), sorted by expert.
        rows: the row of `x` for each choice; they are gathered on the way.
        offsets: int32, where the choices of each expert end.
        weights: (out, in) for each expert.
        biases: (out,) for each expert, or none.
    """
    choices = x.shape[0] if rows is None else rows.shape[0]
    if x.is_cuda and _has_triton() and kernel_takes(x, rows, offsets, weights, biases):
        # Triton is there on a machine with CUDA alone.
        from cachepass.moe.triton_kernel import triton_grouped_linear

        return triton_grouped_linear(x, rows, offsets, weights, biases)
    gathered = x if rows is None else x.index_select(0, rows)
    if x.is_cuda and _packable(gathered, weights[0]):
        out = F.grouped_mm(gathered, _packed(weights).weights, offs=offsets)
        if biases:
            counts = offsets.diff(prepend=offsets.new_zeros(1))
            every = torch.stack(list(biases))
            out += every.repeat_interleave(counts, dim=0, output_size=choices)
        return out
    few = choices < PACK_BELOW * len(weights)
    if few and not x.is_cuda and _packable(gathered, weights[0]):
        right = _packed(weights).right
    else:
        right = [weight.t() for weight in weights]
    return _one_by_one(gathered, offsets, right, biases)


@_grouped_linear.register_fake
def _(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    return x.new_empty((x if rows is None else rows).shape[0], weights[0].shape[0])


grouped_linear = torch.ops.cachepass.grouped_linear.default
"""As a graph calls it."""


def kernel_takes(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> bool:
    """Whether all that the kernel reads through bare pointers is what it takes it for.

    Raises:
        CachePassError: more experts than its task map holds.
    """
    if len(weights) > MOST_EXPERTS:
        raise CachePassError(
            f"a layer has {len(weights)} routed experts: the task map of the kernel holds at most "
            f"{MOST_EXPERTS}. Split the layer in two, or run it on a CPU, which needs no map"
        )
    first, indices = weights[0], [offsets] if rows is None else [offsets, rows]
    alike = all(w.shape == first.shape and w.stride() == first.stride() for w in weights)
    same = all(t.dtype == x.dtype and t.device == x.device for t in (*weights, *biases))
    dense = all(t.is_contiguous() for t in (*biases, *indices))
    there = all(t.device == x.device for t in indices) and offsets.dtype == torch.int32
    near = max(x.stride(-1), first.stride(-1)) * first.shape[1] < 2**31  # along a row it counts so
    return alike and same and dense and there and near and x.dtype in _KERNEL_DTYPES


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _one_by_one(
    x: Tensor, offsets: Tensor, right: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    out = x.new_empty(x.shape[0], right[0].shape[1])
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    parts = zip(x.split(counts), out.split(counts), right, strict=True)
    for i, (given, result, weight) in enumerate(parts):
        if not counts[i]:
            continue
        if biases:
            torch.addmm(biases[i], given, weight, out=result)
        else:
            torch.mm(given, weight, out=result)
    return out


# ------------------------------------------------------------------------------ packing


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """The weights of all experts, (experts, in, out), and what they were taken from."""

    weights: Tensor
    right: Sequence[Tensor]
    """Of each expert, as the right side of a product."""
    sources: Sequence[weakref.ref[Tensor]]
    state: Sequence[tuple[int, int]]
    views: Sequence[Tensor]
    """A few elements of each weight, where they lie."""
    samples: Tensor
    """Their values when the weights were packed."""

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether nothing was written to or replaced since.

        Writes through `.data` count no version, and adapters are fused so: hence the samples.
        """
        same = len(weights) == len(self.sources) and all(
            source() is weight for source, weight in zip(self.sources, weights, strict=True)
        )
        return (
            same
            and _state(weights) == self.state
            and torch.equal(torch.cat(list(self.views)), self.samples)
        )


_PACKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the weight of the first expert: the copy goes when the model does."""


def _packable(x: Tensor, weight: Tensor) -> bool:
    """Whether a copy can be kept, and on CUDA whether `grouped_mm` takes it."""
    if weight.is_inference() or x.dtype != weight.dtype:
        return False  # inference tensors count no versions: a copy of them might be stale
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape)
    return not x.is_cuda or (x.dtype == torch.bfloat16 and aligned)


def _packed(weights: Sequence[Tensor]) -> _Pack:
    pack: _Pack | None = _PACKS.get(weights[0])
    if pack is None or not pack.holds(weights):
        count = min(_SAMPLES, weights[0].numel())
        step = max(1, weights[0].numel() // count - 1)
        views = [torch.as_strided(weight.detach(), (count,), (step,)) for weight in weights]
        stacked = torch.stack([weight.detach().t() for weight in weights])
        pack = _Pack(
            weights=stacked,
            right=stacked.unbind(),
            sources=[weakref.ref(weight) for weight in weights],
            state=_state(weights),
            views=views,
            samples=torch.cat(views),
        )
        _PACKS[weights[0]] = pack
    return pack


def _state(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]
