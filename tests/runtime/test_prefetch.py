"""Values sent for ahead of their use, on a stand-in for a GPU: which, in what order, how many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cachepass.ir.boundary import Slot
from cachepass.runtime import storage
from cachepass.runtime.storage import Kept, Prefetch, Storage

CPU = torch.device("cpu")
SLOT = Slot(name="s", site="s", dtype=torch.float32)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The values that were sent for, by their first element."""
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    storage._side_stream.cache_clear()
    real, found = Storage.take, []

    def take(self: Storage, kept: Kept, *args: Any) -> Tensor:
        found.append(int(kept.value[0]))
        return real(self, kept, *args)

    monkeypatch.setattr(Storage, "take", take)
    yield found
    storage._side_stream.cache_clear()


def _kept(count: int) -> list[Kept]:
    return [Kept(torch.full((4,), float(i)), step=0) for i in range(count)]


def test_no_more_is_ahead_than_there_may_be(
    sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 2 * 16)
    kept = _kept(5)
    ahead = Prefetch(Storage(), CPU, [(SLOT, k) for k in kept])
    assert sent == [0, 1]
    for i, one in enumerate(kept):
        taken = ahead.take(one)
        assert taken is not None
        assert torch.equal(taken, one.value)
        assert sent == list(range(min(i + 3, 5)))
    assert ahead.take(kept[0]) is None, "it is handed out once, and not held on to"
    torch.cuda.Stream.assert_called_once()  # type: ignore[attr-defined]


def test_a_value_larger_than_that_comes_alone(
    sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 1)
    kept = _kept(3)
    ahead = Prefetch(Storage(), CPU, [(SLOT, k) for k in kept])
    assert sent == [0]
    assert ahead.take(kept[0]) is not None
    assert sent == [0, 1]


def test_what_is_passed_over_is_let_go(sent: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in an arm that does not run: nothing waits behind it."""
    monkeypatch.setattr(storage, "_AHEAD_BYTES", 1)
    kept = _kept(4)
    ahead = Prefetch(Storage(), CPU, [(SLOT, k) for k in kept])
    assert ahead.take(kept[2]) is None
    assert sent == [0, 3]
    assert ahead.take(kept[3]) is not None
    assert not ahead._coming
    assert not ahead._wanted


def test_what_is_not_sent_for_changes_nothing(sent: list[int]) -> None:
    kept = _kept(2)
    ahead = Prefetch(Storage(), CPU, [(SLOT, kept[0])])
    assert ahead.take(kept[1]) is None
    assert ahead.take(kept[0]) is not None
