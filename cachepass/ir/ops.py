"""The operations that passes may insert, and what each of them means.

A rewritten graph is an ordinary FX graph of torch operations plus the functions of this
file. Those that touch run-time state take the *frame* of the call as first argument: a
value like any other, so the same graph serves any number of calls and threads at once.
Nothing else is allowed to reach state, which is what makes a dump complete: what you
do not see in it does not happen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Arm = Callable[..., Any]
"""One side of a conditional: a GraphModule called as ``arm(frame, *operands)``."""


COUNT = "count"
"""Of a number that is a multiple of the number of rows."""

Carried = tuple[tuple[int | str | None, ...] | None, tuple[int | None, ...]] | None
"""How operands and results of a conditional carry rows: each along a dimension, as a `COUNT`, or
not at all. None for the operands where it is not known of one, None for both where it is not known
of a result: the batch has one size only, say."""


class When(enum.StrEnum):
    """The condition under which a `guard` runs its arm."""

    FULL = "full"
    """Some row of this call computes everything: caches are refreshed. Where a policy's sites
    are independent of each other: some row computes what the guard stands in."""

    COND = "cond"
    """The call belongs to the conditional branch."""

    UNCOND_FULL = "uncond-full"
    """As FULL, on the unconditional branch, with this step's conditional output at hand."""

    UNCOND_FIRST = "uncond-first"
    """The call belongs to the unconditional branch and comes before this step's conditional one."""

    COND_FULL = "cond-full"
    """As FULL, on the conditional branch, after an unconditional call that was not skipped."""

    FIRST_CALL = "first-call"
    """The call is the first of its step."""

    FIRST_FULL = "first-full"
    """Both."""


class Frame(Protocol):
    """What the operations need of a running call (implemented in `runtime.frame`)."""

    def read(self, slot: str, like: Tensor | None) -> Tensor: ...
    def write(self, slot: str, value: Tensor) -> None: ...
    def shift(self, newer: str, older: str) -> None: ...
    def weights(self, slot: str, count: int, like: Tensor) -> Tensor: ...
    def observe(self, signal: str, slot: str, sums: Tensor) -> None: ...
    def decide(self) -> None: ...
    def select(
        self, site: str, compute: Arm, reuse: Arm, operands: tuple[Any, ...], carried: Carried
    ) -> Any: ...
    def guard(self, when: When, arm: Arm, operands: tuple[Any, ...]) -> None: ...


def cache_read(frame: Frame, slot: str, like: Tensor | None = None) -> Tensor:
    """The value of a slot. A cold slot reads as NaN in the shape of `like`.

    An older value that is not there yet reads as zeros: it has no weight. In the reuse arm of a
    conditional the newest is warm (else the arm is not taken), and `like` is left out.
    """
    return frame.read(slot, like)


def cache_write(frame: Frame, slot: str, value: Tensor) -> None:
    """Keep `value` in a slot, by reference: nobody may write to its memory later."""
    frame.write(slot, value)


def cache_shift(frame: Frame, newer: str, older: str) -> None:
    """Let slot `older` hold what `newer` does, which is about to be written anew."""
    frame.shift(newer, older)


def weights(frame: Frame, slot: str, count: int, like: Tensor) -> Tensor:
    """(rows, count) float32 on the device of `like`: how a predictor sums up what it keeps.

    `slot` is the newest value of the site's first part. See `ir.predictors`.
    """
    return frame.weights(slot, count, like)


def observe(frame: Frame, signal: str, slot: str, sums: Tensor) -> None:
    """Record the per-row sums of a signal, which compared a value with what `slot` holds.

    Comes before the write of the slot. Under `When.FULL` it counts for the rows that compute.
    """
    frame.observe(signal, slot, sums)


def decide(frame: Frame) -> None:
    """Ask the policy, once per call: from here on the frame knows what each row reuses."""
    frame.decide()


