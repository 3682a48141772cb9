"""What a policy is: sites, signals and a pure rule for one row."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Signal, Site

COMPUTE: frozenset[str] = frozenset()
"""The decision to reuse nothing: a full call, at which caches are refreshed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """A signal of one row as it was last measured."""

    diff: float
    """Sum of |now - kept|."""

    ref: float
    """Sum of |kept|."""

    step: int
    """The step at which it was measured."""

    gap: int
    """Steps between the two values that were compared."""

    motion: float | None = None
    """Mean change from frame to frame over mean size, where asked for."""

    @property
    def rel(self) -> float:
        """Relative L1 change; NaN where it cannot be told (so no comparison with it holds)."""
        if not (math.isfinite(self.diff) and math.isfinite(self.ref)) or self.ref <= 0:
            return math.nan
        return self.diff / self.ref


UNMEASURED = Measure(math.nan, math.nan, -1, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a rule may know about one row of one call."""

    step: int
    """Counted from 0."""

    num_steps: int | None
    """Steps of the request; never None for a policy with `needs_num_steps`."""

    branch: str
    warm: frozenset[str]
    """Sites that could be reused now."""

    signals: Mapping[str, Measure]

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the request's last step."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    def signal(self, name: str) -> Measure:
        """A signal by name; NaN where it was not measured yet."""
        return self.signals.get(name, UNMEASURED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """A frozen config with a pure rule: what to reuse, given facts and the row's state.

    Subclasses declare fields (validated in `__post_init__`), `sites`, `signals` and `decide`.
    One object serves any number of models, requests and threads: state is handed in and out.
    """

    name: ClassVar[str]
    needs_num_steps: ClassVar[bool] = False
    shared_by_branches: ClassVar[bool] = False
    """Decide once per step, at its first call, for all branches together."""

    @abc.abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """What may be skipped."""

    def signals(self) -> tuple[Signal, ...]:
        """What is to be measured."""
        return ()

    @abc.abstractmethod
    def decide(self, facts: Facts, state: Any) -> tuple[frozenset[str], Any]:
        """The names of the sites to reuse for this row, and the row's new state.

        `state` is None at the first call of a row. Reuse only ever happens at sites in
        `facts.warm`; a rule that names others gets COMPUTE there.
        """


def check(ok: bool, policy: Policy, field: str, rule: str) -> None:
    """Raise PolicyError unless a field keeps its rule."""
    if not ok:
        value = getattr(policy, field)
        raise PolicyError(f"{type(policy).__name__}(`{field}`={value!r}): must be {rule}")
