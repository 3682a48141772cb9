"""A loop that steps requests of one model together: continuous batching in one process.

A request is a generator. It yields what the calls of its next step are given, by branch of
guidance, is sent their outputs, and returns its result::

    def request(latent, texts, scheduler):
        for time in scheduler.timesteps:
            given = {"hidden_states": latent, "timestep": time.expand(len(latent))}
            v = yield {b: given | {"encoder_hidden_states": t} for b, t in texts.items()}
            guided = v["uncond"] + 4.0 * (v["cond"] - v["uncond"])
            latent = scheduler.step(guided, time, latent).prev_sample
        return latent

    with Batcher(model, max_rows=4) as batcher:
        futures = [batcher.submit(request(...), num_inference_steps=50) for _ in range(16)]
        latents = [future.result() for future in futures]
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from cachepass import api
from cachepass.compiled import CachedModule
from cachepass.errors import CachePassError
from cachepass.plan import plan
from cachepass.runtime.batch import in_front
from cachepass.runtime.guidance import latent_among
from cachepass.runtime.plan import Plan
from cachepass.runtime.session import Session

Branches = Mapping[str, Mapping[str, Any]]
"""Branch -> keyword arguments of the model; tensors have the request's samples in front."""

Request = Generator[Branches, dict[str, Tensor], Any]


@dataclasses.dataclass(slots=True, eq=False)
class _Work:
    """A request on its way."""

    request: Request
    future: Future[Any]
    steps: int
    given: Branches = dataclasses.field(default_factory=dict)
    """Of the step that comes next; empty until the request has started."""

    step: int = 0
    samples: int = 0
    session: Session | None = None
    """Once it is admitted."""


