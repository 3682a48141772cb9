"""What is found in a model, and why: before anything is compiled."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from cachepass import capture
from cachepass.errors import CachePassError, CaptureError
from cachepass.ir.boundary import Layout, Sublayers, layout_of, place_of
from cachepass.ir.graph import module_paths, value_of
from cachepass.moe.shadow import Shadow
from cachepass.pass_manager import run_passes
from cachepass.passes import BatchExperts, FoldSizes, MarkBoundaries, default_pipeline
from cachepass.runtime.policy import SITES


@dataclasses.dataclass(frozen=True)
class Explanation:
    """`str` for people, `to_dict` for programs; both say the same."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return self.data

    def __str__(self) -> str:
        told = self.data
        lines = [f"{told['model']}: one graph of {told['operations']} operations"]
        for name, (role, what) in told["inputs"].items():
            lines.append(f"input {name}: {what}" + (f", the {role}" if role else ""))
        for stack in told["stacks"]:
            kinds = " and ".join(stack["classes"])
            lines.append(f"stack {stack['name']}: {stack['blocks']} blocks ({kinds})")
        for name, what in told["streams"].items():
            lines.append(f"{name}: {what}")
        for kind, counts in told["sublayers"].items():
            shared = f", {counts['shared']} of them shared by streams" if counts["shared"] else ""
            lines.append(f"sublayers {kind}: {counts['found']}{shared}")
        lines += [f"site {name}: {what}" for name, what in told["sites"].items()]
        lines += [f"no site {name}: {why}" for name, why in told["no_sites"].items()]
        around = ", ".join(f"{name} {count}" for name, count in told["around"].items())
        lines.append(f"outside of the blocks (operations): {around}")
        lines += [f"no stack {name}: {why}" for name, why in told["no_stacks"].items()]
        lines += [f"note: {note}" for note in told["notes"]]
        return "\n".join(lines)


def explain(model: nn.Module, example_inputs: Mapping[str, Any]) -> Explanation:
    """What cachepass finds in a model: stacks, streams, sites, what stays outside and why.

    ::

        print(cachepass.explain(model, {"hidden_states": latents, "timestep": t, ...}))

    The call is captured and each kind of site is put in on trial; nothing is computed or compiled,
    so both arguments may be on the meta device.

    Args:
        model: a diffusion transformer, not compiled.
        example_inputs: keyword arguments of one call.

    Raises:
        CaptureError: the call cannot be captured, or has no blocks.
    """
    shadow = Shadow(model)
    gm, _ = capture.capture_call(shadow.module, example_inputs, {})
    gm = run_passes(gm, (BatchExperts(), FoldSizes())).graph_module
    if capture.sized_by_data(gm):
        with contextlib.suppress(CaptureError):
            gm, _ = capture.recorded_call(shadow.module, example_inputs)
    marked = run_passes(capture.own_graph(gm), (MarkBoundaries(),)).graph_module
    layout = layout_of(marked)
    sites, no_sites = {}, {}
    for name, site in SITES.items():
        try:
            put = run_passes(capture.own_graph(gm), default_pipeline((site,), ())).graph_module
        except CachePassError as error:
            no_sites[name] = str(error)
            continue
        if isinstance(site, Sublayers):
            sites[name] = f"{len(layout_of(put).lasting(name))} sublayers"
        else:
            skipped = layout_of(put).coverage[site.name]
            sites[name] = f"skips blocks {min(skipped)} to {max(skipped)} of {layout.blocks}"
    return Explanation(
        {
            "model": type(model).__name__,
            "operations": sum(n.op.startswith("call") for n in gm.graph.nodes),
            "inputs": {name: _input(layout, node) for name, node in layout.inputs.items()},
            "stacks": _stacks(marked, layout),
            "streams": _streams(layout),
            "sublayers": _sublayers(layout),
            "sites": sites,
            "no_sites": no_sites,
            "around": _around(marked),
            "no_stacks": layout.outside,
            "notes": [*shadow.explain()],
        }
    )


def _input(layout: Layout, node: fx.Node) -> tuple[str, str]:
    role = "latent" if node is layout.latent else "timestep" if node is layout.timestep else ""
    return role, _shape(node)


def _shape(node: fx.Node) -> str:
    value = value_of(node)
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _stacks(gm: fx.GraphModule, layout: Layout) -> list[dict[str, Any]]:
    """Name, number of blocks and classes of each stack."""
    classes: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for node in gm.graph.nodes:
        for path, kind in module_paths(node):
            stack, _, entry = path.rpartition(".")
            if entry.isdigit() and (stack or "self") in layout.stacks:
                classes[stack or "self"][kind] = None
    return [
        {"name": name, "blocks": blocks, "classes": list(classes[name])}
        for name, blocks in layout.stacks.items()
    ]


def _streams(layout: Layout) -> dict[str, str]:
    found = {
        "timestep embedding": layout.timestep_embedding,
        "latent after patching": layout.patches,
    }
    return {name: _shape(node) for name, node in found.items() if node is not None}


def _sublayers(layout: Layout) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for sublayer in layout.sublayers:
        counts = found.setdefault(sublayer.kind.value, {"found": 0, "shared": 0})
        counts["found"] += 1
        counts["shared"] += not sublayer.nodes
    return found


def _around(gm: fx.GraphModule) -> dict[str, int]:
    """Operations outside of all stacks, by the model's own children."""
    counts: collections.Counter[str] = collections.Counter()
    for node in gm.graph.nodes:
        if not node.op.startswith("call") or place_of(node) is not None:
            continue
        owner = next((path for path, _ in module_paths(node) if path), "")
        counts[owner.partition(".")[0] or "own forward"] += 1
    return dict(counts)
