"""`compile` and its companions: capture, then passes, then lowering, read top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.fx.experimental import _config
from torch.utils._pytree import tree_map

from cachepass import capture
from cachepass.adapters import diffusers as pipelines
from cachepass.errors import CachePassError, PolicyError, SessionError
from cachepass.ir.boundary import layout_of
from cachepass.ir.printer import format_graph
from cachepass.lowering.graph import GraphCompiler
from cachepass.lowering.regions import RegionCompiler, lower
from cachepass.lowering.shapes import slots_of_a_row
from cachepass.moe.shadow import Shadow
from cachepass.observe import dump_to
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.report import Report, merged, report_of
from cachepass.runtime.denoiser import HINT, Denoiser, Hint
from cachepass.runtime.guidance import CONCATENATED, Arguments, Guidance, halves, join, latent_among
from cachepass.runtime.policies import AnyPolicy, SRDiffusion, for_model, resolve
from cachepass.runtime.program import Driver, Program
from cachepass.runtime.relay import RENDER, SKETCH, Relay, Switch
from cachepass.runtime.rows import Rows
from cachepass.runtime.session import Location, Session
from cachepass.runtime.storage import Storage

M = TypeVar("M")
Inner = Literal["inductor", "eager"]
Lowering = Literal["regions", "graph"]


def compile(
    model: M,
    *,
    policy: str | os.PathLike[str] | AnyPolicy | SRDiffusion = "mixcache",
    options: dict[str, Any] | None = None,
    lowering: Lowering = "regions",
    mode: str | None = None,
    dynamic: bool | None = None,
    guidance: Guidance | None = None,
    inner: Inner = "inductor",
    max_cache_bytes: int | None = None,
    cache_dtype: torch.dtype | None = None,
    cache_on_host: bool = False,
    dump: str | os.PathLike[str] | None = None,
) -> M:
    """Compile a denoiser, or every denoiser of a diffusers pipeline, with a cache inside.

    Args:
        model: a diffusion transformer, or a pipeline that holds some. A module comes back
            wrapped, as from torch.compile, and is itself left alone; a pipeline comes back
            as the same object with its denoisers wrapped (`restore` undoes it).
        policy: a name (see `policies()`), a policy object, or a `Profile` or the path of one.
        options: fields of the policy, if it is given by name or profile.
        lowering: "regions", Inductor for each distinct region and Python between them; "graph",
            one Inductor program, the decision inside (docs/export.md).
        mode: as in torch.compile: "default", "max-autotune", ...
        dynamic: as in torch.compile: whether to capture with symbolic shapes.
        guidance: "concat" where each call holds both branches of guidance in one batch, the
            unconditional rows first ("concat-cond-first": last). For a policy that skips the
            unconditional branch such a call is taken apart. diffusers' pipelines say it themselves.
        inner: "eager" runs the rewritten graph without Inductor: slower, bitwise equal to
            the model, good for debugging.
        max_cache_bytes: what one request may keep. Sites that do not fit are left out, the largest
            first, and the report says so; `plan` tells what each needs. With "regions".
        cache_dtype: keep wider floating values in float16, bfloat16 or an 8-bit type, with a scale
            for each row. With "regions".
        cache_on_host: keep values in the host's memory; a GPU fetches them as it computes. With
            "regions".
        dump: a folder for the graph after each pass; the environment variable
            CACHEPASS_DUMP does the same.

    Raises:
        PolicyError: unknown policy or option, with the valid ones.
        CaptureError: at the first call, if the call cannot be captured or has no blocks.
    """
    if lowering not in get_args(Lowering):
        raise CachePassError(
            f"unknown `lowering`={lowering!r}: must be one of {', '.join(get_args(Lowering))}"
        )
    if inner not in ("inductor", "eager"):
        raise CachePassError(f"unknown `inner`={inner!r}: must be 'inductor' or 'eager'")
    if guidance not in (None, *get_args(Guidance)):
        raise CachePassError(
            f"unknown `guidance`={guidance!r}: must be None or one of "
            f"{', '.join(get_args(Guidance))}"
        )
    storage = Storage(dtype=cache_dtype, on_host=cache_on_host, max_bytes=max_cache_bytes)
    if lowering == "graph" and storage != Storage():
        raise CachePassError(
            "`max_cache_bytes`, `cache_dtype` and `cache_on_host` are options of "
            "lowering='regions': a whole graph keeps its state as it is"
        )
    if policy == SRDiffusion.name:
        raise PolicyError(
            "policy 'srdiffusion' needs a second model: policy=cachepass.SRDiffusion(render=...)"
        )
    choose = functools.partial(
        resolve, options=options, scheduler=getattr(model, "scheduler", None)
    )

    def wrap(
        module: nn.Module, chosen: AnyPolicy, folder: str | os.PathLike[str] | None
    ) -> CachedModule:
        if isinstance(module, OptimizedModule):
            raise CachePassError(
                "the model is compiled already: give cachepass the plain module "
                "(`model._orig_mod`), it calls Inductor itself"
            )
        return CachedModule(
            module,
            policy=chosen,
            lowering=lowering,
            mode=mode,
            dynamic=dynamic,
            guidance=guidance,
            inner=inner,
            storage=storage,
            dump=folder,
        )

    folder = dump or _dump_folder()
    if isinstance(policy, SRDiffusion):
        if isinstance(model, nn.Module):
            raise PolicyError(
                "SRDiffusion takes turns within a request, which a scheduler has to tell of: give "
                "the pipeline to cachepass.compile, not its model"
            )
        sides = choose(policy.sketch_policy), choose(policy.render_policy)
        return pipelines.attach(model, _relay(policy, *sides, wrap, folder))
    resolved = choose(policy)
    if isinstance(model, nn.Module):
        return wrap(model, resolved, folder)  # type: ignore[return-value]
    return pipelines.attach(
        model,
        lambda name, module: wrap(module, resolved, pathlib.Path(folder, name) if folder else None),
    )


def _relay(
    policy: SRDiffusion,
    sketch: AnyPolicy,
    render: AnyPolicy,
    wrap: Callable[[nn.Module, AnyPolicy, str | os.PathLike[str] | None], CachedModule],
    folder: str | os.PathLike[str] | None,
) -> Callable[[str, nn.Module], Relay]:
    """What puts a relay in the place of each denoiser; one switch and one small model for all."""
    switch = Switch(policy)
    small = wrap(policy.render, render, pathlib.Path(folder, RENDER) if folder else None)

    def put(name: str, module: nn.Module) -> Relay:
        inside = pathlib.Path(folder, name) if folder else None
        return Relay(wrap(module, sketch, inside), small, switch)

    return put


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class CachedModule(OptimizedModule):
    """A denoiser with a cache inside; everything else is the user's module, unchanged."""

    denoiser: Denoiser
    clocked: list[Denoiser]
    dynamic: bool | None
    guidance: Guidance | None
    lowering: Lowering
    shadow: Shadow

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
        dump: str | os.PathLike[str] | None,
    ) -> None:
        denoiser = Denoiser(for_model(policy, model), described=repr(policy), storage=storage)
        lower_to = GraphCompiler(mode, inner) if lowering == "graph" else RegionCompiler(mode)
        backend = _backend(denoiser, lower_to, inner, dump, _parameters(model))
        marked = "_is_torch_compile" in vars(model)
        # Isolated: two models of equal config would share dynamo's entries otherwise, and
        # weights are inputs of the graph.
        capturing = functools.partial(
            torch.compile,
            backend=backend,
            fullgraph=True,
            dynamic=dynamic,
            isolate_recompiles=True,
        )
        shadow = Shadow(model)
        compiled: Any = capturing(shadow.module)
        super().__init__(model, compiled.dynamo_ctx)
        # Plain assignment would end up on the user's module, as this flag of torch.compile did.
        vars(self).update(
            denoiser=denoiser, clocked=[denoiser], dynamic=dynamic, guidance=guidance,
            lowering=lowering, shadow=shadow, _capturing=capturing, forward=compiled.forward,
        )  # fmt: skip
        if not marked:
            vars(model).pop("_is_torch_compile", None)

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
        # dynamic=True makes symbols of a module's floats, too (the eps of a norm), which no
        # region can be compiled for.
        floats = torch._dynamo.config.patch(specialize_float=True) if self.dynamic else _NOTHING
        latent, sizes = latent_among(args, kwargs), _NOTHING
        if latent is not None and latent.shape[0] > 1 and self.lowering == "regions":
            args, kwargs = _with_rows_open(args, kwargs, latent.shape[0])
            # Equal sizes get symbols of their own: what has to be equal shows in the graph.
            sizes = _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # added late
        if self.shadow.refresh():
            compiled: Any = self._capturing(self.shadow.module)
            vars(self)["forward"] = compiled.forward
        try:
            with torch.no_grad(), floats, sizes:
                return super().__call__(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, CachePassError):
                raise error.inner_exception from error.inner_exception.__cause__
            raise
        except Unsupported as error:
            raise capture.explain_failure(error, type(self._orig_mod).__name__) from error

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """What diffusers pipelines enter around each call: branch, step and number of steps."""
        hint = Hint(name, fields.get("step_index"), fields.get("num_inference_steps"))
        token = HINT.set(hint)
        try:
            yield
        finally:
            HINT.reset(token)


