"""Rows of several requests in one call: each does what it does alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import cachepass
from tests.graphs import examples
from tests.models import TINY, TOY, WAN, as_tensor, distance
from tests.requests import BOTH, caller, decisions, denoise, notes, run

pytestmark = pytest.mark.filterwarnings("ignore:.*reused nothing in a request:UserWarning")

POLICIES: list[cachepass.NamedPolicy] = [
    cachepass.Compute(),
    cachepass.Schedule(reuse={1: "step", 3: "cfg", 4: "stack", 5: "attention"}),
    cachepass.MixCache(trigger=9.0, influence=(0.3, 1.0, 1.0), warmup=0.0),
    cachepass.AdaCache(codebook=((0.1, 4), (0.13, 3), (0.16, 2), (1.0, 1)), motion=False),
    cachepass.FirstBlock(threshold=0.105, warmup_steps=0),
    cachepass.TeaCache(threshold=0.2, warmup_steps=1),
    cachepass.DBCache(threshold=0.2, front=1, warmup_steps=1),
    cachepass.TaylorSeer(interval=2, warmup_steps=1),
    cachepass.PAB(),
    cachepass.FasterCache(start=1),
    cachepass.EasyCache(threshold=0.5, warmup_steps=1),
    cachepass.MagCache(threshold=0.5, ratios=(1.0, 0.9, 0.8, 0.9), warmup_steps=1),
    cachepass.DiCache(threshold=0.4, warmup_steps=1),
]


class Request:
    """One of several, with a length and a latent of its own."""

    def __init__(self, model: Any, seed: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.session = cachepass.session(model, num_inference_steps=steps)
        self.latent = torch.randn(1, 4, 2, 8, 8, generator=generator)
        self.texts = {b: torch.randn(1, 5, 16, generator=generator) for b in BOTH}
        self.step, self.steps = 0, steps
        self.calls: list[tuple[int, str, Tensor, Tensor]] = []
        """Step, branch, latent that went in and output."""

    @property
    def time(self) -> Tensor:
        return torch.tensor([1000.0 * (1 - self.step / self.steps)])

    def take(self, outputs: dict[str, Tensor]) -> None:
        """The outputs of a step; goes on to the next one."""
        self.calls += [(self.step, b, self.latent, outputs[b]) for b in BOTH]
        velocity = outputs["uncond"] + 3.0 * (outputs["cond"] - outputs["uncond"])
        self.latent = self.latent - velocity / self.steps
        self.step += 1


def step_together(model: Any, requests: Sequence[Request], *, in_one: bool = False) -> None:
    """A step of several requests: a call for each branch, or one for both."""
    outputs: list[dict[str, Tensor]] = [{} for _ in requests]
    for branches in (BOTH,) if in_one else [(b,) for b in BOTH]:
        listed = [(i, b) for b in branches for i in range(len(requests))]
        with cachepass.rows(
            model,
            [requests[i].session.row(branch=b, step=requests[i].step) for i, b in listed],
        ):
            made = as_tensor(
                model(
                    torch.cat([requests[i].latent for i, _ in listed]),
                    torch.cat([requests[i].time for i, _ in listed]),
                    torch.cat([requests[i].texts[b] for i, b in listed]),
                    return_dict=False,
                )
            )
        for (i, branch), output in zip(listed, made.split(1), strict=True):
            outputs[i][branch] = output
    for request, found in zip(requests, outputs, strict=True):
        request.take(found)


def assert_as_alone(model: Any, request: Request) -> None:
    """A session of its own, given the same inputs one by one, decides and returns the same."""
    alone = cachepass.session(model, num_inference_steps=request.steps)
    call = caller(model, alone)
    for step, branch, latent, output in request.calls:
        time = torch.tensor([1000.0 * (1 - step / request.steps)])
        assert distance(output, call(step, branch, latent, time, request.texts[branch])) < 1e-5
    assert decisions(request.session) == decisions(alone)


_CACHE: dict[str, Any] = {}
_QUICK = ("schedule", "firstblock", "adacache", "mixcache")
"""One of each kind: told, one signal, its own rate, several sites."""


def _cached(policy: cachepass.NamedPolicy) -> Any:
    if policy.name not in _CACHE:
        _CACHE[policy.name] = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    return _CACHE[policy.name]


@pytest.mark.parametrize(
    "policy",
    [p if p.name in _QUICK else pytest.param(p, marks=pytest.mark.full) for p in POLICIES],
    ids=lambda p: p.name,
)
@examples(4)
@given(data=st.data())
def test_requests_that_join_and_leave(policy: cachepass.NamedPolicy, data: st.DataObject) -> None:
    model = _cached(policy)
    lengths = data.draw(st.lists(st.sampled_from([4, 6, 8]), min_size=2, max_size=4))
    requests = [Request(model, seed, steps) for seed, steps in enumerate(lengths)]
    while running := [r for r in requests if r.step < r.steps]:
        count = data.draw(st.integers(1, len(running)))
        step_together(model, data.draw(st.permutations(running))[:count])
    for request in requests:
        assert_as_alone(model, request)
        request.session.drop()
        assert request.session.cache_bytes == 0


@pytest.mark.parametrize("policy", [POLICIES[i] for i in (1, 3, 4)], ids=lambda p: p.name)
def test_both_branches_in_one_call(policy: cachepass.NamedPolicy) -> None:
    """A step's conditional output is not there for an unconditional row of the same call."""
    if policy.name == "schedule":
        policy = cachepass.Schedule(reuse={1: "step", 4: "stack"})
    model = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    requests = [Request(model, seed, steps=6) for seed in range(2)]
    while requests[0].step < 6:
        step_together(model, requests, in_one=True)
    for request in requests:
        assert_as_alone(model, request)


