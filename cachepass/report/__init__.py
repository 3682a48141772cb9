"""What a compiled model found, decided, reused and compiled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from cachepass.runtime.denoiser import Denoiser
from cachepass.runtime.session import CallRecord, History


@dataclasses.dataclass(frozen=True)
class Report:
    """`str` for people, `to_dict` for programs; both say the same."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return self.data

    def __str__(self) -> str:
        parts = self.data.get("denoisers")
        if parts is not None:
            return "\n\n".join(f"{name}: {Report(data)}" for name, data in parts.items())
        lines = [f"policy {self.data['policy']}"]
        for name, blocks in self.data["stacks"].items():
            lines.append(f"stack {name}: {blocks} blocks")
        for kind, count in self.data["sublayers"].items():
            lines.append(f"sublayers {kind}: {count}")
        for site in self.data["sites"]:
            lines.append(
                f"site {site['name']}: skips {site['blocks']} of {self.data['blocks']} blocks"
            )
        for note in self.data["notes"]:
            lines.append(f"note: {note}")
        for i, request in enumerate(self.data["requests"]):
            calls = ", ".join(f"{name} {count}" for name, count in request["calls"].items())
            share = request["blocks_skipped"]
            lines.append(
                f"request {i}: {request['num_inference_steps'] or 'unknown'} steps, {calls}; "
                f"{share:.1%} of block work skipped, slots of {request['peak_cache_bytes']:,} bytes"
            )
            lines += [f"  note: {note}" for note in request["notes"]]
        ranks = self.data["ranks"]
        if ranks is not None:
            lines.append(
                f"decided alike by {ranks['count']} ranks: {ranks['exchanges']} exchanges, "
                f"{ranks['bytes']:,} bytes sent by this one"
            )
        compiles = self.data["compiles"]
        lines.append(
            f"compiled {compiles['graphs']} graphs, {compiles['regions']} regions in "
            f"{compiles['seconds']:.1f} s"
        )
        return "\n".join(lines)


def merged(reports: Mapping[str, Report]) -> Report:
    """One report of a pipeline's denoisers: that of the first, with the requests of all.

    With several, each request says whose it is, and `denoisers` holds their own reports.
    """
    first, *others = reports.values()
    if not others:
        return first
    requests = [
        {"denoiser": name, **request}
        for name, report in reports.items()
        for request in report.data["requests"]
    ]
    parts = {name: report.data for name, report in reports.items()}
    return Report({**first.data, "requests": requests, "denoisers": parts})


def report_of(
    denoiser: Denoiser,
    *,
    only: History | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """The report of a denoiser, or of one of its requests; `notes` say more of the model."""
    layout = denoiser.programs[-1].inputs.layout if denoiser.programs else None
    kinds = collections.Counter(s.kind.value for s in layout.sublayers) if layout else {}
    requests = [only] if only is not None else denoiser.requests
    notes = [*denoiser.policy.notes, *notes]
    notes += [f"{what}: {why}" for what, why in (layout.missing if layout else {}).items()]
    if not denoiser.programs:
        notes.append("nothing was captured yet: the first call does that")
    return Report(
        {
            "policy": denoiser.described,
            "stacks": dict(layout.stacks) if layout else {},
            "blocks": layout.blocks if layout else 0,
            "sublayers": dict(kinds),
            "sites": [
                {"name": name, "blocks": len(blocks)} for name, blocks in layout.coverage.items()
            ]
            if layout
            else [],
            "slots": [s.name for s in layout.slots.values()] if layout else [],
            "notes": notes,
            "ranks": {"count": r.count, "exchanges": r.exchanges, "bytes": r.bytes}
            if (r := denoiser.ranks) is not None
            else None,
            "requests": [_request(r) for r in requests if r.records or r is only],
            "compiles": {
                "graphs": len(denoiser.programs),
                "regions": denoiser.regions,
                "seconds": denoiser.compile_seconds,
            },
        }
    )


def _request(history: History) -> dict[str, Any]:
    records = history.records
    blocks = sum(r.blocks for r in records)
    computed = sum(r.blocks_computed for r in records)
    notes = list(history.notes)
    if records and not history.reused:
        notes.append("nothing was reused")
    return {
        "num_inference_steps": history.num_steps,
        "calls": dict(collections.Counter(_label(r) for r in records)),
        "blocks_computed": computed,
        "blocks": blocks,
        "blocks_skipped": 1 - computed / blocks if blocks else 0.0,
        "peak_cache_bytes": history.peak_bytes,
        "steps": [
            {"step": r.step, "branch": r.branch, "reused": [sorted(names) for names in r.reused]}
            for r in records
        ],
        "notes": notes,
    }


def _label(record: CallRecord) -> str:
    """What a call reused; `mixed` where its rows differ."""
    kinds = {"+".join(sorted(names)) or "compute" for names in record.reused}
    return kinds.pop() if len(kinds) == 1 else "mixed"
