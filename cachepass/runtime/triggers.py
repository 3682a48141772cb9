"""Pieces of rules that several policies share. Pure functions of floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Value of a polynomial, highest power first (as numpy.polyval has it)."""
    value = 0.0
    for c in coefficients:
        value = value * x + c
    return value


def look_up(codebook: Sequence[tuple[float, int]], x: float) -> int:
    """The rate of the first entry whose bound lies above `x`, else of the last one.

    NaN lies below no bound and gets the smallest rate: what cannot be told is computed.
    """
    if math.isnan(x):
        return min(rate for _, rate in codebook)
    return next((rate for bound, rate in codebook if x < bound), codebook[-1][1])


def adapt_interval(
    interval: int, deviation: float, *, low: float, high: float, bounds: tuple[int, int]
) -> int:
    """Shorten an interval where the deviation is above `high`, lengthen it below `low`.

    NaN shortens.
    """
    if not deviation <= high:
        return max(bounds[0], interval - 1)
    return min(bounds[1], interval + 1) if deviation < low else interval