class Folded(nn.Module):
    """Has the tokens of all rows in one dimension, whose size all blocks ask for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        folded = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        made: Tensor = self.inner(folded).reshape(x.shape)
        return made


def test_sizes_that_blocks_share() -> None:
    model = WAN.model()
    for block in model.blocks:
        block.ffn = Folded(block.ffn)
    policy = cachepass.Schedule(reuse={1: "stack", 2: "block", 3: "mlp"}, blocks=(0.0, 0.5))
    cached = cachepass.compile(model, policy=policy, inner="eager")
    early, late = (Request(cached, seed, steps=4) for seed in range(2))
    step_together(cached, [early])
    for _ in range(3):
        step_together(cached, [early, late])
    for request in (early, late):
        assert_as_alone(cached, request)


def test_cfg_is_reused_across_calls_only() -> None:
    model = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "cfg", 2: "cfg"}), inner="eager"
    )
    (request,) = requests = [Request(model, 0, steps=4)]
    step_together(model, requests)
    step_together(model, requests)
    step_together(model, requests, in_one=True)
    assert decisions(request.session)[2:] == [
        (1, "cond", []), (1, "uncond", ["cfg"]), (2, "cond", []), (2, "uncond", []),
    ]  # fmt: skip


def test_rows_that_compute_are_gathered() -> None:
    """One row of four costs a quarter."""
    model = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "step"}), inner="eager"
    )
    requests = [Request(model, seed, steps=4) for seed in range(4)]
    step_together(model, requests[:3])
    flops = []
    for together in (requests, requests):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            with_flops=True,
            record_shapes=True,
            acc_events=True,  # torch 2.11 warns without
        ) as seen:
            step_together(model, together)
        flops.append(sum(event.flops for event in seen.key_averages()))
    assert [names for _, _, names in decisions(requests[0].session)][2:] == [["step"]] * 2 + [
        []
    ] * 2
    assert [names for _, _, names in decisions(requests[3].session)][:2] == [[]] * 2
    # Three of four reused in the first call; in the second, the fourth did.
    assert flops[0] * 3 == pytest.approx(flops[1], rel=0.01)


def test_samples_and_branches_of_one_request() -> None:
    policy = cachepass.FirstBlock(threshold=0.105, warmup_steps=0)
    model = cachepass.compile(WAN.model(), policy=policy, inner="eager")
    outputs, whole = run(model, steps=8, rows=3)
    session = cachepass.session(model, num_inference_steps=8)
    times = iter(outputs)

    def by_rows(step: int, branch: str, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        with cachepass.rows(
            model, [session.row(sample=i, branch=branch, step=step) for i in (2, 0, 1)]
        ):
            order = torch.tensor([2, 0, 1])
            out = as_tensor(model(latent[order], time, text[order], return_dict=False))
        assert distance(out[[1, 2, 0]], next(times)) < 1e-5
        return outputs[2 * step + BOTH.index(branch)]

    denoise(by_rows, steps=8, rows=3)
    for row, mine in enumerate((1, 2, 0)):
        assert decisions(whole, row) == decisions(session, mine)


def test_steps_count_themselves() -> None:
    model = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "step"}), inner="eager"
    )
    a, b = (Request(model, seed, steps=3) for seed in range(2))
    inputs = [torch.cat(pair) for pair in ((a.latent, b.latent), (a.time, b.time))]
    for listed in ([a.session, b.session], [b.session, a.session]):
        with cachepass.rows(model, listed):
            for branch in BOTH:
                with model.cache_context(branch):
                    model(*inputs, torch.cat([a.texts[branch], b.texts[branch]]))
    expected = [(0, "cond", []), (0, "uncond", []), (1, "cond", ["step"]), (1, "uncond", ["step"])]
    assert decisions(a.session) == decisions(b.session) == expected


def test_prompts_of_different_lengths_keep_their_slots() -> None:
    """A branch has a text of its own length: nothing of the other's is dropped."""
    model = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "stack"}), inner="eager"
    )
    session = cachepass.session(model, num_inference_steps=3)
    call = caller(model, session)
    for step in range(3):
        for branch, words in zip(BOTH, (5, 7), strict=True):
            call(
                step,
                branch,
                torch.randn(1, 4, 2, 8, 8),
                torch.tensor([900.0]),
                torch.randn(1, words, 16),
            )
    assert [names for _, _, names in decisions(session)] == [[], [], ["stack"], ["stack"], [], []]
    assert notes(session) == ""


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_a_batch_of_one_size_only() -> None:
    """Mochi counts its prompt's tokens, which fixes the batch: rows are selected, not gathered."""
    tiny = TINY["mochi"]
    model: Any = cachepass.compile(
        tiny.model(), policy=cachepass.FirstBlock(threshold=0.1, warmup_steps=0), inner="eager"
    )
    pair = [tiny.example(1), tiny.example(2)]
    session = cachepass.session(model, num_inference_steps=4)
    for step in range(2):
        pair[1]["hidden_states"] = pair[1]["hidden_states"] + step
        inputs = {
            name: torch.cat([value, pair[1][name]]) if isinstance(value, Tensor) else value
            for name, value in pair[0].items()
        }
        with session.at(step=step):
            out = as_tensor(model(**inputs))
    assert [decisions(session, row)[1][2] for row in range(2)] == [["step"], []]
    with torch.no_grad():
        assert distance(out[1:], as_tensor(tiny.model()(**inputs))[1:]) < 1e-5


