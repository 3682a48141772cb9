"""What slots will hold, told before a run; and less of it, on request."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import cachepass
from cachepass.ir.boundary import Slot
from cachepass.runtime.storage import DTYPES, Storage
from tests.models import WAN, distance
from tests.requests import decisions, notes, run

STEPS = 8
CASES: dict[str, cachepass.NamedPolicy] = {
    "firstblock": cachepass.FirstBlock(threshold=0.105, warmup_steps=0),
    "adacache": cachepass.AdaCache(codebook=((99.0, 2),)),
    "dicache": cachepass.DiCache(threshold=9.0, warmup_steps=2),
    "taylorseer": cachepass.TaylorSeer(interval=2, order=3, warmup_steps=1),
    "pab": cachepass.PAB(),
}
REUSE = cachepass.Schedule(reuse={3: "step", 4: "stack", 6: "stack"})


@functools.cache
def _plan(policy: cachepass.NamedPolicy, **options: Any) -> cachepass.Plan:
    return cachepass.plan(WAN.model(), WAN.example(), policy=policy, **options)


FULL = [pytest.param(name, 3, marks=pytest.mark.full) for name in ("taylorseer", "pab", "dicache")]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("firstblock", 1), *((name, 3) for name in ("firstblock", "adacache")), *FULL],
)
def test_the_plan_is_what_slots_hold(name: str, rows: int) -> None:
    model = cachepass.compile(WAN.model(), policy=CASES[name], inner="eager")
    _, session = run(model, steps=STEPS, rows=rows)
    assert session.history.peak_bytes == _plan(CASES[name]).bytes(rows=rows)


def test_several_samples_are_planned_as_one() -> None:
    """Their number is open, as where the model is compiled: here tokens lie in front."""

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = x.transpose(0, 1)
            for block in self.blocks:
                h = h + block(h)
            return h.transpose(0, 1)

    policy = cachepass.Schedule(reuse={1: "stack"})
    one, three = (
        cachepass.plan(TokensFirst(), {"x": torch.randn(rows, 5, 6)}, policy=policy)
        for rows in (1, 3)
    )
    assert {slot.shape for slot in (*one.slots, *three.slots)} == {(5, 1, 6)}
    assert one.bytes() == three.bytes()


def test_nothing_is_allocated() -> None:
    """The width of Wan 14B, at 720p; a site's bytes do not depend on the depth."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=4,
            in_channels=16, out_channels=16, text_dim=4096,
        ).to(torch.bfloat16)  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(1, 16, 21, 90, 160, dtype=torch.bfloat16),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        }
    plan = cachepass.plan(model, inputs, policy="mixcache")
    block = 75_600 * 5_120 * 2  # tokens, width, bytes of bfloat16
    assert plan.of_site("block") == 2 * 2 * block  # two values, two branches
    assert str(plan).splitlines()[:3] == [
        "mixcache: 3.174 GB for a row with two branches",
        "  site block: 3.097 GB",
        "    block.residual and 1 more, each: (1, 75600, 5120) bfloat16, 774.1 MB",
    ]


# --------------------------------------------------------------------------- narrower


@pytest.mark.parametrize("dtypes", [DTYPES[1:3], pytest.param(DTYPES, marks=pytest.mark.full)])
def test_slots_in_fewer_bits(dtypes: Sequence[torch.dtype]) -> None:
    """The same decisions, as they are made by the step alone; outputs by the type's precision."""
    outputs = {}
    for dtype in (None, *dtypes):
        model = cachepass.compile(WAN.model(), policy=REUSE, inner="eager", cache_dtype=dtype)
        outputs[dtype], session = run(model, steps=STEPS)
        assert {n for _, _, names in decisions(session) for n in names} == {"step", "stack"}
        assert session.cache_bytes == _plan(REUSE, cache_dtype=dtype).bytes()
    for dtype in dtypes:
        error = max(distance(a, b) for a, b in zip(outputs[dtype], outputs[None], strict=True))
        assert torch.finfo(dtype).eps / 100 < error < torch.finfo(dtype).eps


def test_signals_keep_sixteen_bits() -> None:
    plan = _plan(CASES["firstblock"], cache_dtype=torch.float8_e4m3fn)
    assert {s.dtype for s in plan.slots if s.site is None} == {torch.bfloat16}
    assert {s.dtype for s in plan.slots if s.site is not None} == {torch.float8_e4m3fn}


