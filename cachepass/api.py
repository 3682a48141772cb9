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

from cachepass import capture
from cachepass.adapters import diffusers as pipelines
from cachepass.errors import CachePassError, PolicyError, SessionError
from cachepass.ir.printer import format_graph
from cachepass.lowering.graph import GraphCompiler
from cachepass.lowering.regions import RegionCompiler, lower
from cachepass.moe.shadow import Shadow
from cachepass.observe import dump_to
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.report import Report, merged, report_of
from cachepass.runtime.denoiser import HINT, Denoiser, Hint, Program
from cachepass.runtime.guidance import CONCATENATED, Arguments, Guidance, halves, join
from cachepass.runtime.policies import AnyPolicy, SRDiffusion, for_model, resolve
from cachepass.runtime.relay import RENDER, SKETCH, Relay, Switch
from cachepass.runtime.session import Session

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


_NOTHING = contextlib.nullcontext()


class CachedModule(OptimizedModule):
    """A denoiser with a cache inside; everything else is the user's module, unchanged."""

    denoiser: Denoiser
    clocked: list[Denoiser]
    dynamic: bool | None
    guidance: Guidance | None
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
        dump: str | os.PathLike[str] | None,
    ) -> None:
        denoiser = Denoiser(for_model(policy, model), described=repr(policy))
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
        vars(self).update(denoiser=denoiser, clocked=[denoiser], dynamic=dynamic, guidance=guidance)
        vars(self).update(shadow=shadow, _capturing=capturing, forward=compiled.forward)
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
        if self.shadow.refresh():
            compiled: Any = self._capturing(self.shadow.module)
            vars(self)["forward"] = compiled.forward
        try:
            with torch.no_grad(), floats:
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

    def lower_program(gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        if isinstance(compiler, GraphCompiler):
            driver = compiler(gm, args, denoiser.policy)
        elif inner == "eager":
            return gm.forward
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
        program = Program(denoiser, result.graph_module, lower_program)
        denoiser.programs.append(program)
        return program

    return cachepass


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
