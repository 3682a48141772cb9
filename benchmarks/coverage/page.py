"""docs/models.md, from what was found."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from benchmarks.coverage.check import NEAR, in_a_line
from benchmarks.coverage.loops import Calls
from tests.zoo import ZOO

POLICIES = ("compute", "firstblock", "mixcache", "adacache", "dbcache")
LOWERINGS = ("regions, eager", "regions, inductor", "graph, eager", "graph, inductor")
_HEAD = (
    "class", "stacks: blocks", "sites", "guidance", *POLICIES, "captures, late", "lowerings",
    "what does not work, and why",
)  # fmt: skip
_NOT_CALLED = "no pipeline calls it in a loop"


def page(
    found: Mapping[str, Mapping[str, Any]], called: Mapping[str, Calls], classes: Mapping[str, str]
) -> str:
    """The page: a summary, the table, and what its columns mean.

    Args:
        found: what `check` says, by class.
        called: classes that a pipeline calls in a loop.
        classes: all of them.
    """
    checked = [name for name in called if name in found]
    whole = [name for name in checked if _whole(found[name])]
    right = [name for name in whole if not _faults(found[name])]
    compiled = [name for name in checked if LOWERINGS[-1] in found[name].get("lowerings", {})]
    agree = [name for name in compiled if not any(found[name]["lowerings"].values())]
    rows = [_row(name, found.get(name), called.get(name)) for name in sorted(classes)]
    summary = (
        f"diffusers {importlib.metadata.version('diffusers')} has {len(classes)} transformers with "
        f"lists of blocks; its pipelines call {len(called)} of them in their denoising loops. Of "
        f"these, {len(checked)} were checked: {len(whole)} are captured whole with their main "
        f"stacks found, and {len(right)} ({len(right) / max(len(checked), 1):.0%}) are right under "
        f"every policy of the table. {len(compiled)} were run by Inductor in both lowerings: "
        f"{len(agree)} are right."
    )
    return "\n".join(
        [
            "# Models",
            "",
            "<!-- Written by `make coverage-models`: edit benchmarks/coverage/page.py instead. -->",
            "",
            summary,
            "",
            _line(_HEAD),
            _line(["---"] * len(_HEAD)),
            *map(_line, rows),
            "",
            _LEGEND,
        ]
    )


_LEGEND = """\
Every class is built tiny, with random weights and the inputs that its pipeline gives it
(`tests/zoo`), and asked for twelve guided steps.

- *stacks*: what was found, with the number of blocks; `cachepass.explain` tells more.
- *sites*: what a policy may skip: the whole call (`step`), the unconditional call (`cfg`), all
  blocks (`stack`), the middle half (`block`), and sublayers.
- *guidance*: what the pipelines do: two calls, or one of a batch that holds both branches
  (`concatenated`), or a guider object that decides.
- a policy's column: in how many of the 24 calls something was reused, where every call equals the
  model with the same decisions replayed by hooks on its blocks (`tests/replay.py`); `compute`:
  bitwise equal to the model, or how near (experts that run as one add up in another order).
- *captures, late*: graphs that were captured, and how many of them after the first request.
- *lowerings*: which give what the model with the same decisions gives: regions or one graph, run
  eagerly or by Inductor. Within 1e-5 or, where torch.compile of the model itself is further off,
  within three times as far (*off by*), and within 1e-3.
"""


def _whole(told: Mapping[str, Any]) -> bool:
    return "error" not in told and bool(told["main"])


def _faults(told: Mapping[str, Any]) -> list[str]:
    """What does not work, in words."""
    if "error" in told:
        return [told["error"]]
    faults = [] if told["main"] else ["the main stack was not found"]
    for name in POLICIES:
        result = told["policies"].get(name, {"error": "not checked"})
        if "error" in result:
            faults.append(f"{name}: {result['error']}")
        elif not result["exact"]:
            faults.append(f"{name} differs by {result['distance']:.1e}")
        elif name != "compute" and not result["reused"]:
            faults.append(f"{name} reuses nothing")
    return faults


def _row(name: str, told: Mapping[str, Any] | None, calls: Calls | None) -> list[str]:
    guidance = ", ".join(sorted(calls.guidance)) if calls else _NOT_CALLED
    if told is None:
        why = ""
        if calls:
            why = "not checked yet" if name in ZOO else "no tiny configuration in tests/zoo yet"
        return [name, *[""] * 2, guidance, *[""] * (len(POLICIES) + 2), why]
    faults = "; ".join(_faults(told))
    if "error" in told:
        return [name, *[""] * 2, guidance, *[""] * (len(POLICIES) + 2), _short(faults)]
    stacks = ", ".join(f"{s['name']}: {s['blocks']}" for s in told["stacks"])
    sites = ", ".join(told["sites"])
    policies = [_cell(name, told["policies"].get(name, {})) for name in POLICIES]
    of_compute = told["policies"].get("compute", {})
    captures = f"{of_compute.get('graphs', '-')}, {of_compute.get('late', '-')}"
    works = [how for how in LOWERINGS if told["lowerings"].get(how) == ""]
    failed = [f"{h}: {told['lowerings'][h]}" for h in LOWERINGS if told["lowerings"].get(h)]
    why = "; ".join(filter(None, [faults, *failed]))
    lowerings = "all" if len(works) == len(LOWERINGS) else "; ".join(works)
    if told.get("rounded", 0) >= NEAR:
        lowerings += f", off by {told['rounded']:.0e}"
    return [name, stacks, sites, guidance, *policies, captures, lowerings, _short(why)]


def _cell(name: str, result: Mapping[str, Any]) -> str:
    if "error" in result or not result:
        return "no"
    if not result["exact"]:
        return f"off by {result['distance']:.0e}"
    equal = "equal" if not result["distance"] else f"to {result['distance']:.0e}"
    return equal if name == "compute" else str(result["reused"])


def _short(text: str) -> str:
    return in_a_line(text.replace("|", "/"))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
