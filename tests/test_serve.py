"""Requests of one model, stepped together: each gets what it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait as wait_for
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepass
from cachepass.serve import Batcher, Request
from tests.models import WAN, as_tensor, distance
from tests.requests import BOTH

POLICY = cachepass.FirstBlock(threshold=0.105, warmup_steps=0)
STEPS = 6


def request(
    seed: int,
    *,
    steps: int = STEPS,
    samples: int = 1,
    words: int = 5,
    on_step: Callable[[int], None] = lambda step: None,
) -> Request:
    """A video of the tiny Wan by Euler steps, as a user would write it."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(samples, 4, 2, 8, 8, generator=generator)
    texts = {b: torch.randn(samples, words, 16, generator=generator) for b in BOTH}
    for step in range(steps):
        on_step(step)
        given = {
            "hidden_states": latent,
            "timestep": torch.full((samples,), 1000.0 * (1 - step / steps)),
            "return_dict": False,
        }
        v = yield {b: given | {"encoder_hidden_states": text} for b, text in texts.items()}
        latent = latent - (v["uncond"] + 3.0 * (v["cond"] - v["uncond"])) / steps
    return latent


def alone(model: Any, work: Request, *, steps: int = STEPS) -> Tensor:
    """What a request returns that is run by itself."""
    session = cachepass.session(model, num_inference_steps=steps)
    outputs, step = None, 0
    try:
        while True:
            calls = next(work) if outputs is None else work.send(outputs)
            outputs = {}
            for branch, given in calls.items():
                with session.at(step=step, branch=branch):
                    outputs[branch] = as_tensor(model(**given))
            step += 1
    except StopIteration as end:
        result: Tensor = end.value
        return result


@pytest.fixture(scope="module")
def model() -> Any:
    return cachepass.compile(WAN.model(), policy=POLICY, inner="eager")


@pytest.fixture
def batcher(model: Any) -> Iterator[Batcher]:
    with Batcher(model, max_rows=3) as made:
        yield made
    assert made.cache_bytes == 0


def test_requests_get_what_they_get_alone(model: Any, batcher: Batcher) -> None:
    cases: list[dict[str, Any]] = [
        {"seed": 0}, {"seed": 1, "steps": 4}, {"seed": 2, "samples": 2}, {"seed": 3, "words": 7},
        {"seed": 4, "steps": 3}, {"seed": 5},
    ]  # fmt: skip
    futures = [
        batcher.submit(request(**case), num_inference_steps=case.get("steps", STEPS))
        for case in cases
    ]
    for case, future in zip(cases, futures, strict=True):
        want = alone(model, request(**case), steps=case.get("steps", STEPS))
        assert distance(future.result(60), want) < 1e-5


def test_rows_share_calls(model: Any, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that come together make as many calls as one."""
    real, sizes = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["hidden_states"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    come = threading.Event()

    def wait(_: int) -> None:
        come.wait(60)

    futures = [
        batcher.submit(request(i, on_step=wait), num_inference_steps=STEPS) for i in range(3)
    ]
    come.set()
    for future in futures:
        future.result(60)
    assert sizes == [3] * 2 * STEPS


def test_threads_may_submit_at_once(model: Any, batcher: Batcher) -> None:
    futures: dict[int, Future[Any]] = {}

    def submit(seed: int) -> None:
        futures[seed] = batcher.submit(request(seed), num_inference_steps=STEPS)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, future in futures.items():
        assert distance(future.result(60), alone(model, request(seed))) < 1e-5


def test_a_request_that_fails_leaves_the_others_alone(model: Any, batcher: Batcher) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise ValueError("the user's own")

    bad = batcher.submit(request(0, on_step=fail), num_inference_steps=STEPS)
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="the user's own"):
        bad.result(60)
    assert distance(good.result(60), alone(model, request(1))) < 1e-5


def test_a_call_that_fails_is_made_alone(
    model: Any, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose fault it was is found out, and the others go on."""
    real = model.forward
    poisoned = 7.0

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (kwargs["encoder_hidden_states"] == poisoned).any():
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    def poison(work: Request) -> Request:
        outputs = None
        while True:
            calls = next(work) if outputs is None else work.send(outputs)
            for given in calls.values():
                given["encoder_hidden_states"][..., 0] = poisoned
            outputs = yield calls

    monkeypatch.setattr(model, "forward", forward)
    bad = batcher.submit(poison(request(0)), num_inference_steps=STEPS)
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(60)
    assert distance(good.result(60), alone(model, request(1))) < 1e-5


def test_a_request_that_fails_as_it_ends(model: Any, batcher: Batcher) -> None:
    def stubborn() -> Request:
        try:
            yield from request(0)
        finally:
            raise ValueError("in finally")

    def empty() -> Request:
        yield {}

    bad = [batcher.submit(work, num_inference_steps=STEPS) for work in (stubborn(), empty())]
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="in finally"):
        bad[0].result(60)
    with pytest.raises(cachepass.CachePassError, match=r"must yield \{branch: keyword arguments\}"):
        bad[1].result(60)
    assert distance(good.result(60), alone(model, request(1))) < 1e-5


