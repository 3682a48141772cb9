"""Each fit against a transcription on plain hooks; the pipeline afterwards; profiles as files."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import cachepass
from cachepass.calibrate.influence import Noise, Subject, _disturb
from cachepass.calibrate.search import Line, replay, solve
from cachepass.ir.boundary import Layout
from cachepass.runtime.policy import Measure
from examples.shapes.pipeline import ShapesPipeline, build_pipeline, build_scheduler

STEPS = 8
PROMPTS = ["red disc bounce plain", "yellow cross orbit stripes"]
SIZE = {"height": 32, "width": 32}
FRAMES = 8
Pair = list[float]
Observe = Callable[[str, Tensor], None]


def _transformer(layers: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=32, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip
    return model.eval()


def _pipe(layers: int = 4) -> ShapesPipeline:
    pipe = build_pipeline("small")
    pipe.transformer = _transformer(layers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _calibrate(pipe: Any, policy: str, **options: Any) -> cachepass.Profile:
    given: dict[str, Any] = {
        "prompts": PROMPTS,
        "num_inference_steps": STEPS,
        "progress": False,
        "call_options": SIZE,
    } | options
    return cachepass.calibrate(pipe, policy=policy, **given)


def _generate(pipe: Any, prompt: int = 0, **options: Any) -> Tensor:
    latent: Tensor = pipe(
        PROMPTS[prompt],
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(prompt),
        **SIZE,
        **options,
    ).frames
    return latent


def _record(pipe: Any, watch: Callable[[nn.Module, Observe], list[Any]]) -> Iterator[Any]:
    """Run each prompt on the plain pipeline; yields name -> the values of a branch's calls."""
    for prompt in range(len(PROMPTS)):
        seen: dict[str, list[Tensor]] = {}

        def observe(name: str, value: Tensor, seen: dict[str, list[Tensor]] = seen) -> None:
            seen.setdefault(name, []).append(value.detach().clone())

        handles = watch(pipe.transformer, observe)
        _generate(pipe, prompt)
        for handle in handles:
            handle.remove()
        for branch in (0, 1):  # calls come in turn: conditional, unconditional
            yield prompt, branch, {name: values[branch::2] for name, values in seen.items()}


def _rel(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().sum() / before.abs().sum())


def _decisions(pipe: Any, policy: Any) -> list[list[str]]:
    """What each call of one request reuses."""
    cachepass.compile(pipe, policy=policy, inner="eager")
    _generate(pipe)
    (request,) = cachepass.report(pipe).to_dict()["requests"]
    cachepass.restore(pipe)
    return [call["reused"][0] for call in request["steps"]]


def _share(decisions: list[list[str]]) -> float:
    return sum(not reused for reused in decisions) / len(decisions)


@pytest.fixture(scope="module")
def teacache() -> cachepass.Profile:
    return _calibrate(_pipe(), "teacache", options={"warmup_steps": 1}, rate=0.5)


# ------------------------------------------------------------------------------- fits


def test_teacache_is_the_polynomial_of_what_hooks_see(teacache: cachepass.Profile) -> None:
    def watch(model: Any, observe: Observe) -> list[Any]:
        return [
            model.condition_embedder.register_forward_hook(lambda *a: observe("m", a[2][1])),
            model.register_forward_hook(lambda *a: observe("out", a[2][0])),
        ]

    xs: Pair = []
    ys: Pair = []
    for _, _, seen in _record(_pipe(), watch):
        for step in range(1, STEPS):
            xs.append(_rel(seen["m"][step], seen["m"][step - 1]))
            ys.append(_rel(seen["out"][step], seen["out"][step - 1]))
    assert len(xs) == 2 * len(PROMPTS) * (STEPS - 1)
    expected = np.polyfit(xs, ys, 4)
    fitted = teacache.fields["coefficients"]
    assert len(fitted) == 5
    # Coefficients trade off against each other; what they give for these changes does not.
    got, want = np.polyval(fitted, xs), np.polyval(expected, xs)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    error = float(np.sqrt(np.mean((want - np.array(ys)) ** 2)))
    assert teacache.measured["error"] == pytest.approx(error, rel=1e-3)


