"""A loop that steps requests of one model together: continuous batching in one process.

A request is a generator. It yields what the calls of its next step are given, by branch of
guidance, is sent their outputs, and returns its result::

    def request(latent, texts, scheduler):
        for time in scheduler.timesteps:  # of a scheduler of its own
            given = {"hidden_states": latent, "timestep": time.expand(len(latent))}
            v = yield {b: given | {"encoder_hidden_states": t} for b, t in texts.items()}
            guided = v["uncond"] + 4.0 * (v["cond"] - v["uncond"])
            latent = scheduler.step(guided, time, latent).prev_sample
        return latent

    with Batcher(model, max_rows=4) as batcher:
        futures = [batcher.submit(request(...), num_inference_steps=50) for ... in ...]
        latents = [future.result() for future in futures]
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import threading
import traceback
import types
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

import torch

from cachepass import api
from cachepass.compiled import CachedModule
from cachepass.errors import CachePassError
from cachepass.plan import plan
from cachepass.runtime.guidance import latent_among
from cachepass.runtime.plan import Plan
from cachepass.runtime.session import Session, check_num_steps
from cachepass.runtime.shared_call import (
    Kind,
    Output,
    joined,
    kind_of,
    shapes_of,
    taken_apart,
    why_apart,
)

Branches = Mapping[str, Mapping[str, Any]]
"""Branch -> keyword arguments of the model; tensors have the request's samples in front."""

Request = Generator[Branches, dict[str, Output], Any]


@dataclasses.dataclass(slots=True, eq=False)
class _Work:
    """A request on its way."""

    request: Request
    steps: int
    future: Future[Any] = dataclasses.field(default_factory=Future)
    session: Session | None = None
    """Once it is admitted."""

    step: int = 0
    given: Branches = dataclasses.field(default_factory=dict)
    """Of the step that comes next, as all below; empty until the request has started."""

    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
    samples: int = 0
    kept: frozenset[tuple[str, int]] = frozenset()
    """Branches and samples that were called since it has caches, or will be."""

    needs: int = 0
    """What its caches may hold after it, in bytes; 0 without a budget."""

    reserved: int = 0
    """What they may hold before it."""


