"""A real WanPipeline: requests, steps and branches are found without a word from the user."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import cachepass
from cachepass.adapters.diffusers import denoisers
from examples.shapes.pipeline import ShapesPipeline, build_pipeline, build_scheduler
from tests.requests import BOTH

STEPS = 5
PROMPT = "red disc bounce plain"


def _pipe(scheduler: Any = "euler") -> ShapesPipeline:
    pipe = build_pipeline("small", scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate(pipe: ShapesPipeline, seed: int = 0, **options: Any) -> torch.Tensor:
    frames: torch.Tensor = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        height=32,
        width=32,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).frames
    return frames


def _compile(pipe: ShapesPipeline, policy: Any) -> ShapesPipeline:
    return cachepass.compile(pipe, policy=policy, inner="eager")


def _requests(pipe: ShapesPipeline) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cachepass.report(pipe).to_dict()["requests"]
    return found


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_compute_is_bitwise_equal(scheduler: str) -> None:
    pipe = _pipe(scheduler)
    expected = _generate(pipe)
    assert _compile(pipe, "compute") is pipe
    assert torch.equal(_generate(pipe), expected)
    (request,) = _requests(pipe)
    assert request["num_inference_steps"] == len(pipe.scheduler.timesteps) == STEPS
    calls = [(c["step"], c["branch"]) for c in request["steps"]]
    assert calls == [(step, branch) for step in range(STEPS) for branch in BOTH]


def test_every_generation_is_a_request() -> None:
    pipe = _compile(_pipe(), cachepass.Schedule(reuse={2: "stack", 3: "cfg"}))
    outputs = [_generate(pipe, seed) for seed in (0, 1, 0)]
    requests = _requests(pipe)
    assert len(requests) == 3
    for request in requests:
        reused = [c["reused"][0] for c in request["steps"]]
        assert reused == [[], [], [], [], ["stack"], ["stack"], [], ["cfg"], [], []]
        assert request["notes"] == []
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_without_guidance_there_is_one_branch() -> None:
    pipe = _compile(_pipe(), cachepass.MixCache(trigger=9.0, warmup=0.0))
    with pytest.warns(UserWarning, match="reused nothing in a request of 5 steps"):
        _generate(pipe, guidance_scale=1.0)
    (request,) = _requests(pipe)
    assert [c["branch"] for c in request["steps"]] == ["cond"] * STEPS


def test_callbacks_and_the_progress_bar_are_untouched(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = _compile(_pipe(), cachepass.Schedule(reuse={2: "stack"}))
    pipe.set_progress_bar_config(disable=False)
    seen: list[tuple[int, float]] = []

    def callback(owner: Any, step: int, time: torch.Tensor, given: dict[str, Any]) -> Any:
        assert owner is pipe
        seen.append((step, float(time)))
        return {"latents": given["latents"]}

    _generate(pipe, callback_on_step_end=callback)
    assert [step for step, _ in seen] == list(range(STEPS))
    assert [time for _, time in seen] == pipe.scheduler.timesteps.tolist()
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_an_interrupted_generation_leaves_nothing_behind() -> None:
    pipe = _compile(_pipe(), cachepass.Schedule(reuse={1: "stack", 2: "stack"}))
    expected = _generate(pipe)

    def stop(owner: Any, step: int, time: torch.Tensor, given: dict[str, Any]) -> Any:
        if step == 0:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt):
        _generate(pipe, seed=1, callback_on_step_end=stop)
    assert torch.equal(_generate(pipe), expected)


def test_restore_puts_everything_back() -> None:
    pipe = _pipe()
    model, scheduler = pipe.transformer, pipe.scheduler
    expected = _generate(pipe)
    attributes, of_scheduler = set(vars(model)), set(vars(scheduler))
    _compile(pipe, cachepass.Schedule(reuse={2: "stack"}))
    assert not torch.equal(_generate(pipe), expected)
    assert pipe.transformer is not model
    assert cachepass.restore(pipe) is pipe
    assert pipe.transformer is model
    assert pipe.scheduler is scheduler
    assert set(vars(model)) == attributes
    assert set(vars(scheduler)) == of_scheduler
    assert torch.equal(_generate(pipe), expected)
    with pytest.raises(cachepass.CachePassError, match="holds nothing that"):
        cachepass.report(pipe)


def test_a_pipeline_is_compiled_once() -> None:
    pipe = _compile(_pipe(), "compute")
    with pytest.raises(cachepass.CachePassError, match=r"compiled already: cachepass.restore"):
        _compile(pipe, "compute")


def test_only_what_takes_a_timestep_is_a_denoiser() -> None:
    assert list(denoisers(_pipe())) == ["transformer"]


class Nothing:
    scheduler = None

    def __init__(self) -> None:
        self.components = {"vae": torch.nn.Linear(1, 1)}


def test_a_pipeline_without_a_denoiser() -> None:
    with pytest.raises(
        cachepass.CachePassError, match=r"Nothing holds no denoiser: .*found \['vae'\]"
    ):
        cachepass.compile(Nothing(), policy="compute")


def test_a_solver_that_calls_twice_a_step() -> None:
    """Heun: the scheduler counts each of its two halves as a step, and so do requests."""
    pipe = _pipe()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe = _compile(pipe, cachepass.Schedule(reuse={3: "stack", 6: "stack"}))
    _generate(pipe)
    (request,) = _requests(pipe)
    assert request["num_inference_steps"] == len(pipe.scheduler.timesteps) == 2 * STEPS - 1
    steps = [c["step"] for c in request["steps"]]
    assert steps == [step for step in range(2 * STEPS - 1) for _ in BOTH]
    assert {c["step"] for c in request["steps"] if c["reused"] == [["stack"]]} == {3, 6}
    assert request["notes"] == []


def test_weights_written_to_between_requests() -> None:
    """Weights that are written to between requests: the next one has the new ones."""
    pipe = _compile(_pipe(), "compute")
    first = _generate(pipe)
    linear = pipe.transformer.blocks[0].attn1.to_q
    with torch.no_grad():
        linear.weight.data = linear.weight + 0.1 * torch.ones_like(linear.weight)
    second = _generate(pipe)
    assert not torch.equal(first, second)
    assert torch.equal(_generate(cachepass.restore(pipe)), second)


def test_a_copied_scheduler_is_no_clock() -> None:
    """Some pipelines step a deep copy of their scheduler beside it."""
    pipe = _compile(_pipe(), "compute")
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(7)
    assert len(other.timesteps) == 7
    _generate(pipe)
    assert len(other.timesteps) == 7, "the copy has timesteps of its own"
    (request,) = _requests(pipe)
    assert request["num_inference_steps"] == STEPS
    assert "sigmas" in inspect.signature(pipe.scheduler.set_timesteps).parameters


def test_a_scheduler_replaced_after_compile_is_an_error() -> None:
    pipe = _compile(_pipe(), "compute")
    _generate(pipe)
    pipe.scheduler = build_scheduler("euler")
    with pytest.raises(cachepass.SessionError, match=r"scheduler replaced after .*restore\(pipe\)"):
        _generate(pipe)
    pipe = _compile(cachepass.restore(pipe), "compute")
    _generate(pipe)


def test_a_reset_in_the_middle_goes_on_cold() -> None:
    pipe = _compile(_pipe(), cachepass.Schedule(reuse={1: "stack", 3: "stack", 4: "stack"}))

    def reset(owner: Any, step: int, time: torch.Tensor, given: dict[str, Any]) -> Any:
        if step == 2:
            cachepass.reset(pipe)
        return given

    _generate(pipe, callback_on_step_end=reset)
    (request,) = _requests(pipe)
    calls = [(c["step"], bool(c["reused"][0])) for c in request["steps"] if c["branch"] == "cond"]
    assert calls == [(0, False), (1, True), (2, False), (3, False), (4, True)]


def test_schedulers_tell_the_same_steps() -> None:
    """Two schedulers' loops differ in nothing but the clock: reuse is the same."""
    found = []
    for scheduler in ("euler", "unipc"):
        pipe = _compile(_pipe(scheduler), cachepass.FirstBlock(threshold=1e9, warmup_steps=0))
        _generate(pipe)
        (request,) = _requests(pipe)
        found.append([c["reused"] for c in request["steps"]])
    assert found[0] == found[1] == [[[]]] * 2 + [[["step"]]] * (2 * STEPS - 2)
