"""Compiles one model in this process and prints, as JSON, where the time went.

A program of its own, since only a fresh process compiles from nothing;
`benchmarks.compile_time` starts it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics, counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import cachepass
from benchmarks.testbed import LATENT, PROMPT
from examples.shapes.model import SIZES, build, load
from examples.shapes.world import embed_prompt

LATER_CALLS = 3
STEPS = 50  # of a request that is left unfinished


def first_call(what: str, layers: int) -> dict[str, Any]:
    """Seconds and counts of a first call, with those of a later one taken off."""
    model = _model(layers)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(LATENT, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": embed_prompt(PROMPT)[None],
    }
    _warm_up()
    headers = _headers()
    dynamo_before = _dynamo_seconds()
    counters.clear()

    started = time.perf_counter()
    compiled: Any
    if what == "plain":
        compiled = torch.compile(model)
    else:
        compiled = cachepass.compile(model, policy=what)
    if what == "plain":
        with torch.no_grad():
            compiled(**inputs, return_dict=False)
        wall = time.perf_counter() - started
        later = [_timed(compiled, inputs) for _ in range(LATER_CALLS)]
    else:
        session = cachepass.session(compiled, num_inference_steps=STEPS)
        with session.at(step=0):
            compiled(**inputs, return_dict=False)
        wall = time.perf_counter() - started
        later = []
        for i in range(LATER_CALLS):
            with session.at(step=1 + i):
                later.append(_timed(compiled, inputs))

    seconds = wall - statistics.median(later)
    dynamo = _dynamo_seconds() - dynamo_before
    inductor = counters["inductor"]
    return {
        "seconds": seconds,
        "dynamo": dynamo,
        "other": seconds - dynamo,
        "later_call": statistics.median(later),
        "cache_hits": inductor["fxgraph_cache_hit"],
        "cache_misses": inductor["fxgraph_cache_miss"],
        "cache_bypasses": inductor["fxgraph_cache_bypass"],
        "whole_graph_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "headers_compiled": len(_headers() - headers),
    }


@torch.no_grad()
def _timed(model: Any, inputs: dict[str, Any]) -> float:
    started = time.perf_counter()
    model(**inputs, return_dict=False)
    return time.perf_counter() - started


def _model(layers: int) -> Any:
    """The large model, with random weights where another depth is asked for."""
    model = load("large")
    if layers == SIZES["large"].layers:
        return model
    torch.manual_seed(0)
    config = {**build("large").config, "num_layers": layers}
    return type(model).from_config(config).eval()


def _warm_up() -> None:
    """What any first compile pays once: imports, workers, the precompiled header."""

    @torch.no_grad()
    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x).sum(-1)

    torch.compile(small, dynamic=False)(torch.ones(64, 64))


def _dynamo_seconds() -> float:
    """Time in dynamo so far: all of its frames but what their backends took."""
    frames = sum(compilation_time_metrics.get("_compile.compile_inner", ()))
    backends = sum(compilation_time_metrics.get("OutputGraph.call_user_compiler", ()))
    return float(frames - backends)


def _headers() -> set[Path]:
    """Precompiled headers there are; each takes seconds to make."""
    # Inductor keeps them apart from the rest of its cache.
    return set(Path(default_cache_dir(), "precompiled_headers").glob("*.?ch"))


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", required=True, help="plain, or the name of a policy")
    parser.add_argument("--layers", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(first_call(options.what, options.layers)))


if __name__ == "__main__":
    main()
