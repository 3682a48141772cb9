"""Requests of a calibration: run the user's pipeline, look at what it computes, leave no trace."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cachepass import api
from cachepass.compiled import CachedModule
from cachepass.errors import CachePassError
from cachepass.ir.boundary import Signal, Site
from cachepass.runtime.policies import AnyPolicy
from cachepass.runtime.policy import COMPUTE, Decision, Facts, Measure, Policy, Trigger
from cachepass.runtime.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit found."""

    fields: dict[str, Any]
    """Of the policy."""

    measured: dict[str, float]
    """For people: see `Profile.measured`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Trigger):
    """Measure, and never reuse."""

    watched: tuple[Signal, ...] = ()

    def signals(self) -> tuple[Signal, ...]:
        return self.watched

    def decide(self, facts: Facts, state: Any) -> Decision:
        return COMPUTE, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a model, right after it: all that was measured and kept in it."""

    prompt: int
    denoiser: int
    """Which of the pipeline's."""

    session: Session

    @property
    def step(self) -> int:
        """Counted from 0."""
        return self.session.step

    @property
    def branch(self) -> str:
        """Its place in guidance."""
        return self.session.branches_in_step[-1]

    def measures(self, signal: str) -> list[Measure]:
        """A signal of this branch, row by row."""
        seen = self.session.signals.items()
        return [s.measure() for (b, _, name), s in seen if (b, name) == (self.branch, signal)]

    def kept(self, prefix: str) -> list[Tensor]:
        """The largest value in this branch's slots of that prefix, row by row."""
        rows: dict[str, list[Tensor]] = collections.defaultdict(list)
        for (branch, _, name), kept in self.session.slots.items():
            if branch == self.branch and name.startswith(prefix):
                rows[name].append(kept.value)
        return max(rows.values(), key=lambda values: values[0].numel())


@dataclasses.dataclass(kw_only=True)
class Runs:
    """The requests of one calibration, with a bar of their progress."""

    pipe: Any
    prompts: Sequence[str]
    num_inference_steps: int
    seed: int
    call_options: dict[str, Any]
    title: str | None
    """Of the bar; None shows none."""

    _bar: Any = None

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, total: int) -> None:
        """Show a bar over this many runs."""
        if self.title is None:
            return
        with contextlib.suppress(ImportError):  # it comes with diffusers, not with torch
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self.title, unit="run", file=sys.stderr)

    def __call__(self, prompt: int) -> Tensor:
        """Run a request; returns its final latent."""
        output = self.pipe(
            prompt=self.prompts[prompt],
            num_inference_steps=self.num_inference_steps,
            generator=torch.Generator().manual_seed(self.seed + prompt),
            output_type="latent",
            return_dict=False,
            **self.call_options,
        )
        if self._bar is not None:
            self._bar.update()
        latent = output[0]
        if not isinstance(latent, Tensor):
            raise CachePassError(
                f"{type(self.pipe).__name__} returned {type(latent).__name__} as its latent, where "
                "calibration needs a tensor"
            )
        return latent

    @contextlib.contextmanager
    def compiled(self, policy: AnyPolicy) -> Iterator[list[CachedModule]]:
        """The pipeline's denoisers under a policy."""
        api.compile(self.pipe, policy=policy, inner="eager")
        try:
            found = self.pipe.components.values()
            yield [module for module in found if isinstance(module, CachedModule)]
        finally:
            api.restore(self.pipe)

    def watch(
        self, site: Site | str, signals: Sequence[Signal], seen: Callable[[Call], None]
    ) -> None:
        """Run each prompt, all computed; `seen` is told of each call of a denoiser."""
        policy = Policy(name="calibrate", sites=site, trigger=Watch(watched=tuple(signals)))
        prompt = 0
        with self.compiled(policy) as models:
            for index, model in enumerate(models):

                def tell(module: Any, args: object, output: object, index: int = index) -> None:
                    session = module.denoiser.request
                    seen(Call(prompt=prompt, denoiser=index, session=session))

                model.register_forward_hook(tell)  # of the wrapper, which is dropped
            for prompt in range(len(self.prompts)):
                self(prompt)


@contextlib.contextmanager
def untouched(pipe: Any, models: Sequence[Any]) -> Iterator[None]:
    """Put all attributes of a pipeline, its scheduler and its denoisers back at the end."""
    owners = [pipe, pipe.scheduler, *models]
    before = [dict(vars(owner)) for owner in owners]
    try:
        if callable(getattr(pipe, "set_progress_bar_config", None)):
            pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            vars(owner).clear()
            vars(owner).update(attributes)
