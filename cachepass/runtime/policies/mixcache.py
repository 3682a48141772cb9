"""MixCache: step, cfg and block caching in one graph, chosen anew at each cached step."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachepass.ir.boundary import Blocks, Cfg, WholeCall
from cachepass.ir.predictors import Predictor
from cachepass.runtime.policy import EMPTY, Config, NamedPolicy, Policy, check
from cachepass.runtime.triggers import Cheapest, Limited

_GRANULARITIES = ("step", "cfg", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixCache(NamedPolicy):
    """One full step, then up to interval - 1 cached ones, each at the granularity that costs least.

    Granularities: `step` (the calls of both branches, whose last outputs are returned), `cfg`
    (the unconditional call) and `block` (the middle half of the blocks). MixCache (arXiv
    2508.12691); the paper is known to us second-hand, and what is marked [ours] is a
    reconstruction.

    - Trigger: caching starts once the output changes by less than `trigger` from one step to
      the next, after the warm-up, and at `latest_start` in any case [ours]. The
      latent's distance tanh(rel(x_t, x_{t-1})), which the same authors use elsewhere, is
      no trigger for 50 flow-matching steps: its own change stays below .0015 a step over
      the first half, so a bound of .01 never holds caching back (docs/policies.md has the figures).
    - Choice: the smallest ``P = D * I``, D the change of the cached object per step between
      the last two full steps, I its influence; a factor `repeat_penalty` on the one
      chosen last, against choosing it twice in a row [2nd].
    - Interval: at a full step q = change of the object chosen last; ``q > shorten``
      shortens it, ``q < lengthen`` lengthens it [2nd].
    - All caches are refreshed together at full steps; a cached step writes none. The last
      step is full.

    Without separate guidance calls the choice is between step and block.
    """

    name: ClassVar[str] = "mixcache"

    interval: tuple[int, int] = (2, 8)
    """Shortest and longest interval, in steps [ours]."""

    start_interval: int = 2
    """The first one: early errors grow, and late ones do not; so a run of short intervals that
    lengthen beats one of equal ones (docs/policies.md has the figures) [ours]."""

    trigger: float = 0.06
    """Relative change of the output per step below which caching starts [ours]."""

    warmup: float = 0.1
    """Share of the steps that are computed in any case; at least 5 steps [ours]."""

    latest_start: float = 0.24
    """Share of the steps after which caching starts whatever the trigger says [ours]."""

    shorten: float = 0.15
    """Deviation above which the interval shrinks (delta 2) [ours]."""

    lengthen: float = 0.07
    """Deviation below which the interval grows (delta 1) [ours]."""

    influence: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """I of (step, cfg, block), by calibration; equal where a model was not calibrated."""

    repeat_penalty: float = 1.0
    """Factor on the granularity chosen last: 5 [2nd]; 1 leaves the choice to what was measured,
    which costs less quality on the models we have [ours]."""

    blocks: tuple[int | float, int | float] = (0.25, 0.75)
    """The blocks of granularity `block`: the middle half [ours]."""

    predictor: Predictor | str | None = "taylor"
    """What stands in: the last value carried on by its last change, which is worth 6 dB on the
    shapes testbed at equal work [ours]; None is the last value as it was, as in the paper."""

    def __post_init__(self) -> None:
        low, high = self.interval
        check(
            1 < low <= high,
            self,
            "interval",
            "(shortest, longest), the shortest at least 2",
        )
        check(
            low <= self.start_interval <= high,
            self,
            "start_interval",
            "within `interval`",
        )
        check(self.trigger >= 0, self, "trigger", "at least 0")
        check(0 <= self.warmup <= 1, self, "warmup", "a share from 0 to 1")
        check(0 <= self.latest_start <= 1, self, "latest_start", "a share from 0 to 1")
        check(0 <= self.lengthen <= self.shorten, self, "lengthen", "from 0 to `shorten`")
        ok = len(self.influence) == 3 and min(self.influence) >= 0
        check(ok, self, "influence", "three numbers of at least 0")
        check(self.repeat_penalty >= 1, self, "repeat_penalty", "at least 1")

    def combine(self, config: Config = EMPTY) -> Policy:
        """`Cheapest` of three sites, at the edges of a request all computed."""
        low, high = self.blocks
        return Policy(
            name=self.name,
            sites=(WholeCall(), Cfg(), Blocks(name="block", start=low, stop=high)),
            predictor=self.predictor,
            trigger=Limited(
                warmup_steps=self.warmup,
                warmup_at_least=5,
                last=1,
                trigger=Cheapest(
                    influence=dict(zip(_GRANULARITIES, self.influence, strict=True)),
                    settled=self.trigger,
                    latest_start=self.latest_start,
                    interval=self.interval,
                    start_interval=self.start_interval,
                    shorten=self.shorten,
                    lengthen=self.lengthen,
                    repeat_penalty=self.repeat_penalty,
                ),
            ),
        )
