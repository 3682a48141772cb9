"""What a part of the benchmark hands back, and how it is shown and kept."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.sampling import Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    estimate: Estimate
    unit: str = ""
    at_most: float | None = None
    """Target, if it is a bound from above."""
    at_least: float | None = None
    """Target, if it is a bound from below."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps its target; None without one."""
        if self.at_most is not None:
            return self.estimate.value <= self.at_most
        if self.at_least is not None:
            return self.estimate.value >= self.at_least
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        estimate = {
            name: None if math.isnan(value) else value  # JSON knows no NaN
            for name, value in dataclasses.asdict(self.estimate).items()
        }
        return {**dataclasses.asdict(self), "estimate": estimate, "met": self.met}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of one part and what they were computed from."""

    figures: Sequence[Figure]
    details: dict[str, Any]


def table(title: str, figures: Sequence[Figure]) -> str:
    """The figures of a part, a line each."""
    width = max(len(f.name) for f in figures)
    lines = [title]
    for figure in figures:
        target = ""
        if figure.at_most is not None:
            target = f"at most {figure.at_most:g}"
        elif figure.at_least is not None:
            target = f"at least {figure.at_least:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        shown = f"{figure.estimate} {figure.unit}"
        lines.append(
            f"  {figure.name:{width}}  {shown:28}  {target:13}  {verdict:6}  {figure.note}".rstrip()
        )
    return "\n".join(lines)


def parts_of(titles: Mapping[str, str]) -> Callable[[str], list[str]]:
    """For argparse: names of parts, with commas between them."""

    def parse(text: str) -> list[str]:
        parts = sorted(set(text.split(",")))
        if unknown := [part for part in parts if part not in titles]:
            raise argparse.ArgumentTypeError(
                f"no part {', '.join(unknown)}: choose from {','.join(titles)}"
            )
        return parts

    return parse


def keep(path: Path, part: str, result: Result, seconds: float) -> None:
    """Write a part's figures into the file; those of other parts stay.

    Each part carries its own date and machine, since it may be the only one that was
    measured anew.
    """
    parts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts[part] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "figures": [figure.to_dict() for figure in result.figures],
        "details": result.details,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(parts.items())), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