def test_the_rate_is_met_and_a_file_decides_as_the_policy(
    teacache: cachepass.Profile, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    teacache.save(path)
    pipe = _pipe()
    decisions = _decisions(pipe, cachepass.TeaCache(**teacache.fields))
    assert abs(_share(decisions) - 0.5) <= 1 / STEPS
    assert _share(decisions) == teacache.measured["share"]
    assert _decisions(pipe, str(path)) == decisions
    described = [
        cachepass.report(cachepass.compile(_transformer(), policy=policy)).to_dict()["policy"]
        for policy in (path, str(path), teacache)
    ]
    assert described == [repr(teacache)] * 3


def test_magcache_is_the_mean_of_token_ratios() -> None:
    pipe = _pipe()
    options = {"warmup_steps": 1, "max_in_a_row": None}
    profile = _calibrate(pipe, "magcache", options=options, rate=0.5)

    def watch(model: Any, observe: Observe) -> list[Any]:
        return [
            model.blocks[0].register_forward_pre_hook(lambda *a: observe("in", a[1][0])),
            model.blocks[-1].register_forward_hook(lambda *a: observe("out", a[2])),
        ]

    found: list[list[list[float]]] = [[], []]
    for _, branch, seen in _record(pipe, watch):
        residuals = [out - entering for out, entering in zip(seen["out"], seen["in"], strict=True)]
        sizes = [r.norm(dim=2) for r in residuals]
        steps = range(1, STEPS)
        found[branch].append([1.0, *(float((sizes[t] / sizes[t - 1]).mean()) for t in steps)])
    ratios, uncond = ([statistics.mean(c) for c in zip(*of, strict=True)] for of in found)
    assert profile.fields["ratios"] == pytest.approx(ratios, rel=1e-4)
    assert profile.fields["uncond_ratios"] == pytest.approx(uncond, rel=1e-4)
    assert profile.fields["ratios"][0] == 1.0
    assert abs(_share(_decisions(pipe, profile)) - 0.5) <= 1 / STEPS


def test_adacache_scales_its_codebook() -> None:
    pipe = _pipe()
    profile = _calibrate(pipe, "adacache", rate=0.6)

    def watch(model: Any, observe: Observe) -> list[Any]:
        block = model.blocks[2]  # the middle of four: what enters, and what leaves self-attention
        return [
            block.register_forward_pre_hook(lambda *a: observe("in", a[1][0])),
            block.norm2.register_forward_pre_hook(lambda *a: observe("out", a[1][0])),
        ]

    scores = []
    for _, _, seen in _record(pipe, watch):
        pairs = list(zip(seen["out"], seen["in"], strict=True))
        for out, entering in pairs[1:]:  # the first has nothing to be compared with
            video = (out - entering).unflatten(1, (FRAMES, -1))
            later, earlier = video[:, 1:], video[:, :-1]
            scores.append(
                float((later - earlier).abs().sum() / (later.abs() + earlier.abs()).sum())
            )
    assert profile.fields["motion_scale"] == pytest.approx(statistics.median(scores), rel=1e-3)
    factors = [
        bound / default
        for (bound, rate), (default, same) in zip(
            profile.fields["codebook"], cachepass.AdaCache().codebook, strict=True
        )
        if rate == same
    ]
    assert factors == pytest.approx([factors[0]] * 4)
    assert abs(_share(_decisions(pipe, profile)) - 0.6) <= 1 / STEPS


def test_adacache_without_a_rate_keeps_its_codebook() -> None:
    profile = _calibrate(_pipe(layers=2), "adacache", prompts=PROMPTS[0])
    assert list(profile.fields) == ["motion_scale"]
    assert profile.prompts == 1


def _disturbed(pipe: Any, kind: str, at: int, generator: torch.Generator) -> Tensor:
    """The final latent with noise at one step, by hooks that know this model."""
    calls = [-1]
    kept: dict[str, Tensor] = {}
    model = pipe.transformer

    def noisy(value: Tensor, cached: Tensor) -> Tensor:
        rms = cached.pow(2).mean().sqrt()
        return value + 0.03 * rms * torch.randn(value.shape, generator=generator)

    def of_model(module: Any, args: Any, output: Any) -> Any:
        (value,) = output
        if calls[0] // 2 != at or kind == "block":
            return output
        if kind == "step":
            return (noisy(value, value),)
        if calls[0] % 2 == 0:
            kept["cond"] = value
            return output
        return (noisy(value, value - kept["cond"]),)

    def of_block(module: Any, args: Any, output: Any) -> Any:
        if calls[0] // 2 != at or kind != "block":
            return output
        return noisy(output, output - kept["in"])

    handles = [
        model.register_forward_pre_hook(lambda *a: calls.append(calls.pop() + 1)),
        model.blocks[1].register_forward_pre_hook(lambda *a: kept.update({"in": a[1][0]})),
        model.blocks[2].register_forward_hook(of_block),
        model.register_forward_hook(of_model),
    ]
    latent = _generate(pipe)
    for handle in handles:
        handle.remove()
    return latent


def test_mixcache_weighs_what_noise_does() -> None:
    pipe = _pipe()
    profile = _calibrate(pipe, "mixcache", prompts=PROMPTS[:1])
    calm = _generate(pipe)
    generator = torch.Generator().manual_seed(77)
    expected = {
        kind: statistics.mean(_rel(_disturbed(pipe, kind, at, generator), calm) for at in (2, 4, 6))
        for kind in ("step", "cfg", "block")
    }
    assert list(profile.fields) == ["influence"]
    influence = profile.fields["influence"]
    largest = max(expected.values())
    assert max(influence) == 1.0
    # Other noise: the numbers are near, and in the same order.
    assert influence == pytest.approx([e / largest for e in expected.values()], rel=0.2)
    assert profile.measured == pytest.approx(expected, rel=0.2)


def test_mixcache_without_guidance() -> None:
    options = {**SIZE, "guidance_scale": 1.0}
    profile = _calibrate(_pipe(2), "mixcache", prompts=PROMPTS[:1], call_options=options)
    assert profile.fields["influence"][1] == 1.0
    assert "cfg" not in profile.measured


class Apart(nn.Module):
    """Moves the unconditional half, the first, away from the other."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch + torch.tensor([1.0, 0.0])[:, None, None]


def test_noise_for_branches_in_one_batch() -> None:
    model, noise = Apart(), Noise(0)
    subject = Subject(module=model, layout=Layout(), calls=((0, "cond_uncond"), (1, "cond_uncond")))
    batch = torch.randn(1, 3, 4).repeat(2, 1, 1)
    with _disturb(subject, "cfg", 0, cachepass.Blocks(), noise):
        first, second = model(batch), model(batch)
    assert noise.used
    assert torch.equal(first[1], batch[1])
    assert torch.equal(second, model(batch))
    change = first[0] - second[0]  # of the difference, which is 1 everywhere
    assert 0.01 < float(change.pow(2).mean().sqrt()) < 0.1


@pytest.mark.parametrize("name", ["firstblock", "easycache"])
def test_thresholds_by_running(name: str) -> None:
    pipe = _pipe(layers=2)
    options = {"warmup_steps": 1}
    profile = _calibrate(pipe, name, options=options, rate=0.5)
    assert set(profile.fields) == {"warmup_steps", "threshold"}
    cachepass.compile(pipe, policy=profile, inner="eager")
    _generate(pipe)
    (request,) = cachepass.report(pipe).to_dict()["requests"]
    assert 1 - request["blocks_skipped"] == pytest.approx(profile.measured["share"])
    assert abs(profile.measured["share"] - 0.5) <= 1 / STEPS


# ------------------------------------------------------------------------- the search


def _lines(changes: list[float]) -> list[Line]:
    def measured(step: int, _: object) -> dict[str, Measure]:
        return {"timestep": Measure(changes[step], 1.0, step, 1)}

    return [Line(branch="cond", steps=len(changes), measured=measured)]


def test_a_replay_asks_the_rule() -> None:
    policy = cachepass.TeaCache(coefficients=(1.0, 0.0), threshold=0.25, warmup_steps=0)
    # Reused: .1, .2 (sums below .25); computed: .3, then anew; the last step is always.
    assert replay(policy.combine(), _lines([0.1] * 8)) == 4 / 8


@pytest.mark.parametrize(("rate", "share"), [(0.99, 1.0), (0.8, 1.0), (0.6, 0.5), (0.3, 0.3)])
def test_the_middle_of_the_nearest_share(rate: float, share: float) -> None:
    def of(number: float) -> float:
        return 1.0 if number < 2 else 0.5 if number < 6 else 0.3

    number, reached = solve(of, rate, steps=10, policy="x")
    assert reached == share
    assert number == pytest.approx({1.0: 1, 0.5: 4, 0.3: 9}[share], abs=0.01)


def test_a_rate_out_of_reach() -> None:
    rule = r"`rate`=0.1\): policy 'teacache' computes between 0.75 and 1 of 8 steps.*shorter warm-u"
    with pytest.raises(cachepass.PolicyError, match=rule):
        _calibrate(_pipe(), "teacache", options={"warmup_steps": 5}, rate=0.1, prompts=PROMPTS[:1])
    rule = r"`rate`=0.1\): policy 'firstblock' computed .* of the blocks even with a threshold of"
    with pytest.raises(cachepass.PolicyError, match=rule):
        _calibrate(_pipe(2), "firstblock", options={"warmup_steps": 6}, rate=0.1)


# ---------------------------------------------------------------------- left as it was


def _state(pipe: Any) -> list[dict[str, Any]]:
    model = pipe.transformer
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(vars(m)) for m in model.modules()
    ]
    return [dict(vars(owner)) for owner in (pipe, pipe.scheduler, model)] + [{"hooks": hooks}]


@pytest.mark.parametrize("policy", ["teacache", "mixcache"])
def test_the_pipeline_is_as_before(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = _pipe(layers=2)
    pipe.set_progress_bar_config(disable=False)
    expected = _generate(pipe)
    before = _state(pipe)
    capsys.readouterr()
    _calibrate(pipe, policy, prompts=PROMPTS[:1])
    assert capsys.readouterr().err == ""
    assert _same(_state(pipe), before)

    calls = [0]

    def fail(owner: Any, step: int, time: Tensor, given: dict[str, Any]) -> Any:
        calls[0] += 1
        if calls[0] == 2 * STEPS + 5:  # in the midst of a disturbed step
            raise KeyboardInterrupt
        return given

    options = {**SIZE, "callback_on_step_end": fail}
    many = PROMPTS * 2
    with pytest.raises(KeyboardInterrupt):
        _calibrate(pipe, policy, prompts=many, call_options=options, progress=True)
    assert f"calibrate {policy}" in capsys.readouterr().err
    assert _same(_state(pipe), before)
    assert torch.equal(_generate(pipe), expected)


def _same(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    """The very objects, but for the numbers that hooks are counted by."""
    *owners, hooks = zip(now, before, strict=True)
    return hooks[0] == hooks[1] and all(
        list(a) == list(b) and all(a[name] is b[name] for name in a) for a, b in owners
    )


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "firstblock"}, r"'firstblock' has nothing to fit but its `threshold`: say wit"),
        ({"policy": "schedule"}, r"'schedule' has nothing to fit: choose one of adacache, dbcac"),
        ({"policy": "nothing"}, r"unknown policy 'nothing': choose one of"),
        ({"policy": "mixcache", "rate": 0.5}, r"`rate`=0.5\): policy 'mixcache' has no number th"),
        ({"policy": "teacache", "rate": 1.0}, r"`rate`=1.0\): must be a share of computed steps"),
        ({"policy": "teacache", "prompts": []}, r"`prompts`=\[\]\): must be one string or severa"),
        ({"policy": "teacache", "num_inference_steps": 1}, r"`num_inference_steps`=1\): must be"),
        (
            {"policy": "teacache", "options": {"coefficients": (1.0,)}},
            r"`options`=\.\.\.\): holds \['coefficients'\], which calibration fits: leave it out",
        ),
        (
            {"policy": "magcache", "options": {"threshold": 1.0}, "rate": 0.5},
            r"holds \['threshold'\], which calibration fits",
        ),
        (
            {"policy": "teacache", "call_options": {"generator": None}},
            r"`call_options`=\.\.\.\): holds \['generator'\], which calibration gives itself",
        ),
        (
            {"policy": "adacache", "options": {"motion": False}},
            r"without `motion` has nothing to fit but its `codebook`: say with `rate`",
        ),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(cachepass.PolicyError, match=text):
        _calibrate(_pipe(), **options)


def test_too_few_steps_for_a_polynomial() -> None:
    text = r"`num_inference_steps`=4\): a polynomial of degree 4 takes at least 5 .* at least 6 ste"
    with pytest.raises(cachepass.PolicyError, match=text):
        _calibrate(_pipe(2), "teacache", num_inference_steps=4, prompts=PROMPTS[:1])


def test_pipelines() -> None:
    pipe = cachepass.compile(_pipe(), policy="compute", inner="eager")
    with pytest.raises(cachepass.CachePassError, match=r"`transformer` of this .* compiled alread"):
        _calibrate(pipe, "teacache")
    with pytest.raises(cachepass.CachePassError, match=r"give it the pipeline, not the model"):
        _calibrate(_transformer(), "teacache")
    pipe = _pipe()
    pipe.register_modules(transformer_2=_transformer(layers=2))
    with pytest.raises(cachepass.CachePassError, match=r"denoisers that differ \(transformer, tra"):
        _calibrate(pipe, "teacache")


# ---------------------------------------------------------------------------- profiles


def test_a_profile_comes_back_from_its_file(teacache: cachepass.Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    teacache.save(path)
    assert cachepass.Profile.load(path) == teacache
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["format"] == 1
    assert data["policy"] == "teacache"
    assert data["model"]["class"] == "WanTransformer3DModel"
    assert data["model"]["config"]["num_layers"] == 4
    assert not [name for name in data["model"]["config"] if name.startswith("_")]
    assert data["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert data["versions"]["torch"] == torch.__version__
    with pytest.raises(cachepass.PolicyError, match=r"must end in .json"):
        teacache.save(tmp_path / "profile")
    site = dataclasses.replace(teacache, fields={"site": cachepass.Blocks()})
    with pytest.raises(cachepass.PolicyError, match=r"field `site`=Blocks.* cannot be written"):
        site.save(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: "no json", r"is not JSON \(Expecting value"),
        (lambda data: "[]", r"is none: it has no `format`"),
        (lambda data: data | {"format": 9}, r"another `format` than 1, .*wrote it \(0\.1\.0\)"),
        (lambda data: {"format": 1, "policy": "x"}, r"misses \['fields', 'model'"),
        (lambda data: data | {"more": 1}, r"unknown keys \['more'\]"),
        (lambda data: data | {"prompts": 0}, r"`prompts`=0\): must be a count of at least 1"),
        (lambda data: data | {"model": []}, r"`model`=\[\]\): must be a mapping"),
        (lambda data: data | {"model": {}}, r"`model`={}\): must hold `class`, a name, and"),
    ],
)
def test_a_file_that_is_no_profile(
    change: Callable[[Any], Any], text: str, teacache: cachepass.Profile, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    teacache.save(path)
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed), encoding="utf-8")
    with pytest.raises(cachepass.PolicyError, match=rf"profile .*profile\.json.*{text}"):
        cachepass.compile(_transformer(), policy=str(path))


def test_a_file_that_is_missing_or_names_no_policy(
    teacache: cachepass.Profile, tmp_path: Path
) -> None:
    with pytest.raises(cachepass.PolicyError, match=r"none\.json: No such file.*cachepass\.calib"):
        cachepass.compile(_transformer(), policy="none.json")
    wrong = dataclasses.replace(teacache, policy="tea")
    with pytest.raises(cachepass.PolicyError, match=r"unknown policy 'tea': choose one of"):
        cachepass.compile(_transformer(), policy=wrong)


def test_a_profile_of_another_model(teacache: cachepass.Profile) -> None:
    text = r"profile of policy 'teacache' was .* another model: `num_layers` 4 then, 2 now"
    pipe = _pipe(layers=2)
    model = pipe.transformer
    with pytest.raises(cachepass.PolicyError, match=text):
        cachepass.compile(pipe, policy=teacache)
    assert pipe.transformer is model
    with pytest.raises(cachepass.PolicyError, match=r"WanTransformer3DModel then, Linear now"):
        cachepass.compile(nn.Linear(1, 1), policy=teacache)


def test_what_else_differs_is_a_note(teacache: cachepass.Profile) -> None:
    def notes(pipe: Any, profile: cachepass.Profile) -> list[str]:
        compiled = cachepass.compile(pipe, policy=profile, inner="eager")
        found: list[str] = cachepass.report(compiled).to_dict()["notes"]
        return [note for note in found if note.startswith("profile")]

    always = f"profile of 2 prompts at {STEPS} steps: with another number of steps it is a guess"
    assert notes(_pipe(), teacache) == [always]
    old = dataclasses.replace(teacache, versions={**teacache.versions, "diffusers": "0.1"})
    pipe = _pipe()
    pipe.scheduler = build_scheduler("unipc")
    first, scheduler, library = notes(pipe, old)
    assert first == always
    assert scheduler.endswith("FlowMatchEulerDiscreteScheduler then, UniPCMultistepScheduler now")
    assert library.startswith("profile measured with diffusers 0.1, this is ")


def test_options_beside_a_profile(teacache: cachepass.Profile) -> None:
    pipe = cachepass.compile(_pipe(), policy=teacache, options={"threshold": 0.0})
    assert "threshold=0.0" in cachepass.report(pipe).to_dict()["policy"]
    with pytest.raises(cachepass.PolicyError, match=r"'teacache' has no option 'rate'"):
        cachepass.compile(_pipe(), policy=teacache, options={"rate": 0.5})
