"""Requests of one model, stepped together: each gets what it gets alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait as wait_for
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepass
from cachepass import serve
from cachepass.serve import Batcher, Branches, Request
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
    on_step: Callable[[int], object] = lambda step: None,
    guided_from: int = 0,
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
        branches = BOTH if step >= guided_from else ("cond",)
        v = yield {b: given | {"encoder_hidden_states": texts[b]} for b in branches}
        uncond = v.get("uncond", v["cond"])
        latent = latent - (uncond + 3.0 * (v["cond"] - uncond)) / steps
    return latent


def changed(work: Request, change: Callable[[Branches], Branches]) -> Request:
    """A request that yields something else."""
    outputs = None
    try:
        while True:
            outputs = yield change(next(work) if outputs is None else work.send(outputs))
    except StopIteration as end:
        return end.value


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


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """One model serves all: what was captured of it stays, unlike elsewhere."""


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


def test_cfg_is_reused_whatever_is_yielded_first() -> None:
    """The unconditional rows of a shared call stand on the conditional ones of the step."""

    def uncond_first(calls: Branches) -> Branches:
        return dict(reversed(list(calls.items())))

    policy = cachepass.Schedule(reuse={2: "cfg"})
    model: Any = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    with Batcher(model) as batcher:
        works = [changed(request(seed), uncond_first) for seed in range(2)]
        for future in [batcher.submit(w, num_inference_steps=STEPS) for w in works]:
            future.result(60)
    for told in cachepass.report(model).to_dict()["requests"]:
        reused = [(c["step"], c["branch"]) for c in told["steps"] if c["reused"] != [[]]]
        assert reused == [(2, "uncond")]


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

    def poison(calls: Branches) -> Branches:
        for given in calls.values():
            given["encoder_hidden_states"][..., 0] = poisoned
        return calls

    monkeypatch.setattr(model, "forward", forward)
    bad = batcher.submit(changed(request(0), poison), num_inference_steps=STEPS)
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(60)
    assert distance(good.result(60), alone(model, request(1))) < 1e-5


def test_a_call_that_failed_holds_nothing(
    model: Any, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its activations are gone when requests are called again, and from their futures."""
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        alive.append([ref() for ref in made if ref() is not None])
        activation = torch.ones(3)
        made.append(weakref.ref(activation))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", forward)
    come = threading.Event()
    works = [request(i, on_step=lambda _: come.wait(60)) for i in range(2)]
    futures = [batcher.submit(work, num_inference_steps=STEPS) for work in works]
    come.set()
    for future in futures:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert alive == [[]] * 3
    assert not any(ref() is not None for ref in made)


def test_a_request_that_ends_the_thread_ends_itself(model: Any, batcher: Batcher) -> None:
    def leave(step: int) -> None:
        raise SystemExit("the user's own")

    bad = batcher.submit(request(0, on_step=leave), num_inference_steps=STEPS)
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(SystemExit, match="the user's own"):
        bad.result(60)
    assert distance(good.result(60), alone(model, request(1))) < 1e-5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batcher_that_fails_leaves_nobody_waiting(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: Batcher) -> None:
        come.wait(60)
        assert waits.cancel()
        raise ZeroDivisionError

    monkeypatch.setattr(Batcher, "_step", step)
    batcher, come = Batcher(model, max_rows=1), threading.Event()
    first, waits, cancelled = (
        batcher.submit(request(i), num_inference_steps=STEPS) for i in range(3)
    )
    assert cancelled.cancel()
    come.set()
    with pytest.raises(cachepass.CachePassError, match=r"the batcher failed: ZeroDivisionError"):
        first.result(60)
    assert wait_for([waits, cancelled], timeout=60).not_done == set()
    batcher.close()
    with pytest.raises(cachepass.CachePassError, match=r"the batcher failed: ZeroDivisionError"):
        batcher.submit(request(2), num_inference_steps=STEPS)


