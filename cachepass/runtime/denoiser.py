"""One compiled model: its requests, and where each call belongs."""

from __future__ import annotations

import contextvars
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cachepass.errors import PolicyError, SessionError
from cachepass.ir.boundary import Cfg, Layout
from cachepass.runtime.clock import Conditioning
from cachepass.runtime.frame import Frame, Surroundings
from cachepass.runtime.inputs import Inputs
from cachepass.runtime.plan import Plan
from cachepass.runtime.policy import Policy
from cachepass.runtime.ranks import Ranks
from cachepass.runtime.row import Row
from cachepass.runtime.rows import ROWS
from cachepass.runtime.session import ENTERED, History, Location, Session
from cachepass.runtime.storage import Storage

if TYPE_CHECKING:
    from cachepass.runtime.program import Program


@dataclasses.dataclass(frozen=True, slots=True)
class Hint:
    """What diffusers' `cache_context` says of a call."""

    branch: str
    step: int | None = None
    num_steps: int | None = None
    half: bool = False
    """Whether the call is one branch's half of a batch: then `branch` is certain."""


HINT: contextvars.ContextVar[Hint | None] = contextvars.ContextVar("cachepass_hint", default=None)

_KEEP_REQUESTS = 16
_SURELY_GUIDED = 2  # at this step a second branch was seen, if there is one
_USUAL_BRANCHES = 2  # calls in a step; with more, it is worth a look at the timestep


