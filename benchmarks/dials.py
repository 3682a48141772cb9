"""Policies of cachepass as contenders: which field is a policy's knob, and over what range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cachepass
from benchmarks.contender import (
    MAGCACHE_IN_A_ROW,
    RANGES,
    THRESHOLDS,
    Contender,
    Entry,
    Grid,
    Setting,
    geometric,
)
from benchmarks.rivals import magnitudes


def mixcache_fields(value: float) -> dict[str, Any]:
    """One tolerance for all that is compared with a threshold."""
    usual = cachepass.MixCache()
    shortest, longest = usual.interval
    return {
        "trigger": usual.trigger * value,
        "shorten": usual.shorten * value,
        "lengthen": usual.lengthen * value,
        "latest_start": min(1.0, usual.latest_start / value),
        "interval": (shortest, max(longest, round(longest * value))),
    }


def adacache_fields(value: float) -> dict[str, Any]:
    """The codebook for changes `value` times as large, with longer rates above 1."""
    *entries, (bound, rate) = cachepass.AdaCache().codebook
    scaled = [(b * value, round(r * max(1.0, value))) for b, r in entries]
    return {"codebook": (*scaled, (max(bound, 2 * scaled[-1][0]), rate))}


def _threshold(warmup: int) -> Callable[[Any, Setting], dict[str, Any]]:
    return lambda value, setting: {"threshold": value, "warmup_steps": setting.at(warmup)}


def _dbcache(value: float, setting: Setting) -> dict[str, Any]:
    return {"threshold": value, "front": 1, "warmup_steps": setting.at(8)}


def _our_magcache(value: float, setting: Setting) -> dict[str, Any]:
    ratios = tuple(magnitudes(setting))
    return {"threshold": value, "ratios": ratios, "max_in_a_row": MAGCACHE_IN_A_ROW}


def _schedule(value: tuple[int, int], setting: Setting) -> dict[str, Any]:
    period, start = value
    every = cachepass.Schedule.every(period, steps=setting.steps, granularity="step", start=start)
    return {"reuse": dict(every.reuse)}


@dataclass(frozen=True)
class Dial:
    """Of one policy: the name of its knob, the knob's values, the fields that one sets."""

    knob: str
    values: Grid
    fields: Callable[[Any, Setting], dict[str, Any]]


# One line for each policy.
DIALS = {
    "mixcache": Dial("tolerance", geometric(0.25, 8), lambda v, _: mixcache_fields(v)),
    "adacache": Dial("scale of the codebook", geometric(0.25, 8), lambda v, _: adacache_fields(v)),
    "firstblock": Dial("threshold", THRESHOLDS, _threshold(10)),
    "teacache": Dial("threshold", geometric(0.01, 2), _threshold(10)),
    "schedule": Dial("period, start", Setting.paces, _schedule),
    "dbcache": Dial("threshold", THRESHOLDS, _dbcache),
    "easycache": Dial("threshold", geometric(0.005, 1), _threshold(10)),
    "dicache": Dial("threshold", geometric(0.02, 4), _threshold(10)),
    "magcache": Dial("threshold", geometric(0.005, 2), _our_magcache),
    "taylorseer": Dial(
        "interval, start", Setting.paces, lambda v, _: {"interval": v[0], "warmup_steps": v[1]}
    ),
    "pab": Dial("range", RANGES, lambda v, _: {"self_attention": v, "cross": v}),
    "fastercache": Dial("range", RANGES, lambda v, _: {"attention_period": v, "cfg_period": v}),
}


def cached(setting: Setting, policy: Any, options: dict[str, Any] | None = None) -> Contender:
    """A pipeline under a policy of ours."""
    pipe = cachepass.compile(setting.pipeline(), policy=policy, options=options)

    def regions() -> int:
        count: int = cachepass.report(pipe).to_dict()["compiles"]["regions"]
        return count

    return Contender(pipe=pipe, regions=regions)


def _ours(name: str, dial: Dial) -> Entry:
    def build(setting: Setting, value: Any) -> Contender:
        return cached(setting, name, dial.fields(value, setting))

    return Entry("ours", build, dial.knob, dial.values)


def without_dial() -> list[str]:
    """Policies of ours that nobody gave a knob here."""
    return sorted({*cachepass.policies()} - {*DIALS} - {"compute"})


def entries() -> dict[str, Entry]:
    """Our contenders by name."""
    return {f"cachepass {name}": _ours(name, dial) for name, dial in DIALS.items()}
