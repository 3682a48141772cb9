"""Predictors: what stands in for a skipped value, as tensor code and as numbers.

A predictor says what is kept where a site computes (`keep`, `parts`, `history`), and how the
kept values are summed up where it is reused. All of them are *linear*: the stand-in is
``base + sum of weight * kept value``, with weights that are plain numbers, computed on the
host from the steps at which the values were kept. So one piece of graph serves every
predictor, a new one is a function of numbers, and Inductor fuses the sum.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cachepass.errors import PolicyError

Keep = Literal["output", "residual"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """What weights may depend on: one row of one call."""

    step: int
    """Counted from 0."""

    kept: tuple[int, ...]
    """The steps at which the values in hand were kept, newest first; at least one."""

    timesteps: Mapping[int, float]
    """Timestep of each step so far, for predictors that ask for it (`needs_timestep`)."""

    ratios: Mapping[str, float]
    """Signal -> the ratio of its second pair of sums (motion, trend), where it has one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor(abc.ABC):
    """Stands in for a skipped value; `keep` None is what suits the site (see `ir.boundary`)."""

    keep: Keep | None = None
    """`output` keeps what leaves the site, `residual` that less the same stream where it
    enters (of `cfg`: less the conditional output)."""

    needs_timestep: ClassVar[bool] = False
    needs_signal: ClassVar[bool] = False
    """Whether the trigger has to measure the signal that the field `signal` names."""

    on_images: ClassVar[bool] = False
    """Whether values have to end in (height, width), as the outputs of a call do."""

    parts: ClassVar[tuple[str, ...]] = ("",)
    """Names of what a value is split into; each has slots and weights of its own."""

    def __post_init__(self) -> None:
        if self.keep not in (None, "output", "residual"):
            raise PolicyError(
                f"{type(self).__name__}(`keep`={self.keep!r}): must be 'output', 'residual' or None"
            )

    @property
    def history(self) -> int:
        """How many values are kept."""
        return 1

    @property
    def weighted(self) -> bool:
        """Whether `weights` is asked; without, the newest value stands in as it is."""
        return True

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        """A value in its parts. Traced into the graph."""
        return (value,)

    @abc.abstractmethod
    def weights(self, moment: Moment) -> tuple[float, ...] | None:
        """Weights of what is kept, part by part and newest first; None for the newest as it is.

        Values that are not there yet (`kept` is shorter than `history`) get no weight.
        """

    def traced_weights(self, moment: Moment) -> Sequence[float | Tensor] | None:
        """`weights` where the numbers of the moment are (rows,) float64 tensors.

        Plain arithmetic serves both; a rule that branches on a number needs one of its own.

        Raises:
            PolicyError: the predictor has none.
        """
        return self.weights(moment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reuse(Predictor):
    """The value of the last computed call, unchanged."""

    @property
    def weighted(self) -> bool:
        return False

    def weights(self, moment: Moment) -> None:
        return None


LAST = Reuse(keep="output")
"""The output of the last computed call, as it was."""

RESIDUAL = Reuse(keep="residual")
"""input + (output - input) of the last computed call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(Predictor):
    """Carries finite differences of the last computed calls on.

    ``y(t + e) = sum over i of d_i e^i / i!``, d_0 the last value, d_i the difference of the last
    two d_(i-1) over the steps between them; e counts steps. A lower order as long as fewer
    values were computed. Source: TaylorSeer (arXiv 2503.06923, section 3.2) and its code.
    """

    order: int = 1
    """0 to 3: as many values more are kept."""

    damping: float = 1.0
    """d_i counts damping**i: below 1, less is carried on [ours]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (0, 1, 2, 3):
            raise PolicyError(f"Taylor(`order`={self.order!r}): must be 0, 1, 2 or 3")
        if not 0 <= self.damping <= 1:
            raise PolicyError(f"Taylor(`damping`={self.damping!r}): must be from 0 to 1")

    @property
    def history(self) -> int:
        return self.order + 1

    @property
    def weighted(self) -> bool:
        return self.order > 0

    def weights(self, moment: Moment) -> tuple[float, ...]:
        count, elapsed = len(moment.kept), moment.step - moment.kept[0]
        # Row i of `differences` holds d_order as it was at kept value i, by kept values.
        differences = [[float(i == j) for j in range(count)] for i in range(count)]
        total = list(differences[0])
        for order in range(1, count):
            differences = [
                [
                    (a - b) / (moment.kept[i] - moment.kept[i + 1])
                    for a, b in zip(differences[i], differences[i + 1], strict=True)
                ]
                for i in range(len(differences) - 1)
            ]
            scale = (self.damping * elapsed) ** order / math.factorial(order)
            total = [t + scale * d for t, d in zip(total, differences[0], strict=True)]
        return _padded(total, self.history)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extrapolate(Predictor):
    """A fixed share of the last change on top: ``A1 + w (A1 - A2)``.

    Source: FasterCache's dynamic feature reuse (arXiv 2410.19355, section 3.2) and its code.
    """

    weight: float = 0.5
    """w: .5 in the hooks of diffusers [code]."""

    @property
    def history(self) -> int:
        return 2

    def weights(self, moment: Moment) -> tuple[float, ...]:
        w = self.weight if len(moment.kept) > 1 else 0.0
        return (1 + w, -w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoAnchor(Predictor):
    """Between, or beyond, the last two values, as far as the probe has moved.

    ``R2 + γ (R1 - R2)``, γ = Σ|p - p2| / Σ|p1 - p2| within `bounds`, p a probe that runs in every
    call. Needs a trigger that measures one with its trend (``BlockChange(trend=True)``).
    Source: DiCache (arXiv 2508.17356) and its code.
    """

    bounds: tuple[float, float] = (1.0, 2.0)
    """Of γ: (1, 1.5) for FLUX and HunyuanVideo, (1, 2) for others [code]."""

    signal: str = "trend"
    """The name of the probe."""

    needs_signal: ClassVar[bool] = True

    @property
    def history(self) -> int:
        return 2

    def weights(self, moment: Moment) -> tuple[float, ...]:
        trend = moment.ratios.get(self.signal, math.nan)
        if len(moment.kept) < 2 or math.isnan(trend):
            return (1.0, 0.0)
        low, high = self.bounds
        gamma = min(max(trend, low), high)
        return (gamma, 1 - gamma)

    def traced_weights(self, moment: Moment) -> Sequence[float | Tensor]:
        if len(moment.kept) < 2:
            return (1.0, 0.0)
        trend: Any = moment.ratios[self.signal]
        gamma = torch.where(trend.isnan(), 1.0, trend.clamp(*self.bounds))
        return (gamma, 1 - gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencySplit(Predictor):
    """The difference between the branches in a low and a high band, each with a weight that grows.

    At each reused step in its window a band's weight is multiplied by `growth`. The Fourier
    transform is linear, so bands of the difference are differences of the bands. Source:
    FasterCache's CFG-Cache (arXiv 2410.19355, section 3.3) and its code.
    """

    growth: float = 1.1
    """w of both bands: 1.1 in the hooks of diffusers, 1.15 for Open-Sora [code]."""

    low_window: tuple[float, float] = (99, 901)
    """Timesteps between which the low band grows [code]."""

    high_window: tuple[float, float] = (-1, 301)
    """Timesteps between which the high band grows [code]."""

    needs_timestep: ClassVar[bool] = True
    on_images: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("low", "high")

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        low = low_band(value)
        return low, value - low

    def weights(self, moment: Moment) -> tuple[float, ...]:
        since = [t for step, t in moment.timesteps.items() if moment.kept[0] < step <= moment.step]
        return tuple(
            self.growth ** sum(low < t < high for t in since)
            for low, high in (self.low_window, self.high_window)
        )

    def traced_weights(self, moment: Moment) -> Sequence[float | Tensor]:
        raise PolicyError(
            "FrequencySplit counts the timesteps since a value was kept, which a graph does not "
            "keep: use lowering='regions', or another predictor"
        )


def traced_weights(
    predictor: Predictor, step: Tensor, tags: Sequence[Tensor], ratios: Mapping[str, Tensor]
) -> Tensor:
    """`Predictor.weights` as a tensor, however many values were kept.

    Args:
        predictor: whose weights.
        step: () int64.
        tags: of each kept value, newest first, (rows,) int64: the step of it plus 1, 0 for none.
        ratios: as in `Moment`, (rows,) float64.

    Returns:
        (rows, number of kept values) float32.
    """
    kept = [(tag - 1).double() for tag in tags]
    chosen: Tensor | None = None
    for count in range(1, len(tags) + 1):
        moment: Any = Moment(
            step=step.double(),  # type: ignore[arg-type]
            kept=tuple(kept[:count]),  # type: ignore[arg-type]
            timesteps={},
            ratios=ratios,  # type: ignore[arg-type]
        )
        numbers = predictor.traced_weights(moment)
        assert numbers is not None  # else the newest stands in as it is, and nobody asks
        # No constants: this may be traced into an arm, where there is no room for them.
        rows = [n if isinstance(n, Tensor) else torch.full_like(kept[0], n) for n in numbers]
        weights = torch.stack(rows, dim=1).float()
        known = (tags[count - 1] > 0)[:, None]
        chosen = weights if chosen is None else torch.where(known, weights, chosen)
    assert chosen is not None
    return chosen


def low_band(value: Tensor) -> Tensor:
    """What a centred disc of radius min(H, W) // 5 of the 2-D spectrum holds, per frame.

    Args:
        value: (..., height, width).
    """
    height, width = value.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.fft.fftfreq(height, 1 / height, device=value.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / width, device=value.device)[None, :]
    spectrum = torch.fft.fft2(value.float()) * (rows**2 + columns**2 <= radius**2)
    # A copy: the real part alone would keep the imaginary one's memory alive.
    low: Tensor = torch.fft.ifft2(spectrum).real.contiguous()
    return low.to(value.dtype)


def _padded(weights: Sequence[float], count: int) -> tuple[float, ...]:
    return (*weights, *(0.0,) * (count - len(weights)))


def weighted_sum(
    weights: Tensor, values: Sequence[Tensor], base: Tensor | None, dim: int = 0
) -> Tensor:
    """``base + sum of weights[:, i] * values[i]``, row by row.

    Args:
        weights: (rows, number of values) float32.
        values: each of one shape (rows * k, ...); k > 1 where a model folds another axis in.
        base: like a value, or None for nothing.
        dim: along which rows lie, where that is not the first one.

    Returns:
        A tensor of the values' shape and dtype; summed in float32 at least.
    """
    first = values[0]
    each = first.shape[dim] // weights.shape[0]
    if each > 1:
        weights = weights.repeat_interleave(each, dim=0)
    total = None if base is None else base.to(torch.promote_types(base.dtype, torch.float32))
    for i, value in enumerate(values):
        term = weights[:, i].view(*(1,) * dim, -1, *(1,) * (first.ndim - dim - 1)) * value
        total = term if total is None else total + term
    assert total is not None
    return total.to(first.dtype)