def test_a_request_that_is_cancelled(model: Any, batcher: Batcher) -> None:
    reached, go = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        if step == 2:
            reached.set()
            go.wait(60)

    halfway = batcher.submit(request(0, on_step=wait), num_inference_steps=STEPS)
    reached.wait(60)
    waiting = batcher.submit(request(1, samples=3), num_inference_steps=STEPS)
    good = batcher.submit(request(2), num_inference_steps=STEPS)
    assert halfway.cancel()
    assert waiting.cancel()
    go.set()
    assert distance(good.result(60), alone(model, request(2))) < 1e-5
    assert wait_for([halfway, waiting], timeout=60).not_done == set()
    for future in (halfway, waiting):
        with pytest.raises(CancelledError):
            future.result(60)


def test_caches_stay_within_a_budget(model: Any) -> None:
    inputs = WAN.example()
    one = cachepass.plan(model._orig_mod, inputs, policy=POLICY).bytes()
    peak = 0

    def watch(_: int) -> None:
        nonlocal peak
        peak = max(peak, shared.cache_bytes)

    with Batcher(model, max_rows=4, max_cache_bytes=2 * one + 1) as shared:
        futures = [
            shared.submit(request(i, on_step=watch), num_inference_steps=STEPS) for i in range(5)
        ]
        futures.append(
            shared.submit(request(5, samples=2, on_step=watch), num_inference_steps=STEPS)
        )
        for i, future in enumerate(futures[:5]):
            assert distance(future.result(60), alone(model, request(i))) < 1e-5
        futures[5].result(60)
    assert peak == 2 * one


@pytest.mark.parametrize(
    ("options", "work", "message"),
    [
        ({"max_rows": 2}, {"samples": 3}, r"3 samples, and `max_rows`=2"),
        ({"max_cache_bytes": 9}, {}, r"caches may hold [\d,]+ bytes, and `max_cache_bytes`=9"),
    ],
)
def test_a_request_that_never_fits(
    model: Any, options: dict[str, int], work: dict[str, Any], message: str
) -> None:
    with Batcher(model, **options) as batcher:
        future = batcher.submit(request(0, **work), num_inference_steps=STEPS)
        with pytest.raises(cachepass.CachePassError, match=message):
            future.result(60)


def test_errors_of_a_batcher(model: Any) -> None:
    with pytest.raises(cachepass.CachePassError, match=r"`max_rows`=0: must be at least 1"):
        Batcher(model, max_rows=0)
    batcher = Batcher(model)
    with pytest.raises(cachepass.CachePassError, match=r"`request` is a list: it must be a gener"):
        batcher.submit([], num_inference_steps=STEPS)  # type: ignore[arg-type]
    batcher.close()
    with pytest.raises(cachepass.CachePassError, match="the batcher is closed"):
        batcher.submit(request(0), num_inference_steps=STEPS)