def test_a_request_that_fails_as_it_ends(model: Any, batcher: Batcher) -> None:
    def stubborn() -> Request:
        try:
            yield from request(0)
        finally:
            raise ValueError("in finally")

    def empty() -> Request:
        yield {}

    def longer() -> Request:
        yield from request(0, steps=STEPS + 1)

    def none() -> Request:
        yield {"cond": {"hidden_states": torch.randn(0, 4, 2, 8, 8)}}

    works = (stubborn(), empty(), none(), longer())
    bad = [batcher.submit(work, num_inference_steps=STEPS) for work in works]
    good = batcher.submit(request(1), num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="in finally"):
        bad[0].result(60)
    with pytest.raises(cachepass.CachePassError, match=r"must yield \{branch: keyword arguments\}"):
        bad[1].result(60)
    with pytest.raises(cachepass.CachePassError, match=r"latent without samples: it needs at lea"):
        bad[2].result(60)
    with pytest.raises(cachepass.SessionError, match=rf"`step`={STEPS}: must be from 0 to 5"):
        bad[3].result(60)
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


def _watched(model: Any, budget: int, works: list[dict[str, Any]]) -> tuple[int, list[Tensor]]:
    """The most that caches held, and what requests that came at once returned."""
    peak, come = 0, threading.Event()

    def watch(_: int) -> None:
        nonlocal peak
        come.wait(60)
        peak = max(peak, watched.cache_bytes)

    with Batcher(model, max_rows=4, max_cache_bytes=budget) as watched:
        futures = [
            watched.submit(request(i, on_step=watch, **work), num_inference_steps=STEPS)
            for i, work in enumerate(works)
        ]
        come.set()
        results = [future.result(60) for future in futures]
    return peak, results