def test_what_is_measured_at_a_site_keeps_sixteen_bits() -> None:
    """MixCache compares what its sites keep with what they kept before."""
    plan = _plan(cachepass.MixCache(), cache_dtype=torch.float8_e4m3fn)
    kinds = {s.name: s.dtype for s in plan.slots}
    assert kinds["block.residual"] == kinds["cfg.delta"] == torch.bfloat16
    assert kinds["cfg.cond"] == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_beyond_the_range_of_a_type(dtype: torch.dtype) -> None:
    storage = Storage(dtype=dtype)
    slot = Slot(name="s", site="s", dtype=torch.float32)
    value = torch.tensor([[1e5, -3e6, 2.0]])
    kept = storage.take(storage.keep(slot, value, step=0), slot, torch.device("cpu"))
    assert distance(kept, value) < torch.finfo(dtype).eps


def test_an_empty_value_in_eight_bits() -> None:
    """A residual of zeros has no magnitude to scale by."""
    storage, slot = (
        Storage(dtype=torch.float8_e4m3fn),
        Slot(name="s", site="s", dtype=torch.float32),
    )
    kept = storage.keep(slot, torch.zeros(1, 3), step=0)
    assert torch.equal(storage.take(kept, slot, torch.device("cpu")), torch.zeros(1, 3))


def test_slots_on_the_host() -> None:
    model = cachepass.compile(WAN.model(), policy=REUSE, inner="eager", cache_on_host=True)
    plain = cachepass.compile(WAN.model(), policy=REUSE, inner="eager")
    pairs = zip(run(model, steps=STEPS)[0], run(plain, steps=STEPS)[0], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------- a budget


def test_sites_that_do_not_fit_are_left_out() -> None:
    """The largest first; what is left works as it does alone."""
    plan = _plan(REUSE)
    sizes = {site: plan.of_site(site) for site in ("step", "stack")}
    assert sizes["stack"] > sizes["step"]
    limit = plan.bytes() - 1
    model = cachepass.compile(WAN.model(), policy=REUSE, inner="eager", max_cache_bytes=limit)
    outputs, session = run(model, steps=STEPS)
    assert session.cache_bytes == sizes["step"] < session.history.peak_bytes <= limit
    assert {n for _, _, names in decisions(session) for n in names} == {"step"}
    assert f"site 'stack' is not cached: with it, caches may hold {plan.bytes():,}" in notes(
        session
    )
    alone = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={3: "step"}), inner="eager"
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(alone, steps=STEPS)[0], strict=True))


def test_a_budget_holds_at_every_resolution() -> None:
    model: Any = cachepass.compile(
        WAN.model(), policy=REUSE, inner="eager", max_cache_bytes=20_000, dynamic=True
    )
    for size, kept in ((8, {"step", "stack"}), (16, {"step"})):
        _, session = run(model, steps=STEPS, size=size)
        assert session.history.peak_bytes <= 20_000
        assert {n for _, _, names in decisions(session) for n in names} == kept


def test_a_budget_that_fits_changes_nothing() -> None:
    policy, outputs = CASES["firstblock"], []
    limit = _plan(policy).bytes(rows=2)
    for budget in (None, limit):
        model = cachepass.compile(WAN.model(), policy=policy, inner="eager", max_cache_bytes=budget)
        outputs.append(run(model, steps=STEPS, rows=2)[0])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_budget_for_nothing_is_refused() -> None:
    model = cachepass.compile(
        WAN.model(), policy=CASES["firstblock"], inner="eager", max_cache_bytes=100
    )
    with pytest.raises(
        cachepass.PolicyError,
        match=r"`max_cache_bytes`=100 is too little for policy 'firstblock': its signals need "
        r"3,072 bytes, its sites 'step' 4,096\. Raise it, choose narrower slots",
    ):
        run(model, steps=STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cache_bytes": -1}, r"`max_cache_bytes`=-1: must be at least 0"),
        (
            {"cache_dtype": torch.int8},
            r"`cache_dtype`=torch.int8: must be None or one of torch.flo",
        ),
        ({"cache_on_host": True, "lowering": "graph"}, r"options of lowering='regions'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cachepass.CachePassError, match=message):
        cachepass.compile(WAN.model(), policy=REUSE, **options)