def conditional(
    frame: Frame,
    site: str,
    compute: Arm,
    reuse: Arm,
    operands: tuple[Any, ...],
    carried: Carried = None,
) -> Any:
    """Run `compute` or `reuse` as decided for `site`; where rows differ, each for its rows.

    Arms return tuples of equal length. Rows that differ are gathered out of the operands and put
    back into the results as `carried` says. Where that is not known of operands, both arms run for
    all rows, and results are selected; along dimension 0 where it is not known of them either.
    """
    return frame.select(site, compute, reuse, operands, carried)


def guard(frame: Frame, when: When, arm: Arm, operands: tuple[Any, ...]) -> None:
    """Run `arm` for its effects (writes and signals) if the condition holds."""
    frame.guard(when, arm, operands)


EFFECTS = frozenset({cache_write, cache_shift, observe, decide, guard})
"""Operations without a result. FX must not take them for dead code."""

FRAME_OPS = EFFECTS | {cache_read, weights, conditional}
"""Operations whose first argument is the frame; the driver runs them, never Inductor."""


# ------------------------------------------------------------------ tensor functions
# Plain tensor code: traced through by Inductor and fused with its neighbours.


def l1_sums(value: Tensor, reference: Tensor, dim: int = 0) -> Tensor:
    """Per-row sums of a change: ``[sum|value - reference|, sum|reference|]``.

    Args:
        value: (rows, ...), any floating dtype.
        reference: like `value`.
        dim: along which rows lie, where that is not the first one.

    Returns:
        (rows, 2) float32. Sums and not a ratio, so that ranks can add theirs up.
    """
    a, b = (t.movedim(dim, 0).float().flatten(1) for t in (value, reference))
    return torch.stack([(a - b).abs().sum(1), b.abs().sum(1)], dim=1)


def motion_sums(value: Tensor, reference: Tensor, frames: int, dim: int = 0) -> Tensor:
    """`l1_sums`, then the same pair for the change from one video frame to the next.

    The second pair is ``[sum|R[f+1] - R[f]|, sum(|R[f+1]| + |R[f]|)]``: the motion score of
    AdaCache (arXiv 2411.02397, section 3.3, stride 1).

    Args:
        value: (rows, frames * height * width, channels): tokens, frame-major.
        reference: like `value`.
        frames: number of latent frames.
        dim: along which rows lie, where that is not the first one.

    Returns:
        (rows, 4) float32.
    """
    value, reference = value.movedim(dim, 0), reference.movedim(dim, 0)
    video = value.float().unflatten(1, (frames, -1)).flatten(2)
    later, earlier = video[:, 1:], video[:, :-1]
    change = (later - earlier).abs().sum((1, 2))
    size = (later.abs() + earlier.abs()).sum((1, 2))
    return torch.cat([l1_sums(value, reference), torch.stack([change, size], dim=1)], dim=1)


def trend_sums(value: Tensor, newer: Tensor, older: Tensor, dim: int = 0) -> Tensor:
    """`l1_sums` with `newer`, then ``[sum|value - older|, sum|newer - older|]``.

    Returns:
        (rows, 4) float32.
    """
    a, b, c = (t.movedim(dim, 0).float().flatten(1) for t in (value, newer, older))
    trend = torch.stack([(a - c).abs().sum(1), (b - c).abs().sum(1)], dim=1)
    return torch.cat([l1_sums(value, newer, dim), trend], dim=1)


def clone(value: Tensor) -> Tensor:
    """A copy, so that a slot never aliases an input, an output or another slot."""
    return value.clone()


def of_shape(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A value whose size depends on data, in the shape that it has whenever this graph is run."""
    for size, known in zip(value.shape, shape, strict=True):
        # The key of Inductor's cache holds nodes only. A mere check leaves none, and two graphs
        # that differ in such a size would be taken for one.
        torch.ops.aten._assert_scalar(size == known, f"a size that data give is not {known}")
    return value.view(shape)
