"""What `compile` returns for a module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch.fx.experimental import _config
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from cachepass import capture
from cachepass.adapters import hooks
from cachepass.arguments import Value, key_of, values_of
from cachepass.backend import Inner, backend_of
from cachepass.errors import CachePassError, CaptureError, SessionError
from cachepass.lowering.compiler import RegionCompiler
from cachepass.lowering.graph import GraphCompiler
from cachepass.moe.shadow import Shadow
from cachepass.record import Recording, record, record_or_none
from cachepass.runtime.batch import in_front
from cachepass.runtime.denoiser import HINT, Denoiser, Hint
from cachepass.runtime.guidance import (
    CONCATENATED,
    Arguments,
    Guidance,
    halves,
    join,
    latent_among,
)
from cachepass.runtime.policies import AnyPolicy, for_model
from cachepass.runtime.program import Program
from cachepass.runtime.ranks import Ranks
from cachepass.runtime.storage import Storage

Lowering = Literal["regions", "graph"]

_MOST_CHOICES = 32
"""Of one model, over all shapes."""

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class CachedModule(OptimizedModule):
    """A denoiser with a cache inside; everything else is the user's module, unchanged."""

    denoiser: Denoiser
    clocked: list[Denoiser]
    dynamic: bool | None
    guidance: Guidance | None
    lowering: Lowering
    shadow: Shadow
    _recordings: list[tuple[Recording, Program]]
    _backend: Callable[[fx.GraphModule, Sequence[Any]], Program]
    _marked: WeakTensorKeyDictionary
    _names: Sequence[str]

    def __init__(
        self,
        model: nn.Module,
        *,
        policy: AnyPolicy,
        lowering: Lowering,
        mode: str | None,
        dynamic: bool | None,
        guidance: Guidance | None,
        inner: Inner,
        storage: Storage,
        ranks: Ranks | None,
        dump: str | os.PathLike[str] | None,
    ) -> None:
        denoiser = Denoiser(
            for_model(policy, model), described=repr(policy), storage=storage, ranks=ranks
        )
        lower_to = GraphCompiler(mode, inner) if lowering == "graph" else RegionCompiler(mode)
        parameters = tuple(inspect.signature(model.forward).parameters)
        backend = backend_of(denoiser, lower_to, inner, dump, parameters)
        marked = "_is_torch_compile" in vars(model)
        capturing = functools.partial(
            torch.compile, backend=backend, fullgraph=True, dynamic=dynamic, **capture.ISOLATED
        )
        shadow = Shadow(model)
        compiled: Any = capturing(shadow.module)
        super().__init__(model, compiled.dynamo_ctx)
        # Plain assignment would end up on the user's module, as this flag of torch.compile did.
        vars(self).update(
            denoiser=denoiser, clocked=[denoiser], dynamic=dynamic, guidance=guidance,
            lowering=lowering, shadow=shadow, _capturing=capturing, forward=compiled.forward,
            _marked=WeakTensorKeyDictionary(), _recordings=[], _backend=backend, _names=parameters,
        )  # fmt: skip
        if not marked:
            vars(model).pop("_is_torch_compile", None)

    def _class_of_the_model(self) -> type:
        model = vars(self).get("_modules", {}).get("_orig_mod")  # None while it is built
        return type(self) if model is None else type(model)

    # Libraries ask a component for its class (diffusers: which of them may hold adapters). What
    # they then do goes to the model. `type` tells that this is a wrapper, `isinstance` tells both.
    __class__ = property(_class_of_the_model)

    def __reduce__(self) -> Any:
        raise CachePassError(
            "a compiled module is not copied or pickled: copy the module that was compiled, and "
            "compile the copy"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising call, without gradients."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                raise CachePassError(
                    "an input requires grad: cachepass is for inference, and a reused value has no "
                    "gradient. Detach the input, or train with the plain module"
                )
        hint = HINT.get()
        concatenated = self.guidance or (hint is not None and hint.branch == CONCATENATED)
        if concatenated and self.denoiser.skips_uncond:
            pair = halves(args, kwargs)
            if pair is not None:
                return self._in_turn(*pair)
        return self._call(args, kwargs)

    def _in_turn(self, first: Arguments, second: Arguments) -> Any:
        """The two halves of a batch as calls of two branches, the conditional one first."""
        hint = HINT.get() or Hint("")
        cond_first = self.guidance == "concat-cond-first"
        order = ("cond", "uncond") if cond_first else ("uncond", "cond")
        given = dict(zip(order, (first, second), strict=True))
        outputs = {}
        for branch in ("cond", "uncond"):
            token = HINT.set(dataclasses.replace(hint, branch=branch, half=True))
            try:
                outputs[branch] = self._call(*given[branch])
            finally:
                HINT.reset(token)
        return join(*(outputs[branch] for branch in order))

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return hooks.around(self._orig_mod, self._call_unhooked, args, kwargs)

    def _call_unhooked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # dynamic=True makes symbols of a module's floats, too (the eps of a norm), which no
        # region can be compiled for.
        floats = torch._dynamo.config.patch(specialize_float=True) if self.dynamic else _NOTHING
        latent, sizes = latent_among(args, kwargs), _NOTHING
        if latent is not None and latent.shape[0] == 0:
            raise SessionError(
                "the call has no rows: its latent is empty along the first dimension"
            )
        if latent is not None and latent.shape[0] > 1 and self.lowering == "regions":
            args, kwargs = _with_rows_open(args, kwargs, latent.shape[0], self._marked)
            # Equal sizes get symbols of their own: what has to be equal shows in the graph.
            sizes = _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # added late
        if self.shadow.refresh():
            compiled: Any = self._capturing(self.shadow.module)
            vars(self)["forward"] = compiled.forward
        try:
            with torch.no_grad(), floats, sizes:
                return self._captured(args, kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, CachePassError):
                raise error.inner_exception from error.inner_exception.__cause__
            raise
        except FailOnRecompileLimitHit as error:
            limit = torch._dynamo.config.recompile_limit
            shared = "" if capture.ISOLATED else " (this torch counts all models of a class as one)"
            raise CaptureError(
                f"{type(self._orig_mod).__name__} was called in as many ways (sizes, options) as "
                f"torch captures, {limit}{shared}, and this is another: compile it with "
                "dynamic=True for one capture of all sizes, or raise "
                "torch._dynamo.config.recompile_limit in the thread that calls it"
            ) from error
        except capture.FAILURES as error:
            raise capture.explain_failure(error, type(self._orig_mod).__name__) from error

    def _captured(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call as dynamo captures it, or as a recording where dynamo cannot."""
        try:
            if not self._recordings:
                return super().__call__(*args, **kwargs)
        except capture.FAILURES:
            recording = record_or_none(self.shadow.module, args, kwargs)
            # That was a plain call. Some models build tables (of rotary frequencies) in their
            # first one, by code that cannot be captured, and find them there in the second.
            # So do hooks on modules. What is logged is left out of the graph.
            try:
                with capture.logging_ignored():
                    return super().__call__(*args, **kwargs)
            except capture.FAILURES:
                hooks.refuse_layers(self._orig_mod)
                recording = recording or record_or_none(self.shadow.module, args, kwargs)
                if recording is None:
                    raise
                self._keep(recording, values_of(self._names, args, kwargs))
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, capture.SizedByDataError):
                raise
        return self._replayed(args, kwargs)

    def _replayed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call by a recording that holds for it, made now if there is none."""
        model = self.shadow.module
        values = values_of(self._names, args, kwargs)
        key = key_of(model, values)
        with self.denoiser.lock:
            fitting = (pair for pair in self._recordings if pair[0].key == key)
            found = next((p for p in fitting if p[0].holds(p[0].arguments(values))), None)
            if found is None:
                if len(self._recordings) == _MOST_CHOICES:
                    raise CaptureError(
                        f"the model chose in {_MOST_CHOICES} ways so far, and was captured for "
                        "each; now it chooses otherwise again. Let its forward choose by "
                        "torch.where, or by a Python value that it is given"
                    )
                found = self._keep(record(model, args, kwargs), values)
        recording, program = found
        return recording.returned(program(*recording.arguments(values)), values)

    def _keep(self, recording: Recording, values: Sequence[Value]) -> tuple[Recording, Program]:
        with self.denoiser.lock:
            program = self._backend(recording.gm, recording.arguments(values))
            self._recordings.append((recording, program))
            return self._recordings[-1]

    def notes(self) -> Iterator[str]:
        """What a report should say of how the model was captured."""
        yield from self.shadow.explain()
        if self._recordings:
            yield (
                "the call chooses by data, so it was recorded as it ran: all sizes are fixed, and "
                f"another choice is captured anew ({len(self._recordings)} so far)"
            )

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """What diffusers pipelines enter around each call: branch, step and number of steps."""
        branch = name.removeprefix("pred_")  # what guiders call their predictions
        hint = Hint(branch, fields.get("step_index"), fields.get("num_inference_steps"))
        token = HINT.set(hint)
        try:
            yield
        finally:
            HINT.reset(token)


def _with_rows_open(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rows: int,
    marked: WeakTensorKeyDictionary,
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments, marked so that a graph is captured with a symbol for the number of rows.

    The user's own tensors are left alone. A place in memory other than the first would become part
    of what is captured, so such values are copied; expanded ones as well, which a copy lays out
    anew (a loop's first timestep is the first in its memory, the others are not). One that comes
    again gets the same copy again: by that branches are told apart where nobody names them.
    """

    def mark(value: Any) -> Any:
        if not in_front(value, rows):
            return value
        # Inference tensors count no versions: nobody could tell that a copy of one is stale.
        version = math.nan if value.is_inference() else value._version
        before, copy = marked.get(value, (None, value))
        if before != version:
            moved = value.storage_offset() or 0 in value.stride()
            copy = value.clone() if moved else value.detach()
            torch._dynamo.maybe_mark_dynamic(copy, 0)
            marked[value] = version, copy
        return copy

    found: tuple[Sequence[Any], Mapping[str, Any]] = pytree.tree_map(mark, (args, kwargs))
    return found
