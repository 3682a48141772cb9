"""How slots keep values: in which type, where, and how much of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cachepass.errors import CachePassError
from cachepass.ir.boundary import Slot

DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

SCALE_BYTES = 4
"""Of a scale: one float32."""

_AHEAD_BYTES = 2**28
"""Of values on their way to a GPU; one may be larger. More would be no memory saved."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What a slot holds for one row."""

    value: Tensor
    step: int
    """The step whose value it is."""

    scale: Tensor | None = None
    """What the value is kept over: its largest magnitude is then the type's."""

    there: torch.cuda.Event | None = None
    """When a copy to the host will have arrived."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that takes memory."""
        return (self.value,) if self.scale is None else (self.value, self.scale)


def is_one_value(kept: Sequence[Kept | None], *, compared: bool) -> bool:
    """Whether rows remember the same.

    Args:
        kept: of each row.
        compared: whether equal numbers will do (calls with equal inputs wrote them), or only one
            tensor.
    """
    values = {id(k.value): k for k in kept if k is not None}
    if len(values) < 2:
        return None not in kept or not values
    first, *others = values.values()
    return (
        compared
        and None not in kept
        and all(
            # A scale, and what may still be on its way to the host, are not looked at.
            other.scale is first.scale is None
            and other.there is first.there is None
            and torch.equal(other.value, first.value)
            for other in others
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """Options of all slots of a model."""

    dtype: torch.dtype | None = None
    """Values of a wider floating type are kept in this one. What signals are measured against is
    kept in 16 bits at least: rounding to 8 is a change of some percent."""

    on_host: bool = False
    """Whether values wait in the host's memory, pinned where there is a GPU."""

    max_bytes: int | None = None
    """Of one request. Sites are left out until the rest fits, the largest first."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            names = ", ".join(map(str, DTYPES))
            raise CachePassError(f"`cache_dtype`={self.dtype}: must be None or one of {names}")
        if self.max_bytes is not None and self.max_bytes < 0:
            raise CachePassError(f"`max_cache_bytes`={self.max_bytes}: must be at least 0")

    def dtype_of(self, slot: Slot, dtype: torch.dtype) -> torch.dtype:
        """The type that a slot's value of this type is kept in."""
        wanted = self.dtype
        if wanted is None or not dtype.is_floating_point:
            return dtype
        if wanted.itemsize == 1 and slot.reference:
            wanted = torch.bfloat16
        return wanted if wanted.itemsize < dtype.itemsize else dtype

    def scales(self, slot: Slot, dtype: torch.dtype) -> bool:
        """Whether a slot's value of this type is kept over a scale: where the range shrinks."""
        kept = self.dtype_of(slot, dtype)
        return kept not in (dtype, torch.bfloat16)  # which has the range of float32

    def keep(self, slot: Slot, value: Tensor, step: int) -> Kept:
        """A value as it is kept."""
        dtype, scale = self.dtype_of(slot, value.dtype), None
        if self.scales(slot, value.dtype):
            top = torch.finfo(dtype).max
            scale = (value.abs().amax().float() / top).clamp_min(torch.finfo(torch.float32).tiny)
            value = value.float() / scale
        value, there = value.to(dtype), None
        if self.on_host and value.device.type == "cuda":
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            host.copy_(value, non_blocking=True)
            there = torch.cuda.Event()
            # Without a stream it would be one of the current device, which may be another.
            there.record(torch.cuda.current_stream(value.device))
            value = host
        return Kept(value, step, scale, there)

    def take(self, kept: Kept, slot: Slot, device: torch.device) -> Tensor:
        """The value again; on a GPU the copy is queued, and nobody waits for it here."""
        value = kept.value.to(device, non_blocking=True)
        if kept.scale is not None:
            return (value.float() * kept.scale).to(slot.dtype)
        return value.to(slot.dtype)


class Prefetch:
    """Values that are on their way from the host while the device computes; of one call.

    Args:
        storage: how they are kept.
        device: where they are wanted.
        wanted: what the call is going to read, in its order.
    """

    def __init__(
        self, storage: Storage, device: torch.device, wanted: Iterable[tuple[Slot, Kept]]
    ) -> None:
        self._storage, self._device = storage, device
        self._wanted = {id(kept): (slot, kept) for slot, kept in wanted}
        """By the id of what is sent for, which is held so that no other gets it."""

        self._coming: dict[int, tuple[Kept, Tensor, torch.cuda.Event]] = {}
        self._ahead = 0
        self._send()

    def _send(self) -> None:
        """Start copies on a stream of their own, as far ahead as there may be."""
        side = _side_stream(self._device)
        with torch.cuda.stream(side):
            while self._wanted and (not self._coming or self._ahead < _AHEAD_BYTES):
                slot, kept = self._wanted.pop(next(iter(self._wanted)))
                if kept.there is not None:
                    side.wait_event(kept.there)
                if kept.scale is not None:
                    kept.scale.record_stream(side)
                value = self._storage.take(kept, slot, self._device)
                event = torch.cuda.Event()
                event.record(side)
                self._coming[id(kept)] = kept, value, event
                self._ahead += value.nbytes

    def take(self, kept: Kept) -> Tensor | None:
        """A value that was sent for, once; the current stream waits for it, the host does not."""
        found = self._coming.pop(id(kept), None)
        if found is None:
            if id(kept) in self._wanted:
                self._pass_over(kept)
            return None
        _, value, event = found
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        value.record_stream(current)
        self._ahead -= value.nbytes
        self._send()
        return value

    def _pass_over(self, kept: Kept) -> None:
        """Go on behind a value: what was wanted before it is not read in this call."""
        self._coming.clear()
        self._ahead = 0
        while next(iter(self._wanted)) != id(kept):
            self._wanted.pop(next(iter(self._wanted)))
        self._wanted.pop(id(kept))
        self._send()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that copies are made on: memory that was freed is reused on its own stream only."""
    return torch.cuda.Stream(device)