class Batcher:
    """Takes requests from any thread and steps those that fit together, in a thread of its own.

    Requests join and leave between steps. Those whose calls cannot be one batch (another
    resolution, other options) are called apart, in the same round. A request that fails, or whose
    future is cancelled, leaves with its caches; others go on. If a call of several fails, each is
    called again alone; with empty caches if the call had begun (to keep what they held until a call
    has ended would take twice their memory).

    A request may change on its way: guidance that starts late, more samples. Where that takes more
    than there is, it waits for the others to end. If all wait for each other, those that came last
    give up their caches and compute once more.

    Args:
        model: what `cachepass.compile` returned, with ``lowering="regions"``.
        max_rows: samples of all requests in a step. A call is of one branch: guidance does not
            double it.
        max_cache_bytes: what their caches may hold by `cachepass.plan`; None for no limit. Weights
            and activations are not counted.
    """

    def __init__(
        self, model: CachedModule, *, max_rows: int = 4, max_cache_bytes: int | None = None
    ) -> None:
        if max_rows < 1:
            raise CachePassError(f"`max_rows`={max_rows}: must be at least 1")
        if not isinstance(model, CachedModule) or model.lowering != "regions":
            raise CachePassError(
                f"`model` is a {type(model).__name__}: it must be what cachepass.compile returned "
                "with lowering='regions', which takes rows of several requests"
            )
        self._model, self._max_rows, self._max_bytes = model, max_rows, max_cache_bytes
        self._waiting: collections.deque[_Work] = collections.deque()
        self._running: list[_Work] = []
        self._submitted: weakref.WeakSet[Request] = weakref.WeakSet()
        self._plans: dict[object, Plan] = {}
        """By names, shapes and types of a call's arguments."""

        self._held = 0
        self._changed = threading.Condition()
        self._closed = ""
        """Why nothing is taken any more."""

        self._thread = threading.Thread(target=self._loop, name="cachepass-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, num_inference_steps: int) -> Future[Any]:
        """Queue a request; the future gives what it returns, or raises what it raised.

        Args:
            request: a generator that was not started.
            num_inference_steps: the most steps it makes, as its scheduler counts them.
        """
        if not isinstance(request, types.GeneratorType):
            raise CachePassError(
                f"`request` is a {type(request).__name__}: it must be a generator, which yields "
                "the inputs of each step's calls"
            )
        check_num_steps(num_inference_steps)
        work = _Work(request, num_inference_steps)
        with self._changed:
            if self._closed:
                raise CachePassError(self._closed)
            started = inspect.getgeneratorstate(request) != inspect.GEN_CREATED
            if started or request in self._submitted:
                raise CachePassError(
                    "`request` has been started or submitted before: a generator runs once, make "
                    "one for each request"
                )
            self._submitted.add(request)
            self._waiting.append(work)
            self._changed.notify()
        return work.future

    @property
    def cache_bytes(self) -> int:
        """What the slots of all running requests held after the last step."""
        return self._held

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        with self._changed:
            self._closed = self._closed or "the batcher is closed: submit before it is left"
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ in the thread

    def _loop(self) -> None:
        try:
            with _device_of(self._model):  # each thread has a current one of its own
                while self._wait():
                    for work in [w for w in self._running if w.future.cancelled()]:
                        self._leave(work)
                    self._admit()
                    self._step()
                    self._held = sum(w.session.cache_bytes for w in self._running if w.session)
        except BaseException as error:  # none of a request's: nobody is left waiting
            with self._changed:
                self._closed = f"the batcher failed: {error!r}"
            for work in (*self._running, *self._waiting):
                _fail(work, CachePassError(self._closed))
                self._leave(work)
            self._held = 0
            raise

    def _wait(self) -> bool:
        """Until there is work; False if none will come."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _admit(self) -> None:
        """Start requests in the order of their coming, as long as there is room."""
        while self._waiting:
            work = self._waiting[0]
            if not work.given and not work.future.cancelled():
                self._go_on(work, None)
            if work.future.done():
                self._waiting.popleft()
                self._leave(work)
            elif self._has_room(work, self._running):
                self._waiting.popleft()
                self._running.append(work)
                work.session = api.session(self._model, num_inference_steps=work.steps)
                work.reserved = work.needs
            else:
                return

    def _has_room(self, work: _Work, others: Sequence[_Work]) -> bool:
        """Whether a request may make its next step beside others."""
        if sum(other.samples for other in others) + work.samples > self._max_rows:
            return False
        if self._max_bytes is None or work.needs <= work.reserved:
            return True
        # Older ones that wait for room come first.
        place = self._running.index(work) if work in self._running else len(self._running)
        taken = sum(max(older.needs, older.reserved) for older in self._running[:place])
        taken += sum(newer.reserved for newer in self._running[place + 1 :])
        return taken + work.needs <= self._max_bytes

    def _plan(self, work: _Work) -> int:
        """What the caches of a request may hold after its next step.

        Those of a branch or sample that is called no more stay until the request ends.
        """
        given, denoiser = next(iter(work.given.values())), self._model.denoiser
        shapes = shapes_of(given)
        if shapes not in self._plans:
            self._plans[shapes] = plan(
                self._model._orig_mod,
                given,
                policy=denoiser.policy,
                cache_dtype=denoiser.storage.dtype,
            )
        planned = self._plans[shapes]
        samples, pairs = len({sample for _, sample in work.kept}), len(work.kept)
        shared = planned.bytes(rows=samples, branches=0)
        held = (
            shared + planned.bytes(rows=pairs, branches=1) - planned.bytes(rows=pairs, branches=0)
        )
        limit = denoiser.storage.max_bytes  # sites are left out until they are within it
        return held if limit is None else min(held, limit)

    def _check(self, work: _Work) -> None:
        """Find out what a request's next step needs.

        Raises:
            CachePassError: more than there can be.
        """
        work.samples = _samples(work.given)
        # The conditional call first: what an unconditional one may stand on.
        work.given = dict(sorted(work.given.items(), key=lambda item: item[0] != "cond"))
        work.kinds = {branch: kind_of(call) for branch, call in work.given.items()}
        if work.samples > self._max_rows:
            raise CachePassError(
                f"the request has {work.samples} samples, and `max_rows`={self._max_rows}"
            )
        if self._max_bytes is None:
            return
        work.kept |= {(branch, i) for branch in work.given for i in range(work.samples)}
        work.needs = self._plan(work)
        if work.needs > self._max_bytes:
            raise CachePassError(
                f"the request cannot run: its caches may hold {work.needs:,} bytes, and "
                f"`max_cache_bytes`={self._max_bytes:,}"
            )

    def _stepping(self) -> list[_Work]:
        """Those that make a step now, the oldest first."""
        found: list[_Work] = []
        for work in self._running:
            if self._has_room(work, found):
                work.reserved = work.needs
                found.append(work)
        if found or not self._running:
            return found
        newest = next(work for work in reversed(self._running) if work.reserved)
        assert newest.session is not None
        newest.session.drop()
        newest.session.note("caches dropped: an older request of the batcher needed their room")
        newest.reserved, newest.kept = 0, frozenset()
        self._check(newest)
        return self._stepping()

    def _step(self) -> None:
        """One step of the requests that run: a call for each branch."""
        stepping = self._stepping()
        outputs: dict[_Work, dict[str, Output]] = {work: {} for work in stepping}
        for turn in range(max((len(work.given) for work in stepping), default=0)):
            groups: dict[str, dict[Kind, list[_Work]]] = collections.defaultdict(dict)
            for work in stepping:
                if turn < len(work.given) and not work.future.done():
                    branch = list(work.given)[turn]
                    groups[branch].setdefault(work.kinds[branch], []).append(work)
            for branch, kinds in groups.items():
                for group in kinds.values():
                    for work in group if len(kinds) > 1 else ():
                        if work.session is not None:
                            work.session.note(why_apart(kinds))
                    self._call(branch, group, outputs)
        for work in stepping:
            if not work.future.done():
                self._go_on(work, outputs[work])
            if work.future.done():
                self._leave(work)

    def _call(
        self, branch: str, group: Sequence[_Work], outputs: dict[_Work, dict[str, Output]]
    ) -> None:
        made = self._together(branch, group)
        if not isinstance(made, Exception):
            for work, output in zip(group, made, strict=True):
                outputs[work][branch] = output
        elif len(group) == 1:
            _fail(group[0], made)
        else:
            for work in group:
                self._call(branch, [work], outputs)

    def _together(self, branch: str, group: Sequence[_Work]) -> Sequence[Output] | Exception:
        """The outputs of a call for several requests, or why it failed."""
        given = [work.given[branch] for work in group]
        try:
            rows = [
                work.session.row(branch=branch, sample=i, step=work.step)
                for work in group
                for i in range(work.samples)
                if work.session is not None
            ]
            with api.rows(self._model, rows):
                made = self._model(**{name: joined(name, given) for name in given[0]})
            return taken_apart(made, [work.samples for work in group])
        except Exception as error:
            # Its frames hold the activations of a call that may have run out of memory.
            _forget_frames(error)
            return error

    def _go_on(self, work: _Work, outputs: dict[str, Output] | None) -> None:
        """Let a request make its next step; it may have ended."""
        try:
            with torch.no_grad():
                work.given = next(work.request) if outputs is None else work.request.send(outputs)
            work.step += outputs is not None
            self._check(work)
        except StopIteration as end:
            with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
                work.future.set_result(end.value)
        except BaseException as error:  # the user's own, SystemExit as well: it ends the request
            _fail(work, error)

    def _leave(self, work: _Work) -> None:
        """Forget a request, and all that was cached for it."""
        try:
            work.request.close()
        except BaseException as error:  # of its own `finally`
            _fail(work, error)
        if work in self._running:
            self._running.remove(work)
        if work.session is not None:
            work.session.drop()
        if work.future.cancelled():
            work.future.set_running_or_notify_cancel()  # tells those who wait for it


def _device_of(model: CachedModule) -> contextlib.AbstractContextManager[Any]:
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device(parameter.device)


def _samples(given: Any) -> int:
    """Of a request, by what it yielded."""
    calls = list(given.values()) if isinstance(given, Mapping) else []
    latents = [latent_among((), call) if isinstance(call, Mapping) else None for call in calls]
    counts = {latent.shape[0] if latent is not None else None for latent in latents}
    if len(counts) != 1 or None in counts:
        raise CachePassError(
            "a request must yield {branch: keyword arguments}, each with a latent of as many "
            "samples"
        )
    if counts == {0}:
        raise CachePassError("a request yielded a latent without samples: it needs at least one")
    return int(counts.pop())  # type: ignore[arg-type]


def _fail(work: _Work, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
        work.future.set_exception(error)


def _forget_frames(error: BaseException) -> None:
    """Let go of what the frames of an error, and of those behind it, hold."""
    found: list[BaseException | None] = [error]
    for one in found:
        if one is not None:
            traceback.clear_frames(one.__traceback__)
            found += [e for e in (one.__cause__, one.__context__) if e not in found]