class Batcher:
    """Takes requests from any thread and steps those that fit together, in a thread of its own.

    Requests join and leave between steps. Those whose calls cannot be one batch (another
    resolution, other options) are called apart, in the same round. A request that fails, or whose
    future is cancelled, leaves with its caches; others go on. If a call of several fails, each is
    called again alone; with empty caches if the call had begun (to keep what they held until a call
    has ended would take twice their memory).

    Args:
        model: what `cachepass.compile` returned, with ``lowering="regions"``.
        max_rows: samples of all requests that run at a time.
        max_cache_bytes: what their caches may hold by `cachepass.plan`; None for no limit.
    """

    def __init__(
        self, model: CachedModule, *, max_rows: int = 4, max_cache_bytes: int | None = None
    ) -> None:
        if max_rows < 1:
            raise CachePassError(f"`max_rows`={max_rows}: must be at least 1")
        self._model, self._max_rows, self._max_bytes = model, max_rows, max_cache_bytes
        self._waiting: collections.deque[_Work] = collections.deque()
        self._running: list[_Work] = []
        self._plans: dict[object, Plan] = {}
        """By the kind of a request's calls."""

        self._held = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="cachepass-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, num_inference_steps: int) -> Future[Any]:
        """Queue a request; the future gives what it returns, or raises what it raised."""
        if not isinstance(request, Generator):
            raise CachePassError(
                f"`request` is a {type(request).__name__}: it must be a generator, which yields "
                "the inputs of each step's calls"
            )
        work = _Work(request, Future(), num_inference_steps)
        with self._changed:
            if self._closed:
                raise CachePassError("the batcher is closed: submit before it is left")
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
            self._closed = True
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
            while self._wait():
                for work in [w for w in self._running if w.future.cancelled()]:
                    self._leave(work)
                self._admit()
                self._step()
                self._held = sum(w.session.cache_bytes for w in self._running if w.session)
        except BaseException as error:  # none of a request's: nobody is left waiting
            with self._changed:
                self._closed = True
            for work in (*self._running, *self._waiting):
                _fail(work, CachePassError(f"the batcher failed: {error!r}"))
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
                continue
            if not self._fits(work):
                return
            self._waiting.popleft()
            if work.future.done():
                self._leave(work)
            else:
                work.session = api.session(self._model, num_inference_steps=work.steps)
                self._running.append(work)

    def _fits(self, work: _Work) -> bool:
        """Whether a request may join; one that never will is failed."""
        rows = sum(other.samples for other in self._running)
        if work.samples > self._max_rows:
            why = f"the request has {work.samples} samples, and `max_rows`={self._max_rows}"
            _fail(work, CachePassError(why))
            return True
        if self._max_bytes is None:
            return rows + work.samples <= self._max_rows
        try:
            own, others = self._plan(work), sum(map(self._plan, self._running))
        except Exception as error:
            _fail(work, error)
            return True
        if own > self._max_bytes:
            why = f"its caches may hold {own:,} bytes, and `max_cache_bytes`={self._max_bytes:,}"
            _fail(work, CachePassError(f"the request cannot run: {why}"))
            return True
        return rows + work.samples <= self._max_rows and own + others <= self._max_bytes

    def _plan(self, work: _Work) -> int:
        given = next(iter(work.given.values()))
        kind, denoiser = _kind(given), self._model.denoiser
        if kind not in self._plans:
            self._plans[kind] = plan(
                self._model._orig_mod,
                given,
                policy=denoiser.policy,
                cache_dtype=denoiser.storage.dtype,
            )
        return self._plans[kind].bytes(rows=work.samples, branches=len(work.given))

    def _step(self) -> None:
        """One step of every request that runs: a call for each branch."""
        outputs: dict[_Work, dict[str, Tensor]] = {work: {} for work in self._running}
        turns = max((len(work.given) for work in self._running), default=0)
        for turn in range(turns):
            groups: dict[object, list[_Work]] = collections.defaultdict(list)
            for work in self._running:
                if turn < len(work.given) and not work.future.done():
                    branch = list(work.given)[turn]
                    groups[branch, _kind(work.given[branch])].append(work)
            for (branch, _), group in groups.items():  # type: ignore[misc]
                self._call(branch, group, outputs)
        for work in list(self._running):
            if not work.future.done():
                self._go_on(work, outputs[work])
            if work.future.done():
                self._leave(work)

    def _call(
        self, branch: str, group: Sequence[_Work], outputs: dict[_Work, dict[str, Tensor]]
    ) -> None:
        try:
            made = self._together(branch, group)
        except Exception as error:
            if len(group) > 1:
                for work in group:
                    self._call(branch, [work], outputs)
            else:
                _fail(group[0], error)
            return
        for work, output in zip(group, made, strict=True):
            outputs[work][branch] = output

    def _together(self, branch: str, group: Sequence[_Work]) -> Sequence[Tensor]:
        """The outputs of a call for several requests."""
        rows = [
            work.session.row(branch=branch, sample=i, step=work.step)
            for work in group
            for i in range(work.samples)
            if work.session is not None
        ]
        given = [work.given[branch] for work in group]
        with api.rows(self._model, rows):
            made = self._model(**{name: _joined(name, group, given) for name in given[0]})
        output: Tensor = made[0] if isinstance(made, tuple) else getattr(made, "sample", made)
        parts: Sequence[Tensor] = output.split([work.samples for work in group])
        return parts

    def _go_on(self, work: _Work, outputs: dict[str, Tensor] | None) -> None:
        """Let a request make its next step; it may have ended."""
        try:
            with torch.no_grad():
                work.given = next(work.request) if outputs is None else work.request.send(outputs)
            work.step += outputs is not None
            work.samples = _samples(work.given)
        except StopIteration as end:
            with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
                work.future.set_result(end.value)
        except Exception as error:
            _fail(work, error)

    def _leave(self, work: _Work) -> None:
        """Forget a request, and all that was cached for it."""
        try:
            work.request.close()
        except Exception as error:  # of its own `finally`
            _fail(work, error)
        if work in self._running:
            self._running.remove(work)
        if work.session is not None:
            work.session.drop()
        if work.future.cancelled():
            work.future.set_running_or_notify_cancel()  # tells those who wait for it


def _samples(given: Any) -> int:
    """Of a request, by what it yielded."""
    calls = list(given.values()) if isinstance(given, Mapping) else []
    latents = [latent_among((), call) if isinstance(call, Mapping) else None for call in calls]
    counts = {latent.shape[0] if latent is not None else 0 for latent in latents}
    if len(counts) != 1 or counts == {0}:
        raise CachePassError(
            "a request must yield {branch: keyword arguments}, each with a latent of as many "
            "samples"
        )
    return int(counts.pop())


def _fail(work: _Work, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
        work.future.set_exception(error)


def _kind(given: Mapping[str, Any]) -> object:
    """Equal for calls that can be one batch."""
    latent = latent_among((), given)
    rows = latent.shape[0] if latent is not None else 1
    found: list[object] = []
    for name, value in sorted(given.items()):
        if in_front(value, rows):
            found.append((name, value.shape[1:], value.dtype))
        else:  # shared by all rows: tensors, also inside of something, have to be the very same
            leaves, tree = tree_flatten(value)
            same = (id(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
            found.append((name, str(tree), *same))
    return tuple(found)


def _joined(name: str, group: Sequence[_Work], given: Sequence[Mapping[str, Any]]) -> Any:
    """One argument of a call, from those of its requests."""
    first = given[0][name]
    if len(given) == 1 or not in_front(first, group[0].samples):
        return first
    return torch.cat([g[name] for g in given])