def test_a_budget_holds_where_guidance_starts_late(model: Any) -> None:
    """The second one waits for the first, with its caches."""
    one = cachepass.plan(model._orig_mod, WAN.example(), policy=POLICY).bytes()
    works: list[dict[str, Any]] = [{"guided_from": 1}, {"guided_from": 3}]
    peak, results = _watched(model, one + one // 2, works)
    assert one < peak <= one + one // 2
    for i, (work, result) in enumerate(zip(works, results, strict=True)):
        assert distance(result, alone(model, request(i, **work))) < 1e-5


def test_branches_that_take_turns_are_all_counted(model: Any) -> None:
    def turns() -> Request:
        latent = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        for step in range(STEPS):
            given = {
                "hidden_states": latent,
                "timestep": torch.tensor([1000.0 * (1 - step / STEPS)]),
                "encoder_hidden_states": torch.ones(1, 5, 16),
                "return_dict": False,
            }
            yield dict.fromkeys(("cond", "uncond" if step % 2 else "perturbed"), given)

    two = cachepass.plan(model._orig_mod, WAN.example(), policy=POLICY).bytes()
    with Batcher(model, max_cache_bytes=two) as batcher:
        future = batcher.submit(turns(), num_inference_steps=STEPS)
        with pytest.raises(cachepass.CachePassError, match=rf"may hold {3 * two // 2:,} bytes"):
            future.result(60)
    with Batcher(model, max_cache_bytes=3 * two // 2) as batcher:
        batcher.submit(turns(), num_inference_steps=STEPS).result(60)


def test_requests_that_wait_for_each_other(model: Any) -> None:
    """The one that came last gives its caches up, and is told so."""
    one = cachepass.plan(model._orig_mod, WAN.example(), policy=POLICY).bytes()
    works: list[dict[str, Any]] = [{"guided_from": 2}] * 2
    peak, results = _watched(model, one + 1, works)
    assert peak <= one + 1
    assert distance(results[0], alone(model, request(0, **works[0]))) < 1e-5
    assert distance(results[1], alone(model, request(1, **works[1]))) < 0.1
    assert "caches dropped: an older request of the batcher needed" in str(cachepass.report(model))


def test_a_request_that_comes_to_have_more_samples(model: Any) -> None:
    """It waits for a step that has room for them; more than there can be are an error."""

    def grows(to: int) -> Request:
        generator = torch.Generator().manual_seed(9)
        latent = torch.randn(1, 4, 2, 8, 8, generator=generator)
        for step in range(STEPS):
            latent = latent if step != 2 else latent.expand(to, -1, -1, -1, -1)
            rows = len(latent)
            given = {
                "hidden_states": latent,
                "timestep": torch.full((rows,), 1000.0 * (1 - step / STEPS)),
                "encoder_hidden_states": torch.ones(rows, 5, 16),
                "return_dict": False,
            }
            outputs = yield {"cond": given}
            latent = latent - outputs["cond"] / STEPS
        return latent

    with Batcher(model, max_rows=3) as batcher:
        others = [batcher.submit(request(i), num_inference_steps=STEPS) for i in range(2)]
        fits, never = (batcher.submit(grows(to), num_inference_steps=STEPS) for to in (3, 4))
        assert distance(fits.result(60), alone(model, grows(3))) < 1e-5
        with pytest.raises(cachepass.CachePassError, match=r"has 4 samples, and `max_rows`=3"):
            never.result(60)
        for i, other in enumerate(others):
            assert distance(other.result(60), alone(model, request(i))) < 1e-5


def test_what_keeps_requests_apart_is_told_and_planned_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timestep for all samples of a request is another tensor in each."""
    planned = []

    def plan(*args: Any, **options: Any) -> Any:
        planned.append(args)
        return cachepass.plan(*args, **options)

    def shared(calls: Branches) -> Branches:
        return {b: {**given, "timestep": given["timestep"][:1]} for b, given in calls.items()}

    monkeypatch.setattr(serve, "plan", plan)
    with Batcher(model, max_rows=4, max_cache_bytes=10**6) as batcher:
        works = [changed(request(seed, steps=3, samples=2), shared) for seed in range(2)]
        for future in [batcher.submit(work, num_inference_steps=3) for work in works]:
            future.result(60)
    assert len(planned) == 1
    assert "called apart from other requests: 'timestep' differ in" in str(cachepass.report(model))


def test_all_that_a_model_returns() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            for block in self.blocks:
                x = x + block(x)
            return x, x.mean(1)

    model = Two().eval()
    made: Any = cachepass.compile(model, policy="compute", inner="eager")

    def one(x: Tensor) -> Request:
        outputs = yield {"cond": {"x": x}}
        return outputs["cond"]

    given = [torch.randn(1, 4, 6), torch.randn(2, 4, 6)]
    with Batcher(made) as batcher:
        futures = [batcher.submit(one(x), num_inference_steps=1) for x in given]
        for x, future in zip(given, futures, strict=True):
            with torch.no_grad():
                wanted = model(x)
            for got, want in zip(future.result(60), wanted, strict=True):
                assert distance(got, want) < 1e-6


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
    plain = WAN.model()
    whole = cachepass.compile(plain, policy="compute", lowering="graph")
    for other in (plain, whole):
        with pytest.raises(
            cachepass.CachePassError, match=r"`model` is a .*: it must be what cach"
        ):
            Batcher(other)
    batcher = Batcher(model)
    with pytest.raises(cachepass.CachePassError, match=r"`request` is a list: it must be a gener"):
        batcher.submit([], num_inference_steps=STEPS)  # type: ignore[arg-type]
    with pytest.raises(cachepass.CachePassError, match=r"`num_inference_steps`=0: must be at l"):
        batcher.submit(request(0), num_inference_steps=0)
    come, work = threading.Event(), request(0, on_step=lambda _: come.wait(60))
    futures = [batcher.submit(w, num_inference_steps=STEPS) for w in (request(1), work)]
    started = request(2)
    next(started)
    for again in (work, started):
        with pytest.raises(cachepass.CachePassError, match=r"`request` has been started or subm"):
            batcher.submit(again, num_inference_steps=STEPS)
    come.set()
    for future in futures:
        future.result(60)
    batcher.close()
    with pytest.raises(cachepass.CachePassError, match="the batcher is closed"):
        batcher.submit(request(0), num_inference_steps=STEPS)
