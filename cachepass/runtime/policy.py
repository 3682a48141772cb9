"""What a policy is: a trigger, sites and a predictor; and what a trigger may know."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from cachepass.errors import PolicyError
from cachepass.ir.boundary import Blocks, Cfg, Kind, Signal, Site, Sublayers, WholeCall
from cachepass.ir.predictors import LAST, RESIDUAL, Predictor, Taylor
from cachepass.runtime.traced import Choice, Dtypes, State, TracedFacts

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

    second: float | None = None
    """The ratio of a second pair of sums, of signals that have one (motion, trend)."""

    moves: tuple[float, float] | None = None
    """That pair, for ranks to add up."""

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
    """Steps of the request; never None for a trigger with `needs_num_steps`."""

    branch: str
    warm: frozenset[str]
    """Sites that could be reused now."""

    signals: Mapping[str, Measure]

    sites: frozenset[str] = frozenset()
    """The policy's sites."""

    timestep: float = math.nan
    """From 1000 (noise) to 0, also where the model is given 1 to 0; NaN unless the trigger
    `needs_timestep`."""

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the request's last step."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    def signal(self, name: str) -> Measure:
        """A signal by name; NaN where it was not measured yet."""
        return self.signals.get(name, UNMEASURED)


Decision = tuple[frozenset[str], Any]
"""The sites to reuse, and the row's new state."""


class Trigger(abc.ABC):
    """When to reuse: the signals to measure and a pure rule for one row.

    Subclasses are frozen dataclasses. One object serves any number of models, requests and
    threads: state is handed in and out.
    """

    needs_num_steps: bool = False
    """Whether a request of unknown length is an error."""

    needs_timestep: bool = False
    """Whether `Facts.timestep` is wanted; on a GPU that is one more read per call."""

    shared_by_branches: bool = False
    """Decide once per step, at its first call, for all branches together."""

    independent: bool = False
    """Refresh a site whenever it computes, and not only at calls where nothing is reused."""

    names: frozenset[str] = frozenset()
    """Sites that the rule calls by name; most take those that there are."""

    def signals(self) -> tuple[Signal, ...]:
        """What is to be measured."""
        return ()

    @abc.abstractmethod
    def decide(self, facts: Facts, state: Any) -> Decision:
        """The names of the sites to reuse for this row, and the row's new state.

        `state` is None at the first call of a row. Reuse only ever happens at sites in
        `facts.warm`; a rule that names others gets COMPUTE there.
        """

    @property
    def traced_state(self) -> Dtypes:
        """Names and dtypes of what `traced` keeps from call to call, one value per row."""
        return {}

    def traced(self, facts: TracedFacts, state: State) -> Choice:
        """The rule in tensor code, for all rows at once: see `runtime.traced`.

        Raises:
            PolicyError: the trigger has none, and so can decide on the host only.
        """
        raise PolicyError(
            f"{type(self).__name__} has no rule in tensor code, which lowering='graph' and "
            "exported programs need: give it `traced`, or use lowering='regions'"
        )


_ATTENTION = (
    Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.SPATIAL_ATTENTION, Kind.TEMPORAL_ATTENTION,
)  # fmt: skip
SITES: Mapping[str, Site] = {
    "step": WholeCall(),
    "cfg": Cfg(),
    "stack": Blocks(),
    "block": Blocks(name="block", start=0.25, stop=0.75),
    "attention": Sublayers(name="attention", kinds=_ATTENTION),
    "mlp": Sublayers(name="mlp", kinds=(Kind.MLP,)),
}
"""Sites that go by a name."""

