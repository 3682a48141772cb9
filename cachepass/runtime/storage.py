"""How slots keep values: in which type, where, and how much of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from cachepass.errors import CachePassError
from cachepass.ir.boundary import Slot

DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What a slot holds for one row."""

    value: Tensor
    step: int
    """The step whose value it is."""

    scale: Tensor | None = None
    """Of an 8-bit value, which is kept over it: its largest magnitude is the type's."""

    there: torch.cuda.Event | None = None
    """When a copy to the host will have arrived."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that takes memory."""
        return (self.value,) if self.scale is None else (self.value, self.scale)


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

    def keep(self, slot: Slot, value: Tensor, step: int) -> Kept:
        """A value as it is kept."""
        dtype, scale = self.dtype_of(slot, value.dtype), None
        if dtype.itemsize == 1:
            top = torch.finfo(dtype).max
            scale = (value.abs().amax().float() / top).clamp_min(torch.finfo(torch.float32).tiny)
            value = value.float() / scale
        value, there = value.to(dtype), None
        if self.on_host and value.device.type == "cuda":
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            there = torch.cuda.Event()
            there.record()
        return Kept(value, step, scale, there)

    def take(self, kept: Kept, slot: Slot, device: torch.device) -> Tensor:
        """The value again; on a GPU the copy is queued, and nobody waits for it here."""
        value = kept.value.to(device, non_blocking=True)
        if kept.scale is not None:
            return (value.float() * kept.scale).to(slot.dtype)
        return value.to(slot.dtype)


class Prefetch:
    """Values that are on their way from the host while the device computes; of one call."""

    def __init__(self, storage: Storage, device: torch.device) -> None:
        self._storage, self._device = storage, device
        self._side = torch.cuda.Stream(device)
        self._coming: dict[int, tuple[Kept, Tensor, torch.cuda.Event]] = {}
        """By the id of what is sent for, which is held so that no other gets it."""

    def send(self, wanted: Iterable[tuple[Slot, Kept]]) -> None:
        """Start copies on a stream of their own."""
        with torch.cuda.stream(self._side):
            for slot, kept in wanted:
                if kept.there is not None:
                    self._side.wait_event(kept.there)
                if kept.scale is not None:
                    kept.scale.record_stream(self._side)
                value = self._storage.take(kept, slot, self._device)
                event = torch.cuda.Event()
                event.record(self._side)
                self._coming[id(kept)] = kept, value, event

    def take(self, kept: Kept) -> Tensor | None:
        """A value that was sent for; the current stream waits for it, the host does not."""
        found = self._coming.get(id(kept))
        if found is None:
            return None
        _, value, event = found
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        value.record_stream(current)
        return value
