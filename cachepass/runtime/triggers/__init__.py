"""Triggers: when to reuse. Each is a frozen dataclass with a pure rule; they wrap each other."""

from __future__ import annotations

from cachepass.runtime.triggers.accumulated import (
    Accumulated as Accumulated,
    Estimate as Estimate,
    MagnitudeRatio as MagnitudeRatio,
    Relative as Relative,
    TransformRate as TransformRate,
)
from cachepass.runtime.triggers.below import Below as Below
from cachepass.runtime.triggers.cheapest import Cheapest as Cheapest
from cachepass.runtime.triggers.codebook import Codebook as Codebook, Motion as Motion
from cachepass.runtime.triggers.limits import (
    Limited as Limited,
    PerSite as PerSite,
    Windowed as Windowed,
)
from cachepass.runtime.triggers.steps import (
    AtSteps as AtSteps,
    Never as Never,
    Periodic as Periodic,
)