def test_views_of_one_tensor_tell_branches_apart() -> None:
    """Halves of a batch of texts, in a loop that names nothing, with two calls at a timestep."""
    model = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "step"}), inner="eager"
    )
    uncond, cond = torch.randn(4, 5, 16).chunk(2)
    latent = torch.randn(2, 4, 2, 8, 8)
    for time in (1000.0, 600.0, 600.0, 200.0):
        for text in (cond, uncond):
            model(latent, torch.full((2,), time), text, return_dict=False)
    (request,) = cachepass.report(model).to_dict()["requests"]
    assert [(c["step"], c["branch"]) for c in request["steps"]] == [
        (step, branch) for step in range(4) for branch in ("call0", "call1")
    ]


def test_a_view_that_is_written_to() -> None:
    """A copy of it, made for its place in memory, may not be taken for what it is now."""
    model: Any = cachepass.compile(WAN.model(), policy="compute", inner="eager")
    time, text = torch.full((2,), 900.0), torch.randn(2, 5, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            latent = torch.randn(4, 4, 2, 8, 8)[2:]
            for _ in range(2):
                out = as_tensor(model(latent, time, text, return_dict=False))
                want = as_tensor(model._orig_mod(latent, time, text, return_dict=False))
                assert torch.equal(out, want)
                latent.mul_(2)


def test_uncond_stands_on_the_cond_of_its_own_sample() -> None:
    """Where the unconditional call comes first and samples change their order, it is computed."""
    model: Any = cachepass.compile(
        WAN.model(), policy=cachepass.Schedule(reuse={1: "cfg", 2: "cfg"}), inner="eager"
    )
    session = cachepass.session(model, num_inference_steps=4)
    latent, texts = torch.randn(2, 4, 2, 8, 8), {b: torch.randn(2, 5, 16) for b in BOTH}
    time = torch.full((2,), 900.0)
    for step, order in enumerate(([0, 1], [0, 1], [1, 0])):
        for branch in ("uncond", "cond"):
            listed = [session.row(sample=i, branch=branch, step=step) for i in order]
            with cachepass.rows(model, listed):
                out = as_tensor(model(latent[order], time, texts[branch][order]))
            with torch.no_grad():
                want = as_tensor(model._orig_mod(latent[order], time, texts[branch][order]))
            assert distance(out, want) < 1e-5
    told = [names for _, branch, names in decisions(session) if branch == "uncond"]
    assert told == [[], ["cfg"], []]


def test_a_changed_number_drops_the_slots() -> None:
    """An attribute of the model that is part of the graph, as a count of repetitions."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))
            self.times = 1

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = x + t[:, None, None]
            for block in self.blocks:
                h = h + self.times * block(h)
            return h

    module = Counted().eval()
    policy = cachepass.Schedule(reuse={1: "stack", 2: "stack"})
    model: Any = cachepass.compile(module, policy=policy, inner="eager")
    session = cachepass.session(model, num_inference_steps=4)
    for step, module.times in enumerate((1, 1, 2)):
        with session.at(step=step):
            model(torch.randn(1, 5, 6), torch.tensor([1.0]))
    assert [names for _, _, names in decisions(session)] == [[], ["stack"], []]


def test_rows_of_two_models() -> None:
    models: list[Any] = [
        cachepass.compile(WAN.model(), policy="compute", inner="eager") for _ in range(2)
    ]
    a, b = (Request(model, 0, steps=3) for model in models)
    with cachepass.rows(models[0], [a.session]), cachepass.rows(models[1], [b.session]):
        for model in models:
            model(a.latent, a.time, a.texts["cond"])
    assert decisions(a.session) == decisions(b.session) == [(0, "call0", [])]


def test_one_value_for_rows_that_remember_others() -> None:
    """The embedding of a timestep without rows says nothing of a session that had another."""
    policy = cachepass.TeaCache(threshold=1e9, warmup_steps=0)
    model: Any = cachepass.compile(Timeless().eval(), policy=policy, inner="eager")
    a, b = (cachepass.session(model, num_inference_steps=9) for _ in range(2))
    x = torch.randn(2, 5, 6)
    for session, time in ((a, 1.0), (b, 0.1)):
        with session.at(step=0):
            model(x[:1], torch.tensor(time))
    with cachepass.rows(model, [s.row(branch="cond") for s in (a, b)]):
        model(x, torch.tensor(0.9))
    assert [decisions(s)[1][2] for s in (a, b)] == [[], []]


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn], ids=str)
def test_one_value_for_the_samples_of_a_request(dtype: torch.dtype | None) -> None:
    """They do what one of them does; the value is kept once."""
    policy = cachepass.TeaCache(threshold=0.3, warmup_steps=1)
    model: Any = cachepass.compile(
        Timeless().eval(), policy=policy, inner="eager", cache_dtype=dtype
    )
    told = []
    for rows in (1, 3):
        session = cachepass.session(model, num_inference_steps=9)
        for step in range(9):
            with session.at(step=step):
                model(torch.ones(rows, 5, 6), torch.tensor(1 - step / 9))
        assert "no evidence" not in notes(session)
        told.append(decisions(session))
        kept = [k for (_, _, slot), k in session.slots.items() if "timestep" in slot]
        assert len(kept) == rows
        assert len({id(k.value) for k in kept}) == 1
    assert told[0] == told[1]
    assert {bool(names) for _, _, names in told[0]} == {True, False}


def test_requests_that_went_alike_share_one_value() -> None:
    policy = cachepass.TeaCache(threshold=0.3, warmup_steps=1)
    model: Any = cachepass.compile(Timeless().eval(), policy=policy, inner="eager")
    apart, together = (
        [cachepass.session(model, num_inference_steps=9) for _ in "ab"] for _ in "ab"
    )
    x = torch.randn(2, 5, 6)
    for step in range(9):
        time = torch.tensor(1 - step / 9)
        for row, session in enumerate(apart):
            with session.at(step=step):
                model(x[row : row + 1], time)
        for row, session in enumerate(together if step < 3 else ()):
            with session.at(step=step):
                model(x[row : row + 1], time)
        if step >= 3:
            with cachepass.rows(model, [s.row(branch="cond") for s in together]):
                model(x, time)
    assert [decisions(s) for s in together] == [decisions(s) for s in apart]


def test_a_shared_value_is_not_weighed_for_several_rows() -> None:
    """Each row has weights of its own, and there is one value."""
    policy = cachepass.TaylorSeer(site="stack", interval=2, order=1, warmup_steps=1)
    model: Any = cachepass.compile(Timeless(returned=True).eval(), policy=policy, inner="eager")
    reused = []
    for rows in (1, 2):
        session = cachepass.session(model, num_inference_steps=6)
        for step in range(6):
            with session.at(step=step):
                out = model(torch.ones(rows, 5, 6), torch.tensor(1 - step / 6))
            assert out.shape == (rows, 5, 6)
        reused.append(any(names for _, _, names in decisions(session)))
    assert reused == [True, False]
    assert "site 'stack' keeps a value that rows of a call share" in notes(session)


def test_a_site_with_one_value_for_all_rows() -> None:
    """It is computed for all or for none: there is no telling whose the value would be."""
    model: Any = cachepass.compile(
        Timeless(returned=True).eval(), inner="eager",
        policy=cachepass.Schedule(reuse={2: "stack", 4: "stack"}),
    )  # fmt: skip
    a, b, both = (cachepass.session(model, num_inference_steps=9) for _ in range(3))
    x = torch.randn(2, 5, 6)
    for step in range(5):
        time = torch.tensor(1 - step / 9)
        with both.at(step=step):
            whole = model(x, time)
        with a.at(step=step):
            alone = model(x[:1], time)
        assert distance(whole[:1], alone) < 1e-6
    assert decisions(both) == decisions(both, 1) == decisions(a)
    a.drop()
    for step in range(2):
        with cachepass.rows(model, [s.row(branch="cond", step=step) for s in (a, b)]):
            model(x, torch.tensor(1 - step / 9))
    with cachepass.rows(model, [a.row(branch="cond", step=2), b.row(branch="cond", step=3)]):
        mixed = model(x, torch.tensor(0.5))
    with torch.no_grad():
        assert distance(mixed, model._orig_mod(x, torch.tensor(0.5))) < 1e-6
    assert "and there was none that would do for all of them: it was computed" in notes(a)


class Timeless(nn.Module):
    """Takes one timestep for all rows."""

    def __init__(self, *, returned: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 6)
        self.blocks = nn.ModuleList(Modulated() for _ in range(3))
        self.returned = returned
        """Whether blocks change what they get of the timestep, too."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.embed(t.view(1, 1))
        block: Any
        for block in self.blocks:
            made = block(x, shift)
            x, shift = made, (shift + torch.tanh(block.linear(shift)) if self.returned else shift)
        out: Tensor = x + shift
        return out


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x + shift))