def _with_rows_open(
    args: Sequence[Any], kwargs: Mapping[str, Any], rows: int
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments, marked so that a graph is captured with a symbol for the number of rows.

    The user's own tensors are left alone. A place in memory other than the first would become part
    of what is captured, so such values are copied.
    """

    def mark(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != rows:
            return value
        value = value.clone() if value.storage_offset() else value.detach()
        torch._dynamo.maybe_mark_dynamic(value, 0)
        return value

    marked: tuple[Sequence[Any], Mapping[str, Any]] = tree_map(mark, (args, kwargs))
    return marked


def _dump_folder() -> str | None:
    return os.environ.get("CACHEPASS_DUMP") or None


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def _backend(
    denoiser: Denoiser,
    compiler: RegionCompiler | GraphCompiler,
    inner: Inner,
    dump: str | os.PathLike[str] | None,
    parameters: Sequence[str],
) -> Callable[[fx.GraphModule, Sequence[Any]], Program]:
    """The backend that dynamo hands a captured call to."""

    def lower_program(gm: fx.GraphModule, args: Sequence[Any]) -> Driver:
        if isinstance(compiler, GraphCompiler):
            driver = compiler(gm, args, denoiser.policy)
        elif inner == "eager":
            return Driver(gm.forward)
        else:
            driver = lower(gm, args, compiler)
        denoiser.regions, denoiser.compile_seconds = compiler.count, compiler.seconds
        return driver

    def cachepass(captured: fx.GraphModule, _: Sequence[Any]) -> Program:
        gm = capture.own_graph(captured, parameters)
        policy = denoiser.policy
        passes = default_pipeline(policy.sites, policy.signals())
        number = len(denoiser.programs)  # a new shape may be a new graph
        observers = []
        if dump is not None:
            observers = [dump_to(pathlib.Path(dump, f"graph{number}") if number else dump)]
        result = run_passes(gm, passes, observers=observers)
        if denoiser.storage.max_bytes is not None:
            _measure_slots(result.graph_module, denoiser.storage)
        program = Program(denoiser, result.graph_module, lower_program)
        denoiser.programs.append(program)
        return program

    return cachepass


def _measure_slots(gm: fx.GraphModule, storage: Storage) -> None:
    layout = layout_of(gm)
    for name, (shape, dtype) in slots_of_a_row(gm).items():
        kept_in = storage.dtype_of(layout.slots[name], dtype)
        layout.slot_bytes[name] = shape.numel() * kept_in.itemsize


def torch_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="cachepass", fullgraph=True, options={"policy": ...})``.

    Steps and branches are read off the calls: one request at a time, under `torch.no_grad`.
    Options are those of the policy, and `num_inference_steps` for policies that need it.
    """
    fields = dict(options or {})
    num_steps = fields.pop("num_inference_steps", None)
    chosen = resolve(fields.pop("policy", "mixcache"), fields)
    policy = for_model(chosen, None)
    if policy.trigger.needs_num_steps and num_steps is None:
        raise PolicyError(
            f"policy {policy.name!r} needs the number of steps of a request: add "
            '"num_inference_steps" to the options'
        )
    denoiser = Denoiser(policy, num_steps, described=repr(chosen))
    backend = _backend(denoiser, RegionCompiler(), "inductor", _dump_folder(), ())
    program = backend(gm, example_inputs)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise CachePassError(
                "gradients are on: cachepass is for inference, and a reused value has no "
                "gradient. Call the model under torch.no_grad()"
            )
        return program(*args)

    return call


def session(model: nn.Module, *, num_inference_steps: int | None = None) -> Session:
    """A request of its own: enter it around calls, name steps and branches with `at`.

    Args:
        model: what `compile` returned.
        num_inference_steps: steps of the request, which some policies need.
    """
    return _denoiser(model).new_session(num_inference_steps)


def rows(model: nn.Module, rows: Sequence[Session | Location]) -> Rows:
    """Rows of several requests in one call, each with its own step, slots and decisions.

    ::

        with cachepass.rows(model, [a, b, c.row(sample=0), c.row(sample=1)]):
            model(latents, timesteps, texts)  # row by row

    A session that is listed goes on by one step each time it is left without an exception; name
    the step with `Session.row` if it is another. The branch of the rows is that of the
    `cache_context` around a call, else the call's place in its step.

    Args:
        model: what `compile` returned, with ``lowering="regions"``.
        rows: whose each row is, in the order of the batch.
    """
    return Rows(_denoiser(model), rows)


def reset(model: Any) -> None:
    """Drop the slots of all sessions of a compiled model or pipeline."""
    for cached in _cached(model).values():
        cached.denoiser.reset()


def report(model: Any) -> Report:
    """What was found, decided, reused and compiled; of a model, a pipeline or a session."""
    if isinstance(model, Session):
        owner = model.owner
        assert isinstance(owner, Denoiser)
        return report_of(owner, only=model.history)
    return merged(
        {
            name: report_of(cached.denoiser, notes=cached.shadow.explain())
            for name, cached in _cached(model).items()
        }
    )


def dump(model: Any, folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Write the final graph of each captured call to a folder, as text.

    For the graph after every pass, give `compile` the folder (or set CACHEPASS_DUMP).
    """
    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, cached in enumerate(_cached(model).values()):
        if not cached.denoiser.programs:
            raise CachePassError("nothing was captured yet: call the model once before `dump`")
        for j, program in enumerate(cached.denoiser.programs):
            path = root / f"model{i}-graph{j}.txt"
            path.write_text(format_graph(program.gm), encoding="utf-8")
            paths.append(path)
    return paths


def restore(pipe: M) -> M:
    """Undo `compile` on a pipeline: its own denoisers and scheduler come back."""
    return pipelines.detach(pipe)


def _denoiser(model: Any) -> Denoiser:
    if not isinstance(model, CachedModule):
        raise SessionError(
            f"expected what cachepass.compile returned for a module, got {type(model).__name__}"
        )
    return model.denoiser


def _cached(model: Any) -> dict[str, CachedModule]:
    """What cachepass has compiled of a model or a pipeline, by name."""
    if isinstance(model, CachedModule):
        return {"model": model}
    found: dict[str, CachedModule] = {}
    for name, module in pipelines.denoisers(model).items():
        if isinstance(module, CachedModule):
            found[name] = module
        elif isinstance(module, Relay):
            found |= {f"{name}, {SKETCH}": module.sketch, RENDER: module.render}
    if not found:
        raise CachePassError(
            f"{type(model).__name__} holds nothing that cachepass.compile has compiled"
        )
    return found
