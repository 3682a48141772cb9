"""One compiled model: its programs, its requests, and where each call belongs."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cachepass.errors import PolicyError, SessionError
from cachepass.ir.boundary import Cfg, Layout, call_inputs, layout_of
from cachepass.runtime.frame import Frame
from cachepass.runtime.policy import Policy
from cachepass.runtime.session import ENTERED, Ahead, Conditioning, History, Session

Driver = Callable[..., Any]
Lower = Callable[[fx.GraphModule, Sequence[Any]], Driver]


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
_VERSION = operator.attrgetter("_version")


class Denoiser:
    """Finds the session, step and branch of each call. One per `cachepass.compile`.

    First that applies: an entered session; the scheduler of a compiled pipeline (it calls
    `begin_request` and `end_step`); the fields of `cache_context`; the calls themselves.
    """

    def __init__(
        self, policy: Policy, num_steps: int | None = None, *, described: str | None = None
    ) -> None:
        self.policy = policy
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

    def begin_request(self, num_steps: int) -> None:
        """A scheduler was set to this many steps: what follows is a new request."""
        if self._request is not None:
            self._request.drop()
        self._request, self._request_step = self.new_session(num_steps), 0

    def end_step(self) -> None:
        """The scheduler made a step; after the last one the slots are freed."""
        if self._request is None or self._request_step is None:
            return
        self._request_step += 1
        if self._request_step == self._request.num_steps:
            self._request.drop()

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
        for session in list(self._sessions):
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
        if step is not None and branch is None:  # a scheduler tells steps: branches by their order
            earlier = session.branches_in_step if step == session.step else ()
            branch = f"call{len(earlier)}"
        if entered is None and step is not None and time is not None and step == self._request_step:
            self._check_clock(session, step, time)
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

    def _check_guidance(self, session: Session) -> None:
        """Say that there is nothing to skip where a model is called once per step."""
        text = (
            "site 'cfg' has nothing to skip: the model is called once per step, so guidance is "
            "distilled or off, or its branches lie in one batch (then say guidance='concat')"
        )
        if all(isinstance(site, Cfg) for site in self.policy.sites):
            raise PolicyError(f"policy {self.policy.name!r}: {text}, or choose a policy of blocks")
        session.note(text)

    def open(self, program: Program, args: Sequence[Any]) -> Frame:
        """The frame of a call that is about to run."""
        layout = program.layout
        latent = args[program.latent]
        time = args[program.timestep] if program.timestep is not None else None
        conditioning = [args[i] for i in program.conditioning]
        with self.lock:
            session, step, branch = self._locate(time, conditioning)
            # Once per step, and only where something is cached: a model has hundreds of weights.
            if step != session.step and self.sites:
                session.weights = program.weights(args)
            signature = (
                id(program), latent.shape, latent.dtype, latent.device, session.weights,
            )  # fmt: skip
            first = session.begin(step, branch, signature)
            if self.skips_uncond and step == _SURELY_GUIDED and session.branches == [branch]:
                self._check_guidance(session)
        return Frame(
            session,
            self.policy,
            self.sites,
            layout,
            step=step,
            branch=branch,
            rows=latent.shape[0],
            first_call=first,
            time=time,
            call_cond=functools.partial(program.call_cond, args=args),
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two inputs are equal; the same memory without a look at it."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def signature_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What compiled code depends on: shapes, strides, dtypes, devices, plain values."""
    return tuple(
        (i.shape, i.stride(), i.dtype, i.device) if isinstance(i, Tensor) else i for i in inputs
    )


class Program:
    """A rewritten graph and its drivers, one for each signature of inputs."""

    def __init__(self, denoiser: Denoiser, gm: fx.GraphModule, lower: Lower) -> None:
        self.denoiser, self.gm, self.layout = denoiser, gm, layout_of(gm)
        self._lower = lower
        self._drivers: dict[tuple[Any, ...], Driver] = {}
        places = call_inputs(gm)
        index = {n: i for i, n in enumerate(places)}
        layout: Layout = self.layout
        assert layout.latent is not None
        self.latent = index[layout.latent]
        self.timestep = index[layout.timestep] if layout.timestep is not None else None
        self.conditioning = [
            index[n] for n in layout.inputs.values() if n not in (layout.latent, layout.timestep)
        ]
        self._arguments = [i for i, n in enumerate(places) if not n.meta.get("weight")]
        weights = [i for i, n in enumerate(places) if n.meta.get("weight")]
        self._weights_of = operator.itemgetter(*weights, weights[0])  # a tuple, even of one

    def weights(self, args: Sequence[Any]) -> tuple[int, int]:
        """Changes when a weight is written to or replaced."""
        weights = self._weights_of(args)
        # Inference tensors count no versions.
        uncounted = torch.is_inference_mode_enabled() or weights[0].is_inference()
        versions = 0 if uncounted else sum(map(_VERSION, weights))
        return versions, hash(tuple(map(Tensor.data_ptr, weights)))

    def __call__(self, *args: Any) -> Any:
        """One denoising call; an exception drops the session's slots."""
        frame = self.denoiser.open(self, args)
        session = frame.session
        if self.denoiser.skips_uncond:
            self._remember(frame, args)
        try:
            result = self._made_ahead(frame, args)
            if result is None:
                result = self._driver(args)(frame, *args)
                session.record(frame.record())
        except BaseException:
            session.drop()
            raise
        if frame.step + 1 == session.num_steps and session.all_branches_called:
            self.denoiser.warn_if_useless(session.history)
        return result

    # Where the unconditional call comes first and is to be skipped, it stands on the
    # conditional output of its step, which is not there yet. What the conditional call
    # will be given is known but for the text, and that is what it was a step ago.

    def _remember(self, frame: Frame, args: Sequence[Any]) -> None:
        """Keep the text of a conditional call, as long as the other one's is of its shape."""
        session, given = frame.session, tuple(args[i] for i in self.conditioning)
        if frame.branch == "cond":
            session.conditional = given
        elif session.conditional is not None and signature_of(session.conditional) != signature_of(
            given
        ):
            session.conditional = None

    def call_cond(self, uncond: Frame, *, args: Sequence[Any]) -> None:
        """Make a step's conditional call before its turn, with the text of the step before."""
        session, given = uncond.session, list(args)
        assert session.conditional is not None
        for i, tensor in zip(self.conditioning, session.conditional, strict=True):
            given[i] = tensor
        frame = uncond.of_branch("cond")
        output = self._driver(given)(frame, *given)
        inputs = tuple(given[i] for i in self._arguments)
        session.ahead = Ahead(frame.step, inputs, output, frame.record())

    def _made_ahead(self, frame: Frame, args: Sequence[Any]) -> Any:
        """The output of this call, if it was made before its turn with the same inputs."""
        session = frame.session
        ahead, session.ahead = session.ahead, session.ahead if frame.branch != "cond" else None
        if ahead is None or frame.branch != "cond" or ahead.step != frame.step:
            return None
        pairs = zip(ahead.inputs, (args[i] for i in self._arguments), strict=True)
        if not all(_same(a, b) for a, b in pairs):
            session.note(
                "the conditional call was made ahead of its turn, for the unconditional one to "
                "stand on, and its inputs turned out to be others: it was computed again"
            )
            return None
        session.record(ahead.record)
        return ahead.output

    def _driver(self, args: Sequence[Any]) -> Driver:
        key = signature_of([args[i] for i in self._arguments])
        driver = self._drivers.get(key)
        if driver is None:
            with self.denoiser.lock:
                driver = self._drivers.get(key)
                if driver is None:
                    driver = self._drivers[key] = self._lower(self.gm, args)
        return driver