PREDICTORS: Mapping[str, Predictor] = {"last": LAST, "residual": RESIDUAL, "taylor": Taylor()}
"""Predictors that go by a name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Trigger x sites x predictor: when, where, and what instead.

    ::

        change = cachepass.Relative(signal=cachepass.TimestepChange())
        cachepass.Policy(
            sites=cachepass.Blocks(start=0.25, stop=0.75),
            trigger=cachepass.Accumulated(estimate=change, threshold=0.1),
            predictor=cachepass.Taylor(order=1),
        )
    """

    trigger: Trigger
    sites: Any
    """A site, the name of one ("step", "cfg", "stack", "block", "attention", "mlp"), or several;
    kept as a tuple of sites."""

    predictor: Predictor | str | None = None
    """Of all sites that name none of their own; "last", "residual" or "taylor" for short. None
    is what is usual for each site."""

    name: str = "policy"
    """What reports and messages call it."""

    notes: tuple[str, ...] = ()
    """What a report should say of it."""

    def __post_init__(self) -> None:
        if not isinstance(self.trigger, Trigger):
            raise PolicyError(f"Policy(`trigger`={self.trigger!r}): must be a Trigger object")
        predictor = resolve_predictor(self.predictor)
        object.__setattr__(self, "predictor", predictor)
        given = self.sites
        several = [given] if isinstance(given, (str, Site)) else list(given)
        sites = [resolve_site(site) for site in several]
        names = [site.name for site in sites]
        for name in names:
            if names.count(name) > 1:
                raise PolicyError(
                    f"Policy(`sites`=...): {names.count(name)} sites are called {name!r}; give "
                    "each a `name` of its own"
                )
        if sites and (unknown := self.trigger.names - set(names)):
            raise PolicyError(
                f"Policy(`trigger`=...): it names {', '.join(sorted(unknown))}, and the sites are "
                f"{', '.join(names)}"
            )
        for kind in (WholeCall, Cfg):
            if sum(isinstance(site, kind) for site in sites) > 1:
                raise PolicyError(f"Policy(`sites`=...): a call has one {kind.__name__} site")
        own = [site.predictor or predictor for site in sites]
        sites = [dataclasses.replace(s, predictor=p) for s, p in zip(sites, own, strict=True)]
        object.__setattr__(self, "sites", tuple(sites))
        for site in sites:
            self._check_predictor(site)

    def _check_predictor(self, site: Site) -> None:
        predictor, measured = site.stand_in, {s.name for s in self.trigger.signals()}
        wanted = predictor.needs_signal and getattr(predictor, "signal", None)
        if wanted and wanted not in measured:
            raise PolicyError(
                f"{predictor!r} needs a signal called {wanted!r}, and the trigger measures "
                f"{', '.join(sorted(measured)) or 'none'}: add "
                f"BlockChange(name={wanted!r}, trend=True) to it"
            )
        if predictor.on_images and not isinstance(site, (WholeCall, Cfg)):
            raise PolicyError(
                f"{type(predictor).__name__} splits images; site {site.name!r} hands on tokens: "
                "use it for sites 'step' and 'cfg'"
            )

    def signals(self) -> tuple[Signal, ...]:
        """What is to be measured."""
        return self.trigger.signals() if self.sites else ()

    def decide(self, facts: Facts, state: Any) -> Decision:
        """What the trigger says."""
        return self.trigger.decide(facts, state)

    @functools.cached_property
    def needs_timestep(self) -> bool:
        """Whether the trigger or a predictor looks at the timestep."""
        return self.trigger.needs_timestep or any(s.stand_in.needs_timestep for s in self.sites)


Config = Mapping[str, Any]
"""A model's own config (as diffusers models have it), by which published numbers are found."""

EMPTY: Config = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedPolicy(abc.ABC):
    """A combination that has a name, with fields that have defaults."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        try:
            self.combine()  # its parts check their fields
        except PolicyError as error:
            raise PolicyError(f"{type(self).__name__}: {error}") from error

    @abc.abstractmethod
    def combine(self, config: Config = EMPTY) -> Policy:
        """The trigger, the sites and the predictor that it stands for, for a model.

        Raises:
            PolicyError: a field is out of its range, or has no value that fits the model.
        """


def resolve_site(site: object) -> Site:
    """A site by its name, or the site itself."""
    if isinstance(site, Site):
        return site
    if not isinstance(site, str) or site not in SITES:
        raise PolicyError(f"unknown site {site!r}: choose one of {', '.join(SITES)}, or a Site")
    return SITES[site]


def resolve_predictor(predictor: object) -> Predictor | None:
    """A predictor by its name, or the predictor itself."""
    if predictor is None or isinstance(predictor, Predictor):
        return predictor
    if not isinstance(predictor, str) or predictor not in PREDICTORS:
        raise PolicyError(
            f"unknown predictor {predictor!r}: choose one of {', '.join(PREDICTORS)}, or a "
            "Predictor"
        )
    return PREDICTORS[predictor]


def check(ok: bool, owner: object, field: str, rule: str) -> None:
    """Raise PolicyError unless a field keeps its rule."""
    if not ok:
        value = getattr(owner, field)
        raise PolicyError(f"{type(owner).__name__}(`{field}`={value!r}): must be {rule}")


def share_of(where: int | float, num_steps: int | None) -> int:
    """Steps from a count (an int) or a share of all (a float); 0 of an unknown number."""
    if isinstance(where, float):
        return math.ceil(where * num_steps) if num_steps is not None else 0
    return where