# --------------------------------------------------------------------------- errors


def test_what_rows_refuse() -> None:
    model, other = (
        cachepass.compile(WAN.model(), policy="compute", inner="eager") for _ in range(2)
    )
    a, b, stranger = (cachepass.session(m, num_inference_steps=4) for m in (model, model, other))
    cases: list[tuple[list[Any], str]] = [
        ([], r"`rows` is empty: a call has at least one row"),
        ([a, stranger], r"`rows`\[1\] is a session of another model"),
        ([a, b, a], r"`rows`\[2\] is there twice: one session, branch None and sample 0"),
        ([a.row(sample=1), a.row(sample=1)], r"`rows`\[1\] is there twice.*session\.row\(sample="),
    ]
    for listed, message in cases:
        with pytest.raises(cachepass.SessionError, match=message):
            cachepass.rows(model, listed)
    with pytest.raises(cachepass.SessionError, match=r"`step`=4: must be from 0 to 3"):
        a.row(step=4)
    rows = cachepass.rows(model, [a])
    with rows, pytest.raises(cachepass.SessionError, match=r"these `rows` are entered already"):
        rows.__enter__()
    with rows:  # after it was left
        pass
    request = Request(model, 0, steps=4)
    with (
        pytest.raises(
            cachepass.SessionError, match=r"the call has 1 rows, and .* lists 2: each row"
        ),
        cachepass.rows(model, [a, b]),
    ):
        model(request.latent, request.time, request.texts["cond"])
    with (
        pytest.raises(
            cachepass.SessionError, match=r"rows of one session are at steps \['0', '1'\]"
        ),
        cachepass.rows(model, [a.row(sample=0, step=0), a.row(sample=1, step=1)]),
    ):
        model(*(torch.cat([t, t]) for t in (request.latent, request.time, request.texts["cond"])))


