"""A scheduler as a clock: when a request starts, how many steps it has, when a step ends.

`set_timesteps` starts a request, `step` ends a step. How many steps there will be is known in
stages, since pipelines may leave out the first timesteps (strength) or the last:

1. `set_timesteps`: no more than there are timesteps;
2. `set_begin_index`: those before it are left out;
3. the pipeline's progress bar, which starts the loop: what the pipeline says of the loop;
4. the first `step`: which timestep it was for;
5. a call after the last step that was expected: there are more.

Where these differ, the lower number is taken. A request that is longer than was thought goes on
with empty slots; one that is shorter would reuse in its last step, which policies mean to compute.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol

CLOCK = "_cachepass_clock"
WRAPPED = ("set_timesteps", "set_begin_index", "step")


class Clocked(Protocol):
    """What a scheduler is the clock of."""

    def begin_request(self, num_steps: int, told: int | None = None) -> None:
        """What follows is a new request.

        Args:
            num_steps: as far as the scheduler knows.
            told: what the pipeline calls the length of its loop.
        """

    def expect(self, num_steps: int) -> None:
        """The request has another number of steps than was thought."""

    def end_step(self, left: int | None = None) -> None:
        """A step was made; the scheduler has timesteps for so many more."""

    def end_request(self) -> None:
        """The pipeline is done."""


class SchedulerClock:
    """What a scheduler is the clock of, and where it stands; a copy of the scheduler has none."""

    def __init__(self) -> None:
        self.followers: list[Clocked] = []
        self.num_steps, self.done = 0, 0

    def __deepcopy__(self, _: object) -> SchedulerClock:
        return SchedulerClock()

    def begin(self, scheduler: Any) -> None:
        """Timesteps were set."""
        self.num_steps, self.done = len(scheduler.timesteps), 0
        for follower in self.followers:
            follower.begin_request(self.num_steps)

    def begin_loop(self, told: int | None) -> None:
        """The pipeline is about to make its first step, of so many if it says that."""
        if self.done or not self.num_steps:
            return
        if told is not None and told > 0:
            self.num_steps = min(self.num_steps, told)
        # Anew: a pipeline may go through the same timesteps several times, with copies of the
        # scheduler, which nobody follows.
        for follower in self.followers:
            follower.begin_request(self.num_steps, told)

    def no_more_than(self, num_steps: int) -> None:
        """The scheduler has timesteps for no more steps than that."""
        if 0 < num_steps < self.num_steps:
            self.num_steps = num_steps
            for follower in self.followers:
                follower.expect(num_steps)

    def end_step(self, scheduler: Any, timestep: Any) -> None:
        """The scheduler made a step."""
        self.done += 1
        left = _left(scheduler, timestep if self.done == 1 else None)
        if left is not None:
            self.no_more_than(self.done + left)
        for follower in self.followers:
            follower.end_step(left)

    def end(self) -> None:
        """The pipeline is done."""
        for follower in self.followers:
            follower.end_request()


def _left(scheduler: Any, timestep: Any) -> int | None:
    """How many timesteps come after the step that was just made (for `timestep`, if given)."""
    timesteps = scheduler.timesteps
    index = getattr(scheduler, "step_index", None)
    if index is None and timestep is not None:
        # Of several that are equal the last: see above.
        found = (timesteps == timestep).nonzero().flatten().tolist()
        index = found[-1] + 1 if found else None
    return len(timesteps) - int(index) if index is not None else None


def clock_of(scheduler: Any) -> SchedulerClock | None:
    """The clock of a scheduler that is followed."""
    found: SchedulerClock | None = vars(scheduler).get(CLOCK)
    return found


def follow(scheduler: Any, clocked: Clocked) -> None:
    """Let a scheduler start requests and end steps. Wraps the instance only."""
    followers = vars(scheduler).setdefault(CLOCK, SchedulerClock()).followers
    if not any(other is clocked for other in followers):
        followers.append(clocked)
    kind = type(scheduler)
    signature = inspect.signature(kind.step)

    # Bound methods, not closures over the scheduler: some pipelines work on a deep copy of it.
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        getattr(self, CLOCK).begin(self)
        return result

    def set_begin_index(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_begin_index(self, *args, **kwargs)
        getattr(self, CLOCK).no_more_than(len(self.timesteps) - (self.begin_index or 0))
        return result

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        result = kind.step(self, *args, **kwargs)
        getattr(self, CLOCK).end_step(self, given.get("timestep"))
        return result

    for method in (set_timesteps, set_begin_index, step):
        wrap_method(scheduler, method)


def unfollow(scheduler: Any) -> None:
    """Put the plain scheduler back."""
    for name in (*WRAPPED, CLOCK):
        vars(scheduler).pop(name, None)


def wrap_method(owner: Any, method: Callable[..., Any]) -> None:
    """Put a method over the one of its name that an object's class has, if it has one."""
    name = method.__name__
    plain = getattr(type(owner), name, None)
    if plain is not None:
        vars(owner)[name] = types.MethodType(functools.wraps(plain)(method), owner)
