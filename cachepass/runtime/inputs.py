"""The inputs of a rewritten graph: which is the latent, which are weights, which carry rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.ir.boundary import call_inputs, layout_of
from cachepass.ir.ops import COUNT
from cachepass.ir.rows import carried
from cachepass.runtime import batch

_VERSION = operator.attrgetter("_version")


class Inputs:
    """Places among the arguments of a graph, but for the frame."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.layout = layout_of(gm)
        self.computation: object = gm.meta.get("computation")
        """Equal for graphs of the same code, whatever their sizes."""

        places = call_inputs(gm)
        index = {n: i for i, n in enumerate(places)}
        assert self.layout.latent is not None
        self.latent = index[self.layout.latent]
        time = self.layout.timestep
        self.timestep = index[time] if time is not None else None
        self.conditioning = [
            i for n in self.layout.inputs.values()
            if (i := index[n]) not in (self.latent, self.timestep)
        ]  # fmt: skip
        self.arguments = [i for i, n in enumerate(places) if not n.meta.get("weight")]
        weights = [i for i, n in enumerate(places) if n.meta.get("weight")]
        # In an order that graphs of one model share.
        weights.sort(key=lambda i: str(places[i].meta.get("argument")))
        self._weights_of = operator.itemgetter(*weights, weights[0])  # a tuple, even of one
        found = carried(self.layout, places, ())
        self.carried = found[0] if found is not None else None
        """How each input carries rows (see `ir.ops.Carried`); None where the batch is fixed."""

    def rows(self, args: Sequence[Any]) -> int:
        """Rows of a call."""
        count: int = 1 if self.layout.listed else args[self.latent].shape[0]
        return count

    def weights(self, args: Sequence[Any]) -> tuple[int, int]:
        """Changes when a weight is written to or replaced."""
        weights = self._weights_of(args)
        # Inference tensors count no versions.
        uncounted = torch.is_inference_mode_enabled() or weights[0].is_inference()
        versions = 0 if uncounted else sum(map(_VERSION, weights))
        return versions, hash(tuple(map(Tensor.data_ptr, weights)))

    def text(self, args: Sequence[Any]) -> tuple[torch.Size, ...]:
        """Shapes of a row's conditioning."""
        rows = self.rows(args)
        return tuple(
            batch.shape_of_one(args[i].shape, self._dim(i, args[i], rows), rows)
            for i in self.conditioning
        )

    def _dim(self, place: int, value: Tensor, rows: int) -> int | None:
        if self.carried is None:
            return 0 if batch.in_front(value, rows) else None
        dim = self.carried[place]
        return dim if isinstance(dim, int) else None

    def signature(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What compiled code depends on; of what carries rows, all but their number."""
        found = []
        for i in self.arguments:
            way = self.carried[i] if self.carried is not None else None
            if way == COUNT:
                continue
            (facts,) = signature_of([args[i]])
            if isinstance(way, int):
                shape, *others = facts
                facts = (shape[:way], shape[way + 1 :], *others)
            found.append(facts)
        return tuple(found)


def signature_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What compiled code depends on: shapes, strides, dtypes, devices, plain values."""
    return tuple(
        (_plain(i.shape), _plain(i.stride()), i.dtype, i.device) if isinstance(i, Tensor)
        else _plain((i,))[0]
        for i in inputs
    )  # fmt: skip


def _plain(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes that can be looked up: symbols by their spelling."""
    return tuple(str(n) if isinstance(n, torch.SymInt) else n for n in sizes)