class Denoiser:
    """Finds the session, step and branch of each call. One per `cachepass.compile`.

    First that applies: an entered session; the scheduler of a compiled pipeline (it calls
    `begin_request` and `end_step`); the fields of `cache_context`; the calls themselves.
    """

    def __init__(
        self,
        policy: Policy,
        num_steps: int | None = None,
        *,
        described: str | None = None,
        storage: Storage | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy, self.storage, self.ranks = policy, storage or Storage(), ranks
        self.described = described or repr(policy)
        """The policy as the user gave it."""

        self.num_steps = num_steps
        """Of requests for which nothing else tells it."""

        self.regions, self.compile_seconds = 0, 0.0
        """What was compiled so far, and how long that took."""

        self.sites = {site.name: site for site in policy.sites}
        self.programs: list[Program] = []
        self.requests: list[History] = []
        self.lock = threading.RLock()
        self.skips_uncond = any(isinstance(site, Cfg) for site in policy.sites)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._request: Session | None = None
        self._request_step: int | None = None
        self._told: int | None = None
        self._left: int | None = None
        self._silent = False
        """Whether the scheduler that is followed makes no steps: copies of it do."""
        self._time: tuple[int, Tensor] | None = None
        """Step of the scheduler and timestep of its first call."""

        self._warned = False

    # -------------------------------------------------------------------- requests

    def new_session(self, num_steps: int | None) -> Session:
        """A session of this model; the histories of the latest few stay in the report."""
        session = Session(self, num_steps)
        with self.lock:
            self._sessions.add(session)
            self.requests = [*self.requests[1 - _KEEP_REQUESTS :], session.history]
        return session

    @property
    def request(self) -> Session | None:
        """The session of the latest call that no entered session claimed."""
        return self._request

    def begin_request(self, num_steps: int, told: int | None = None) -> None:
        """A scheduler was set to this many steps: what follows is a new request."""
        if self._request is not None:
            self._request.drop()
            if not self._request.history.records:  # set again before anything was called
                unused = self._request.history
                self.requests = [r for r in self.requests if r is not unused]
        self._request, self._request_step = self.new_session(num_steps), 0
        self._told, self._left, self._silent = told, None, False

    def expect(self, num_steps: int) -> None:
        """The request has another number of steps than was thought."""
        if self._request is not None and self._request_step is not None:
            self._request.set_num_steps(num_steps)

    def end_step(self, left: int | None = None) -> None:
        """The scheduler made a step; after the last one the slots are freed."""
        if self._request is None or self._request_step is None or self._silent:
            return
        self._request_step, self._left = self._request_step + 1, left
        if self._request_step == self._request.num_steps:
            self._request.drop()

    def end_request(self) -> None:
        """The pipeline is done: slots are freed, also of a loop that was left early."""
        request, made = self._request, self._request_step
        if request is None or made is None or not request.history.records:
            return
        if self._silent:
            made += 1
        if request.num_steps is not None and 0 < made < request.num_steps:
            request.note(f"the loop ended after {made} of {request.num_steps} steps")
            request.set_num_steps(made)
        request.drop()

    def warn_if_useless(self, request: History) -> None:
        """Say once that a whole request reused nothing."""
        short = request.num_steps is not None and request.num_steps <= 2  # first and last
        if self._warned or not self.sites or request.reused or short:
            return
        self._warned = True
        warnings.warn(
            f"policy {self.policy.name!r} reused nothing in a request of {request.num_steps} "
            "steps: cachepass.report says what each call did; loosen the policy's thresholds or "
            "take more steps",
            stacklevel=3,
        )

    def reset(self) -> None:
        """Drop the slots and state of all sessions. A request that runs goes on, cold."""
        with self.lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.drop()

    def _locate(
        self, time: Tensor | None, conditioning: Sequence[Tensor]
    ) -> tuple[Session, int, str]:
        entered = next((e for e in reversed(ENTERED.get()) if e.session.owner is self), None)
        hint = HINT.get()
        if entered is not None:
            session: Session | None = entered.session
            step, branch = entered.step, entered.branch
            if hint is not None and hint.half:
                branch = hint.branch
        else:
            session, step, branch = self._request, self._request_step, None
        if hint is not None:
            branch = branch or hint.branch
            if step is None:
                step = hint.step
            if session is None or (
                entered is None and self._request_step is None and step is not None
                and (step < session.step or hint.num_steps != session.num_steps)
            ):  # fmt: skip
                session = self._request = self.new_session(hint.num_steps)
        if session is None:
            session = self._request = self.new_session(self.num_steps)
        if step is not None and branch is None:  # a scheduler tells steps
            branch = session.branch_by_order(step, Conditioning(conditioning))
        if entered is None and step is not None and step == self._request_step:
            if branch in session.branches_in_step and self._is_silent(session, step, time):
                step = self._request_step = step + 1
            elif time is not None:
                self._check_clock(session, step, time)
            if session.num_steps is not None and step >= session.num_steps:
                session.set_num_steps(step + max(self._left or 1, 1))
        if step is None or branch is None:
            moment = float(time.flatten()[0]) if time is not None else 0.0
            told, guess, restarted = session.clock.tick(moment, Conditioning(conditioning))
            if restarted and entered is None and self._request_step is None:
                clock = session.clock
                session.drop()
                session = self._request = self.new_session(self.num_steps)
                session.clock = clock
                session.note("a request was taken to start where the timestep turned back")
            step = told if step is None else step
            branch = branch or guess
        return session, step, branch

    def _is_silent(self, session: Session, step: int, time: Tensor | None) -> bool:
        """Whether a branch that comes again is a further step, told by nothing but that.

        So where a pipeline gives each frame a copy of the scheduler: it sets the timesteps of the
        one that is followed, and never steps it.
        """
        if step != session.step:
            return False
        if not self._silent and step == 0 and time is not None and self._time is not None:
            then, now = self._time[1], time
            self._silent = then.shape != now.shape or not torch.equal(then, now)
            if self._silent and self._told is not None:
                session.set_num_steps(self._told)
        return self._silent

    def _check_clock(self, session: Session, step: int, time: Tensor) -> None:
        """Raise if the timestep moves and the scheduler that is followed does not."""
        if self._time is None or self._time[0] != step or step != session.step:
            self._time = (step, time)
        elif len(session.branches_in_step) >= _USUAL_BRANCHES:
            then, now = float(self._time[1].flatten()[0]), float(time.flatten()[0])
            if then != now:
                raise SessionError(
                    f"the timestep went from {then:g} to {now:g}, but the scheduler that cachepass "
                    "follows made no step: was the pipeline's scheduler replaced after "
                    "cachepass.compile? Then cachepass.restore(pipe), and compile it again"
                )

    def _make_room(self, session: Session, layout: Layout, plan: Plan, limit: int) -> None:
        """Leave sites out, the largest first, until what the session may keep is within a limit."""
        rows, branches = session.samples, len(session.branches)

        def size(site: str | None) -> int:
            return plan.of_site(site, rows=rows, branches=branches)

        sites = sorted(self.sites, key=size, reverse=True)
        kept = [site for site in sites if site not in session.left_out]
        while kept and size(None) + sum(map(size, kept)) > limit:
            left = kept.pop(0)
            session.leave_out(left, layout)
            session.note(
                f"site {left!r} is not cached: with it, caches may hold "
                f"{size(None) + size(left) + sum(map(size, kept)):,} bytes, and "
                f"max_cache_bytes={limit:,}"
            )
        if sites and not kept:
            needs = ", ".join(f"{site!r} {size(site):,}" for site in sites)
            raise PolicyError(
                f"`max_cache_bytes`={limit:,} is too little for policy {self.policy.name!r}: its "
                f"signals need {size(None):,} bytes, its sites {needs}. Raise it, choose narrower "
                "slots (cache_dtype=), or another policy (cachepass.plan tells what each needs)"
            )

    def _check_guidance(self, session: Session) -> None:
        """Say that there is nothing to skip where a model is called once per step."""
        text = (
            "site 'cfg' has nothing to skip: the model is called once per step, so guidance is "
            "distilled or off, or another process makes the other branch's call, or its branches "
            "lie in one batch (then say guidance='concat')"
        )
        if all(isinstance(site, Cfg) for site in self.policy.sites):
            raise PolicyError(f"policy {self.policy.name!r}: {text}, or choose a policy of blocks")
        session.note(text)

    def open(
        self,
        inputs: Inputs,
        args: Sequence[Any],
        call_cond: Callable[[Frame], None],
        takes: Callable[[int], bool],
        plan: Plan | None,
    ) -> Frame:
        """The frame of a call that is about to run."""
        time = args[inputs.timestep] if inputs.timestep is not None else None
        with self.lock:
            places = self._places(inputs, args, time)
            sessions = list(dict.fromkeys(place.session for place in places))
            if len(sessions) > 1 and inputs.layout.rows_mixed:
                raise SessionError(
                    "requests cannot share a call of this model, since the parts of a row may lie "
                    f"apart: {inputs.layout.rows_mixed}. Call its requests one by one"
                )
            try:
                rows = self._begin(inputs, args, places, sessions, plan)
            except BaseException:
                for session in sessions:  # some have begun the call
                    session.drop()
                raise
        alone = len(sessions) == 1
        around = Surroundings(
            self.policy, self.sites, inputs.layout, self.storage, args[inputs.latent].device, time,
            call_cond if alone else None, takes, self.ranks,
        )  # fmt: skip
        return Frame(rows, around)

    def _places(self, inputs: Inputs, args: Sequence[Any], time: Tensor | None) -> list[Location]:
        """Whose each row is."""
        count, hint = inputs.rows(args), HINT.get()
        listed = next((rows for rows in reversed(ROWS.get()) if rows.owner is self), None)
        if listed is not None:
            return listed.places(count, hint.branch if hint is not None else None)
        session, step, branch = self._locate(time, [args[i] for i in inputs.conditioning])
        return [Location(session, step, branch, sample) for sample in range(count)]

    def _begin(
        self,
        inputs: Inputs,
        args: Sequence[Any],
        places: Sequence[Location],
        sessions: Sequence[Session],
        plan: Plan | None,
    ) -> list[Row]:
        """Enter each session; its rows, in the order of the call."""
        latent = args[inputs.latent]
        kind = (inputs.computation, inputs.text(args))
        # Once per step, and only where something is cached: a model has hundreds of weights.
        starting = {p.session for p in places if p.step != p.session.step}
        if starting and self.sites:
            weights = inputs.weights(args)
            for session in starting:
                session.weights = weights
        found: dict[int, Row] = {}
        for session in sessions:
            mine = {i: p for i, p in enumerate(places) if p.session is session}
            steps = {p.step for p in mine.values()}
            if len(steps) > 1:
                raise SessionError(
                    f"rows of one session are at steps {sorted(map(str, steps))}: they belong to "
                    "one step of a request"
                )
            (step,) = steps
            assert step is not None
            rows = [(p.branch or "", p.sample) for p in mine.values()]
            before = session.begin(
                step,
                rows,
                (latent.shape[1:], latent.dtype, latent.device, session.weights),
                {branch: kind for branch, _ in rows},
            )
            if plan is not None and self.storage.max_bytes is not None:
                self._make_room(session, inputs.layout, plan, self.storage.max_bytes)
            seen: set[int] = set()
            branches = session.branches
            if self.skips_uncond and step == _SURELY_GUIDED and len(branches) == 1:
                self._check_guidance(session)
            told = zip(mine, rows, before, strict=True)
            # The conditional one first, whatever the order of rows.
            for i, (branch, sample), earlier in sorted(told, key=lambda t: t[1][0] != "cond"):
                first = not earlier and sample not in seen
                seen.add(sample)
                found[i] = Row(session, step, branch, sample, earlier, first)
        return [found[i] for i in range(len(places))]
