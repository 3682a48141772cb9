"""Find the number that makes a rule compute a wished share of the steps, by replaying the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from cachepass.errors import PolicyError
from cachepass.runtime.policy import Facts, Measure, Policy

_HALVINGS = 60
_LARGEST = 2.0**60
_SAME = 1e-9  # shares that differ by less are one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What the rows of one branch would see, step by step."""

    branch: str
    steps: int
    measured: Callable[[int, Sequence[int]], Mapping[str, Measure]]
    """Signals at a step, given the steps computed before it."""


def replay(policy: Policy, lines: Sequence[Line]) -> float:
    """The share of steps that a policy computes, asked with what was measured.

    Nothing is warm before the first computed step; all sites are after it.
    """
    sites = frozenset(site.name for site in policy.sites)
    computed = 0
    for line in lines:
        state, full = None, list[int]()
        for step in range(line.steps):
            facts = Facts(
                step=step,
                num_steps=line.steps,
                branch=line.branch,
                warm=sites if full else frozenset(),
                signals=line.measured(step, full),
                sites=sites,
            )
            choice, state = policy.trigger.decide(facts, state)
            if not choice & facts.warm:
                full.append(step)
        computed += len(full)
    return computed / sum(line.steps for line in lines)


def solve(
    share: Callable[[float], float], rate: float, *, steps: int, policy: str
) -> tuple[float, float]:
    """The number, from 0, whose share is next to `rate`, and that share.

    The share has to fall as the number grows, in jumps. Of the numbers with one share the middle
    is taken, so that small differences of what is measured change no decision.

    Raises:
        PolicyError: the rate is out of reach by more than a step.
    """
    most, least = share(0.0), share(_LARGEST)
    if rate < least - 1 / steps or rate > most + 1 / steps:
        raise PolicyError(
            f"calibrate(`rate`={rate:g}): policy {policy!r} computes between {least:.3g} and "
            f"{most:.3g} of {steps} steps, whatever its bound is: choose a rate between these, or "
            "other `options` (a shorter warm-up, say)"
        )

    def first(level: float) -> tuple[float, float]:
        """The largest number whose share is above `level`, and the next, whose share is not."""
        low, top = 0.0, 1.0
        while share(top) > level:
            low, top = top, 2 * top
        for _ in range(_HALVINGS):
            middle = (low + top) / 2
            if share(middle) > level:
                low = middle
            else:
                top = middle
        return low, top

    rate = min(max(rate, least), most)
    wanted = min((share(number) for number in first(rate)), key=lambda s: abs(s - rate))
    _, start = first(wanted)
    end = first(wanted - _SAME)[0] if wanted - _SAME > least else 2 * start
    number = (start + end) / 2
    if share(number) != wanted:  # the share does not fall everywhere
        number = start
    return number, share(number)
