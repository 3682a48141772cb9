"""What two processes do that work on one request; `tests/runtime/test_parallel.py` looks at it.

Each scenario runs on both ranks, from a latent whose two frames change at different paces: with
tokens split in two, each rank has one of them.
"""

from __future__ import annotations

import datetime
import functools
import pathlib
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.models import attention_dispatch
from torch import Tensor, nn

import cachepass
from tests.models import WAN, Tiny

BRANCHES = ("cond", "uncond")
STEPS = 12
SPOILED = 6
# How far each frame has gone at a step.
FIRST = (0.0, 0.02, 0.30, 0.31, 0.32, 0.60, 0.95, 0.96, 1.30, 1.31, 1.32, 1.33)
SECOND = (0.0, 0.30, 0.32, 0.33, 0.65, 0.66, 0.67, 0.68, 0.69, 1.00, 1.30, 1.60)

Result = dict[str, Any]


def _model() -> nn.Module:
    model: nn.Module = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model


TINY = Tiny(_model, WAN.inputs, blocks=2)
"""As few blocks as there may be: it is captured many times."""


def latents() -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        start, way = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 4, 2, 8, 8)
    shares = torch.tensor([FIRST, SECOND]).T[:, None, None, :, None, None]
    return list(start + shares * way)


def text(branch: str) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1 + BRANCHES.index(branch))
        return torch.randn(1, 5, 16) * (3.0 if branch == "cond" else 0.3)


def run(
    cached: Any,
    branches: tuple[str, ...],
    before: Callable[[int], None] = lambda step: None,
    spoil: Callable[[int, Tensor], Tensor] = lambda step, value: value,
) -> Result:
    """A request: what was decided, what came out, what was exchanged."""
    session = cachepass.session(cached, num_inference_steps=STEPS)
    outputs: dict[tuple[int, str], Tensor] = {}
    kept: dict[int, set[int]] = {}
    earlier = cachepass.report(session).to_dict()["ranks"]
    for step, latent in enumerate(latents()):
        before(step)
        for branch in branches:
            with session.at(step=step, branch=branch):
                outputs[step, branch] = cached(
                    hidden_states=spoil(step, latent),
                    timestep=torch.tensor([1000.0 * (1 - step / STEPS)]),
                    encoder_hidden_states=text(branch),
                    return_dict=False,
                )[0]
        kept[step] = {value.step for value in session.slots.values()}
    report = cachepass.report(session)
    data = report.to_dict()
    (request,) = data["requests"]
    return {
        "decisions": {(one["step"], one["branch"]): one["reused"] for one in request["steps"]},
        "outputs": outputs,
        "kept": kept,
        "notes": request["notes"],
        "exchanges": data["ranks"] and data["ranks"]["exchanges"] - earlier["exchanges"],
        "bytes": data["ranks"] and data["ranks"]["bytes"] - earlier["bytes"],
        "report": str(report),
        "stacks": data["stacks"],
    }


@functools.cache
def compiled(policy: Any, group: Any = None, split: str | None = None) -> Any:
    """A model, of which `split` is how its tokens are; captured once for all scenarios."""
    model = TINY.model() if split is None else parallel(**{split: 2})
    return cachepass.compile(model, policy=policy, group=group, inner="eager")


def parallel(**degrees: Any) -> Any:
    """A model whose tokens are split."""
    model = TINY.model()
    # diffusers counts accelerators, and there is none.
    with unittest.mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    return model


