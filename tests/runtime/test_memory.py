"""The bytes that a report tells are those that slots hold, and no more hang on them."""

from __future__ import annotations

from typing import Any

import pytest

import cachepass
from tests.models import WAN
from tests.requests import run

STEPS = 8
CASES: dict[str, cachepass.NamedPolicy] = {
    "mixcache": cachepass.MixCache(trigger=9.0),
    "adacache": cachepass.AdaCache(codebook=((99.0, 2),)),
    "dicache": cachepass.DiCache(threshold=9.0, warmup_steps=2),
    "taylorseer": cachepass.TaylorSeer(interval=2, order=3, warmup_steps=1),
    "fastercache": cachepass.FasterCache(start=2),
    "easycache": cachepass.EasyCache(threshold=9.0, warmup_steps=3),
}


def _allocated(session: cachepass.Session) -> int:
    """Bytes of the memory blocks that slots keep alive."""
    storages = {
        kept.value.untyped_storage().data_ptr(): kept.value.untyped_storage().nbytes()
        for kept in session.slots.values()
    }
    return sum(storages.values())


def _check(policy: cachepass.NamedPolicy, **options: Any) -> dict[str, Any]:
    cached = cachepass.compile(WAN.model(), policy=policy, **options)
    _, session = run(cached, steps=STEPS)
    request: dict[str, Any]
    (request,) = cachepass.report(session).to_dict()["requests"]
    assert request["peak_cache_bytes"] == session.cache_bytes == _allocated(session) > 0
    cachepass.reset(cached)
    assert session.cache_bytes == 0
    return request


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_what_is_allocated(name: str) -> None:
    _check(CASES[name], inner="eager")


def test_bytes_are_what_is_allocated_compiled() -> None:
    _check(CASES["mixcache"])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_series_holds_one_value_more_than_its_order(order: int) -> None:
    """As much as TaylorSeer for one object: order + 1 outputs per branch."""
    policy = cachepass.TaylorSeer(interval=2, order=order, warmup_steps=1)
    output = 4 * 4 * 2 * 8 * 8  # bytes of float32
    assert _check(policy, inner="eager")["peak_cache_bytes"] == 2 * (order + 1) * output
