"""(g) Capture and passes of a deep model, against what dynamo alone takes for it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import fx, nn

from benchmarks.figures import Figure, Result
from benchmarks.sampling import interleave, ratio
from benchmarks.testbed import Progress
from cachepass import capture
from cachepass.moe.shadow import Shadow
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.policies import for_model, resolve

DEPTH = 60
POLICIES = ("compute", "adacache", "mixcache", "pab")
"""Nothing, few and many sites: `pab` has one in every block."""


class _Traced(Exception):  # noqa: N818 - no error: what follows is not to be timed
    pass


def measure(rounds: int, progress: Progress) -> Result:
    """Both in turns, on meta weights: nothing is computed."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=128, num_layers=DEPTH, rope_max_seq_len=32,
        ).eval()  # fmt: skip
        given = {
            "hidden_states": torch.empty(1, 16, 4, 8, 8),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 4, 64),
            "return_dict": False,
        }

    def passes(name: str) -> None:
        torch.compiler.reset()
        policy = for_model(resolve(name), model)
        gm, _ = capture.capture_call(Shadow(model).module, given, {})
        run_passes(gm, default_pipeline(policy.sites, policy.signals()))

    subjects: dict[str, Any] = {"dynamo": lambda: _dynamo(model, given)}
    subjects |= {name: functools.partial(passes, name) for name in POLICIES}
    interleave(subjects, 1, progress)
    seconds = interleave(subjects, rounds, progress)
    figures = [
        Figure(
            name=f"{name}, capture and passes / dynamo, {DEPTH} blocks",
            estimate=ratio(seconds[name], seconds["dynamo"]),
            at_most=1.3,
        )
        for name in POLICIES
    ]
    return Result(figures=figures, details={"seconds": seconds})


def _dynamo(model: nn.Module, given: dict[str, Any]) -> None:
    """Dynamo alone, up to its backend."""
    torch.compiler.reset()

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        def call(*_: Any) -> Any:
            raise _Traced

        return call

    with torch.no_grad(), contextlib.suppress(_Traced):
        torch.compile(model, backend=backend, fullgraph=True)(**given)