def attention_with_lse(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """What a ring asks of attention, which diffusers has no backend for on a CPU."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (query, key, value))
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ------------------------------------------------------------------------- scenarios


def tokens(policy: Any, group: Any) -> Result:
    """Tokens split by ulysses, both branches called in turn."""
    return run(compiled(policy, group, "ulysses_degree"), BRANCHES)


def ring(policy: Any, group: Any) -> Result:
    with unittest.mock.patch.object(
        attention_dispatch, "_native_attention_forward_op", attention_with_lse
    ):
        return run(compiled(policy, group, "ring_degree"), BRANCHES)


def guidance(policy: Any, group: Any) -> Result:
    """Each rank makes the calls of one branch."""
    return run(compiled(policy, group), (BRANCHES[dist.get_rank()],))


def cold(policy: Any, group: Any) -> Result:
    """Rank 1 loses its caches before a step."""
    cached = compiled(policy, group)

    def lose(step: int) -> None:
        if step == SPOILED and dist.get_rank() == 1:
            cachepass.reset(cached)

    return run(cached, (BRANCHES[dist.get_rank()],), before=lose)


def spoiled(policy: Any, group: Any) -> Result:
    """Rank 1 meets NaN at a step."""

    def spoil(step: int, value: Tensor) -> Tensor:
        return value * torch.nan if step == SPOILED and dist.get_rank() == 1 else value

    return run(compiled(policy, group), (BRANCHES[dist.get_rank()],), spoil=spoil)


def out_of_step(policy: Any, group: Any) -> Result:
    cached = compiled(policy, group)
    session = cachepass.session(cached, num_inference_steps=STEPS)

    def call() -> None:
        with session.at(step=dist.get_rank()):
            cached(**TINY.example())

    return {"error": error_of(call)}


def refused(policy: Any, group: Any) -> Result:
    """A whole request, that may end in an error."""
    return {"error": error_of(lambda: guidance(policy, group))}


def whole_graph(policy: Any, group: Any) -> Result:
    def call() -> None:
        cachepass.compile(TINY.model(), policy=policy, lowering="graph", group=group)

    return {"error": error_of(call)}


Scenario = tuple[Callable[[Any, Any], Result], Any, bool]
"""What is done, with which policy, and whether the ranks decide together."""

PROBE = cachepass.Below(signal=cachepass.BlockChange(name="probe"), threshold=0.1)
# MLPs talk to no other rank: so ranks may differ and go on.
MLP = cachepass.Policy(sites="mlp", trigger=PROBE)
FIRSTBLOCK = cachepass.FirstBlock(threshold=0.14, warmup_steps=1)
BOOK = ((0.15, 3), (0.22, 2), (9.0, 1))
ADACACHE = cachepass.AdaCache(codebook=BOOK, motion_scale=0.3, motion_gradient=0.5)
# At step 2 the conditional call alone foretells .181, both together .186.
EASYCACHE = cachepass.EasyCache(threshold=0.183, warmup_steps=2)
MIXCACHE = cachepass.MixCache(trigger=9.0, warmup=0.0)
DICACHE = cachepass.DiCache()

SCENARIOS: dict[str, Scenario] = {
    "tokens, mlp": (tokens, MLP, True),
    "tokens, mlp, each for itself": (tokens, MLP, False),
    "tokens, mixcache": (tokens, MIXCACHE, True),
    "tokens, dicache": (tokens, DICACHE, True),
    "ring, firstblock": (ring, FIRSTBLOCK, True),
    "guidance, adacache": (guidance, ADACACHE, True),
    "guidance, easycache": (guidance, EASYCACHE, True),
    "guidance, firstblock": (guidance, FIRSTBLOCK, True),
    "cold": (cold, FIRSTBLOCK, True),
    "spoiled": (spoiled, FIRSTBLOCK, True),
    "taylorseer": (guidance, cachepass.TaylorSeer(), True),
    "out of step": (out_of_step, FIRSTBLOCK, True),
    "cfg": (refused, cachepass.Schedule(reuse={3: "cfg"}), True),
    "graph": (whole_graph, FIRSTBLOCK, True),
}


def work(rank: int, folder: str, only: Sequence[str] = tuple(SCENARIOS)) -> None:
    """One rank's part; leaves its results in a file."""
    torch.set_num_threads(1)
    rendezvous = (pathlib.Path(folder) / "rendezvous").as_uri()
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rendezvous, timeout, world_size=2, rank=rank)
    results: dict[str, Result] = {}
    for name in only:
        scenario, policy, together = SCENARIOS[name]
        results[name] = scenario(policy, dist.group.WORLD if together else None)
    torch.save(results, pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