def test_rows_of_a_session_that_runs_elsewhere() -> None:
    model = cachepass.compile(TOY.model(), policy="compute", inner="eager")
    a, b = (cachepass.session(model, num_inference_steps=4) for _ in range(2))
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with cachepass.rows(model, [b, a]):
                pass
        except cachepass.SessionError as error:
            errors.append(error)

    with a:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "entered in another thread" in str(errors[0])
    with cachepass.rows(model, [b]):  # it was left again
        pass


def test_a_whole_graph_takes_one_request_at_a_time() -> None:
    model = cachepass.compile(WAN.model(), policy="compute", inner="eager", lowering="graph")
    a, b = (Request(model, seed, steps=3) for seed in range(2))
    with pytest.raises(cachepass.SessionError, match=r"Compile the model with lowering='regions'"):
        step_together(model, [a, b])


@pytest.mark.full
def test_compiled_sublayers_of_some_rows() -> None:
    """What is gathered for them was part of a larger tensor: strides differ."""
    model: Any = cachepass.compile(WAN.model(), policy=cachepass.Schedule(reuse={1: "attention"}))
    requests = [Request(model, seed, steps=4) for seed in range(4)]
    step_together(model, requests[:2])
    while requests[0].step < 4:
        step_together(model, requests)
    for request in requests:
        assert_as_alone(model, request)


def test_compiled_once_for_any_number_of_rows() -> None:
    policy = cachepass.FirstBlock(threshold=0.105, warmup_steps=0)
    model: Any = cachepass.compile(WAN.model(), policy=policy)
    requests = [Request(model, seed, steps=8) for seed in range(4)]
    step_together(model, requests[:2])
    regions = model.denoiser.regions
    step_together(model, requests[1:])
    while requests[3].step < 8:
        step_together(model, [r for r in requests if r.step < 8])
    assert model.denoiser.regions == regions
    (driver,) = [d for p in model.denoiser.programs for same in p._drivers.values() for d in same]
    assert all(map(driver.takes, (1, 2, 3, 7)))
    costs = {
        record.blocks_computed / record.blocks
        for request in requests
        for record in request.session.history.records
    }
    assert costs == {0.25, 1.0}, "one of four blocks is looked at, whatever the neighbours do"
    for request in requests:
        assert_as_alone(model, request)
