"""Requests, models and threads share nothing, and nothing of the user's is touched."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.runtime.program import Driver
from tests.models import WAN, as_tensor
from tests.requests import caller, decisions, denoise, notes, plain, run

STEPS = 6
FIRSTBLOCK = cachepass.FirstBlock(threshold=0.1, warmup_steps=0)


def _compile(model: Any, policy: str | cachepass.NamedPolicy = FIRSTBLOCK, **options: Any) -> Any:
    return cachepass.compile(model, policy=policy, inner="eager", **options)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _reuses(session: cachepass.Session) -> bool:
    return any(names for _, _, names in decisions(session))


def test_the_users_module_is_left_alone() -> None:
    model = WAN.model()
    weights = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    attributes, kind, forward = set(vars(model)), type(model), type(model).forward
    before = denoise(plain(model), steps=2)
    cached = _compile(model)
    _, session = run(cached, steps=STEPS)
    assert _reuses(session)
    assert type(model) is kind
    assert type(model).forward is forward
    assert "forward" not in vars(model)
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == list(weights)
    for name, value in model.state_dict().items():
        pointer, copy = weights[name]
        assert value.data_ptr() == pointer
        assert torch.equal(value, copy)
    assert _equal(denoise(plain(model), steps=2), before)
    assert cached.config is model.config


def test_requests_in_a_row_equal_fresh_ones() -> None:
    cached = _compile(WAN.model())
    first, a = run(cached, steps=STEPS, seed=3)
    second, b = run(cached, steps=STEPS, seed=4)
    assert _reuses(a)
    assert _reuses(b)
    assert _equal(first, run(_compile(WAN.model()), steps=STEPS, seed=3)[0])
    assert _equal(second, run(_compile(WAN.model()), steps=STEPS, seed=4)[0])


@pytest.mark.parametrize("policy", [FIRSTBLOCK, cachepass.MixCache(trigger=9.0, warmup=0.0)])
def test_interleaved_sessions_equal_serial_ones(policy: cachepass.NamedPolicy) -> None:
    cached = _compile(WAN.model(), policy)
    serial = [run(cached, steps=8, seed=seed)[0] for seed in (3, 4)]
    sessions = [cachepass.session(cached, num_inference_steps=8) for _ in serial]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    found: list[list[Tensor]] = [[], []]

    def request(i: int) -> None:
        call = caller(cached, sessions[i])

        def in_turn(step: int, branch: str, *tensors: Tensor) -> Tensor:
            turns[i].acquire()
            try:
                return call(step, branch, *tensors)
            finally:
                turns[1 - i].release()

        found[i] = denoise(in_turn, steps=8, seed=3 + i)

    threads = [threading.Thread(target=request, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(_equal(a, b) for a, b in zip(found, serial, strict=True))
    assert all(_reuses(s) for s in sessions)


def test_models_of_equal_config_share_nothing() -> None:
    """Called in turn they do what each does alone on the same latents."""
    cached = [_compile(WAN.model(seed)) for seed in (0, 1)]

    def replay(models: list[Any]) -> list[list[Tensor]]:
        sessions = [cachepass.session(m, num_inference_steps=STEPS) for m in models]
        calls = [caller(m, s) for m, s in zip(models, sessions, strict=True)]
        found: list[list[Tensor]] = [[] for _ in models]

        def all_of_them(step: int, branch: str, *tensors: Tensor) -> Tensor:
            for kept, call in zip(found, calls, strict=True):
                kept.append(call(step, branch, *tensors))
            return lead[len(found[0]) - 1]

        denoise(all_of_them, steps=STEPS)
        return found

    lead = denoise(plain(WAN.model(0)), steps=STEPS)
    together = replay(cached)
    for seed in (0, 1):
        assert _equal(together[seed], replay([_compile(WAN.model(seed))])[0])
    assert not torch.equal(together[0][-1], together[1][-1])
    assert [len(c.denoiser.programs) for c in cached] == [1, 1]


def test_one_model_may_be_compiled_twice() -> None:
    model = WAN.model()
    plain_one, cached = _compile(model, "compute"), _compile(model)
    expected = denoise(plain(model), steps=STEPS)
    outputs, a = run(plain_one, steps=STEPS)
    _, b = run(cached, steps=STEPS)
    assert _equal(outputs, expected)
    assert not _reuses(a)
    assert _reuses(b)
    assert len(cachepass.report(cached).to_dict()["requests"]) == 1


def test_an_exception_drops_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = _compile(WAN.model())
    session = cachepass.session(cached, num_inference_steps=STEPS)
    call = caller(cached, session)
    inputs = WAN.example()
    tensors = [inputs[n] for n in ("hidden_states", "timestep", "encoder_hidden_states")]
    call(0, "cond", *tensors)
    assert session.cache_bytes > 0
    (program,) = cached.denoiser.programs
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(program, "_driver", lambda args: Driver(fail))
        with pytest.raises(RuntimeError, match="out of memory"):
            call(1, "cond", *tensors)
    assert session.cache_bytes == 0
    call(2, "cond", *tensors)
    assert decisions(session)[-1] == (2, "cond", [])


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.full)])
def test_a_new_resolution_starts_cold(dynamic: bool | None) -> None:
    model = WAN.model()
    cached = _compile(model, dynamic=dynamic)
    session = cachepass.session(cached, num_inference_steps=STEPS)
    time, text = torch.tensor([900.0]), torch.randn(1, 5, 16)
    latents = {size: torch.randn(1, 4, 2, size, size) for size in (8, 12, 16)}
    calls = []
    for step, size in enumerate((8, 8, 12, 12, 16, 8)):
        out = caller(cached, session)(step, "cond", latents[size], time, text)
        with torch.no_grad():
            expected = as_tensor(model(latents[size], time, text, return_dict=False))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # nothing has changed
        calls.append(bool(decisions(session)[-1][2]))
    assert calls == [False, True, False, True, False, False]
    assert "caches dropped" in notes(session)


@pytest.mark.parametrize("how", ["in place", "replaced", "load_state_dict"])
def test_a_changed_weight_drops_the_slots(how: str) -> None:
    model = WAN.model()
    cached = _compile(model)
    session = cachepass.session(cached, num_inference_steps=STEPS)
    call = caller(cached, session)
    inputs = WAN.example()
    tensors = [inputs[n] for n in ("hidden_states", "timestep", "encoder_hidden_states")]
    call(0, "cond", *tensors)
    call(1, "cond", *tensors)
    weight = model.blocks[2].ffn.net[2].weight
    with torch.no_grad():
        if how == "in place":
            weight.mul_(2.0)
        elif how == "replaced":
            model.blocks[2].ffn.net[2].weight = torch.nn.Parameter(weight * 2.0)
        else:
            model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    out = call(2, "cond", *tensors)
    assert [bool(names) for _, _, names in decisions(session)] == [False, True, False]
    with torch.no_grad():
        assert torch.equal(out, as_tensor(model(*tensors, return_dict=False)))


def test_reset_drops_everything() -> None:
    cached = _compile(WAN.model())
    _, session = run(cached, steps=STEPS)
    assert session.cache_bytes > 0
    cachepass.reset(cached)
    assert session.cache_bytes == 0


def test_outputs_are_the_callers_to_write_to() -> None:
    cached = _compile(WAN.model(), cachepass.Schedule(reuse={1: "step", 2: "step"}))
    session = cachepass.session(cached, num_inference_steps=STEPS)
    call = caller(cached, session)
    inputs = WAN.example()
    tensors = [inputs[n] for n in ("hidden_states", "timestep", "encoder_hidden_states")]
    first = call(0, "cond", *tensors)
    kept = first.clone()
    first.zero_()
    second = call(1, "cond", *tensors)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(call(2, "cond", *tensors), kept)


def test_the_latent_may_be_overwritten_between_calls() -> None:
    cached = _compile(WAN.model(), FIRSTBLOCK)
    model = WAN.model()
    session = cachepass.session(cached, num_inference_steps=STEPS)
    inputs = WAN.example()
    latent, time, text = (inputs[n] for n in ("hidden_states", "timestep", "encoder_hidden_states"))
    with torch.no_grad():
        for step in range(3):
            out = caller(cached, session)(step, "cond", latent, time, text)
            latent.add_(out, alpha=-5.0)  # far enough to be computed each time
            assert decisions(session)[-1][2] == []
        out = caller(cached, session)(3, "cond", latent, time, text)
        assert torch.equal(out, as_tensor(model(latent, time, text, return_dict=False)))
