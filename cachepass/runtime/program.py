"""A rewritten graph and what runs it."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.runtime.denoiser import Denoiser
from cachepass.runtime.frame import Frame
from cachepass.runtime.inputs import Inputs, signature_of
from cachepass.runtime.plan import Plan
from cachepass.runtime.session import Ahead


@dataclasses.dataclass(frozen=True, slots=True)
class Driver:
    """Runs a graph for inputs of one signature."""

    run: Callable[..., Any]
    """Called as ``run(frame, *args)``."""

    takes: Callable[[int], bool] = lambda rows: True
    """Whether it, and its arms, take this many rows."""

    plan: Plan | None = None
    """What slots may hold; where room is limited."""


Lower = Callable[[fx.GraphModule, Sequence[Any]], Driver]


class Program:
    """A rewritten graph and its drivers, for each signature of inputs."""

    def __init__(self, denoiser: Denoiser, gm: fx.GraphModule, lower: Lower) -> None:
        self.denoiser, self.gm, self.inputs = denoiser, gm, Inputs(gm)
        self._lower = lower
        self._drivers: dict[tuple[Any, ...], list[Driver]] = collections.defaultdict(list)

    def __call__(self, *args: Any) -> Any:
        """One denoising call; an exception drops the slots of its sessions."""
        driver = self._driver(args)
        call_cond = functools.partial(self.call_cond, args=args)
        frame = self.denoiser.open(self.inputs, args, call_cond, driver.takes, driver.plan)
        sessions = frame.sessions
        if self.denoiser.skips_uncond:
            self._remember(frame, args)
        try:
            result = self._made_ahead(frame, args)
            if result is None:
                result = driver.run(frame, *args)
                for session, record in frame.record():
                    session.record(record)
        except BaseException:
            for session in sessions:
                session.drop()
            raise
        for session in sessions:
            if session.step + 1 == session.num_steps and session.all_branches_called:
                self.denoiser.warn_if_useless(session.history)
        return result

    # Where the unconditional call comes first and is to be skipped, it stands on the
    # conditional output of its step, which is not there yet. What the conditional call
    # will be given is known but for the text, and that is what it was a step ago.
    # Only where a call belongs to one branch of one session.

    def _remember(self, frame: Frame, args: Sequence[Any]) -> None:
        """Keep the text of a conditional call, as long as the other one's is of its shape."""
        branches = {row.branch for row in frame.rows}
        given = tuple(args[i] for i in self.inputs.conditioning)
        if len(frame.sessions) > 1 or len(branches) > 1:
            for session in frame.sessions:
                session.conditional = None
            return
        (session,) = frame.sessions
        samples = tuple(row.sample for row in frame.rows)
        if branches == {"cond"}:
            session.conditional, session.conditional_of = given, samples
        elif session.conditional is not None and (
            samples != session.conditional_of
            or signature_of(session.conditional) != signature_of(given)
        ):
            session.conditional = None

    def call_cond(self, uncond: Frame, *, args: Sequence[Any]) -> None:
        """Make a step's conditional call before its turn, with the text of the step before."""
        (session,) = uncond.sessions
        given = list(args)
        assert session.conditional is not None
        for i, tensor in zip(self.inputs.conditioning, session.conditional, strict=True):
            given[i] = tensor
        frame = uncond.of_branch("cond")
        output = self._driver(given).run(frame, *given)
        inputs = tuple(given[i] for i in self.inputs.arguments)
        ((_, record),) = frame.record()
        session.ahead = Ahead(session.step, inputs, output, record)

    def _made_ahead(self, frame: Frame, args: Sequence[Any]) -> Any:
        """The output of this call, if it was made before its turn with the same inputs."""
        for session in frame.sessions:
            ahead = session.ahead
            if ahead is None or any(row.branch != "cond" for row in frame.rows):
                continue
            session.ahead = None
            same = tuple(row.sample for row in frame.rows) == session.conditional_of
            if ahead.step != session.step or len(frame.sessions) > 1 or not same:
                continue
            pairs = zip(ahead.inputs, (args[i] for i in self.inputs.arguments), strict=True)
            if all(_same(a, b) for a, b in pairs):
                session.record(ahead.record)
                return ahead.output
            for row in frame.rows:  # what was kept of the unconditional one belongs to that call
                session.skipped_uncond_at[row.sample] = session.step
            session.note(
                "the conditional call was made ahead of its turn, for the unconditional one to "
                "stand on, and its inputs turned out to be others: it was computed again"
            )
        return None

    def _driver(self, args: Sequence[Any]) -> Driver:
        key, rows = self.inputs.signature(args), self.inputs.rows(args)
        driver = self._found(key, rows)
        if driver is None:
            with self.denoiser.lock:
                driver = self._found(key, rows)
                if driver is None:
                    driver = self._lower(self.gm, args)
                    self._drivers[key].append(driver)
        return driver

    def _found(self, key: tuple[Any, ...], rows: int) -> Driver | None:
        return next((d for d in self._drivers[key] if d.takes(rows)), None)


def _same(a: Any, b: Any) -> bool:
    """Whether two inputs are equal; the same memory without a look at it."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
