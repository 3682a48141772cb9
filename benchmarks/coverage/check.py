"""What works on one class: the checks behind a row of the table.

    python -m benchmarks.coverage.check WanTransformer3DModel

prints them as JSON. Each class is checked in a process of its own, as captures count against limits
of a process, and one that fails badly should not take the others with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import cachepass
from cachepass.runtime.policy import NamedPolicy
from tests.replay import Replay, record
from tests.zoo import ZOO
from tests.zoo.entry import Entry

STEPS = 12
BRANCHES = ("cond", "uncond")
NEAR = 1e-5
"""Relative L2 within which two executions are equal."""

# Thresholds that let every policy reuse within a dozen steps of a model with random weights; what
# stands in are the last values, which tests/replay.py can make.
POLICIES: dict[str, NamedPolicy] = {
    "compute": cachepass.Compute(),
    "schedule": cachepass.Schedule(
        reuse={2: "step", 4: "cfg", 6: "block", 8: "stack", 9: "step", 10: "block"}
    ),
    "firstblock": cachepass.FirstBlock(threshold=1e9, warmup_steps=2, predictor=cachepass.Reuse()),
    "mixcache": cachepass.MixCache(
        trigger=1e9, warmup=0.0, interval=(2, 3), repeat_penalty=100.0, predictor=cachepass.Reuse()
    ),
    "adacache": cachepass.AdaCache(codebook=((1e9, 2),), predictor=cachepass.Reuse()),
    "dbcache": cachepass.DBCache(front=1, threshold=1e9, warmup_steps=2),
}

ROUNDED, FAR = 3, 1e-3
"""How many times as far as Inductor is from an eager model on its own a compiled one may be; and
where rounding ends."""

ROOM = 300
"""Characters of a reason."""

LOWERED = cachepass.Schedule(reuse={1: "step", 3: "block"})
"""What every lowering is asked for."""


def check(entry: Entry, *, compiled: bool) -> dict[str, Any]:
    """Everything that the table says of a class.

    Args:
        entry: how it is built and called.
        compiled: whether to compile with Inductor, in both lowerings, which takes minutes.
    """
    started = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        told |= cachepass.explain(entry.model(), entry.call()).to_dict()
    except Exception as error:
        return {"error": _reason(error)}
    found = {stack["name"]: stack["blocks"] for stack in told["stacks"]}
    model = entry.model()
    told["main"] = all(found.get(name) == len(getattr(model, name)) for name in entry.main)
    stacks, batched = list(found), bool(told["notes"])
    told["policies"] = {
        name: _policy(entry, policy, stacks, batched=batched) for name, policy in POLICIES.items()
    }
    lowered = {
        f"{lowering}, {inner}": _policy(
            entry, LOWERED, stacks, batched=batched, lowering=lowering, inner=inner
        )
        for lowering in ("regions", "graph")
        for inner in ("eager", *(["inductor"] if compiled else []))
    }
    told["lowerings"] = {how: _reason_of(result) for how, result in lowered.items()}
    told["rounded"] = max((r["distance"] for r in lowered.values() if r.get("exact")), default=0.0)
    return told | {"seconds": time.perf_counter() - started}


def _policy(
    entry: Entry,
    policy: NamedPolicy,
    stacks: Sequence[str],
    *,
    batched: bool,
    lowering: Any = "regions",
    inner: Any = "eager",
) -> dict[str, Any]:
    """A guided request against its replay: whether each call is equal, and what was reused.

    `batched` where experts run as one, which add up in another order than their loop.
    """
    model = entry.model()
    cached: Any = cachepass.compile(entry.model(), policy=policy, lowering=lowering, inner=inner)
    try:
        outputs, calls = record(cached, _given(entry), steps=STEPS)
        before = cachepass.report(cached).to_dict()["compiles"]["graphs"]
        again, _ = record(cached, _given(entry), steps=STEPS)
    except Exception as error:
        return {"error": _reason(error)}
    expected = Replay(model, stacks, cached.denoiser.policy.sites).run(calls)
    worst = max(map(_distance, outputs, expected))
    bitwise = not policy.combine().sites and not batched
    near = NEAR
    if inner == "inductor" and worst >= NEAR:
        near = max(NEAR, min(ROUNDED * _rounding(entry), FAR))
    exact = worst == 0 if bitwise else worst < near
    repeats = max(map(_distance, again, outputs)) < NEAR
    return {
        "exact": exact and repeats, "distance": worst, "calls": len(calls),
        "reused": sum(bool(call.reused) for call in calls),
        "sites": sorted(set().union(*(call.reused for call in calls))),
        "graphs": before,
        "late": cachepass.report(cached).to_dict()["compiles"]["graphs"] - before,
    }  # fmt: skip


def _reason_of(result: dict[str, Any]) -> str:
    """Why a lowering does not work; empty if it does."""
    if "error" in result:
        return str(result["error"])
    if result["reused"] != len(LOWERED.reuse) * len(BRANCHES):
        return "decides differently"
    return "" if result["exact"] else f"differs by {result['distance']:.1e}"


def _rounding(entry: Entry) -> float:
    """How far torch.compile of the model itself is from it, in the same calls; 0 if it cannot."""
    model, compiled = entry.model(), entry.model()
    compiled.compile(fullgraph=True)
    with torch.no_grad(), contextlib.suppress(Exception):
        off = max(_distance(compiled(**given), model(**given)) for _, _, given in _given(entry))
        return off if math.isfinite(off) else 0.0
    return 0.0


def _given(entry: Entry) -> list[tuple[int, str, dict[str, Any]]]:
    """The calls of a guided request."""
    return [
        (step, branch, entry.call(step, STEPS, seed=1 + BRANCHES.index(branch)))
        for step in range(STEPS)
        for branch in BRANCHES
    ]


def _distance(a: Any, b: Any) -> float:
    """The largest relative L2 distance of two outputs, tensor by tensor; infinite for NaN."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor) and not torch.equal(x, y)]
    found = [float((x - y).double().norm() / y.double().norm()) for x, y in tensors]
    return max((d if math.isfinite(d) else math.inf for d in found), default=0.0)


def _reason(error: BaseException) -> str:
    return in_a_line(f"{type(error).__name__}: {error}")


def in_a_line(text: str) -> str:
    """An error's text in a line: files by their bare names, as far as a table has room."""
    line = re.sub(r"(?<![\w:/])(?:/[^\s/\"']+)+/", "", " ".join(text.split()))
    return line if len(line) < ROOM else f"{line[: ROOM - 3]}..."


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a class and print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage.check")
    parser.add_argument("name", choices=sorted(ZOO))
    parser.add_argument("--compiled", action="store_true", help="with Inductor, too")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(check(ZOO[given.name], compiled=given.compiled)))


if __name__ == "__main__":
    main()
