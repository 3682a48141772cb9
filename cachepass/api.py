"""`compile` and its companions."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from cachepass.adapters import diffusers as pipelines
from cachepass.backend import Inner, dump_folder
from cachepass.compiled import CachedModule, Lowering
from cachepass.errors import CachePassError, PolicyError, SessionError
from cachepass.ir.printer import format_graph
from cachepass.report import Report, merged, report_of
from cachepass.runtime.denoiser import Denoiser
from cachepass.runtime.guidance import Guidance
from cachepass.runtime.policies import AnyPolicy, SRDiffusion, resolve
from cachepass.runtime.ranks import Ranks
from cachepass.runtime.relay import RENDER, SKETCH, Relay, Switch
from cachepass.runtime.rows import Rows
from cachepass.runtime.session import Location, Session
from cachepass.runtime.storage import Storage

M = TypeVar("M")


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
    group: dist.ProcessGroup | None = None,
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
        cache_dtype: keep wider floating values in bfloat16, or in float16 or an 8-bit type, both
            with a scale for each row. With "regions".
        cache_on_host: keep values in the host's memory; a GPU fetches them as it computes. With
            "regions".
        group: the processes that work on one request, each with its tokens or its branch of
            guidance: all decide alike (docs/parallel.md). With "regions".
        dump: a folder for the graph after each pass; the environment variable
            CACHEPASS_DUMP does the same.

    Raises:
        PolicyError: unknown policy or option, with the valid ones.
        CaptureError: at the first call, if the call cannot be captured or has no blocks.
        SessionError: at a call, if the processes of `group` are at different steps.
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
    if lowering == "graph" and group is not None:
        raise CachePassError(
            "`group` is an option of lowering='regions': a whole graph decides on its own"
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
            ranks=Ranks(group) if group is not None else None,
            dump=folder,
        )

    folder = dump or dump_folder()
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


def session(model: nn.Module, *, num_inference_steps: int | None = None) -> Session:
    """A request of its own: enter it around calls, name steps and branches with `at`.

    Args:
        model: what `compile` returned.
        num_inference_steps: steps of the request as its scheduler counts them,
            ``len(scheduler.timesteps)``, which some policies need.
    """
    return _denoiser(model).new_session(num_inference_steps)


def rows(model: nn.Module, rows: Sequence[Session | Location]) -> Rows:
    """Rows of several requests in one call, each with its own step, slots and decisions.

    ::

        with cachepass.rows(model, [a, b, c.row(sample=0), c.row(sample=1)]):
            model(latents, timesteps, texts)  # row by row

    A session that is listed goes on by one step for each `with` that it was called in; name the
    step with `Session.row` if it is another. The branch of the rows is that of the
    ``model.cache_context("cond")`` around a call, else the call's place in its step.

    Args:
        model: what `compile` returned, with ``lowering="regions"``.
        rows: whose each row is, in the order of the batch.

    Raises:
        SessionError: no rows, one twice, or one of another model; in a call, another number of
            rows than were listed, or rows of one session at different steps.
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
            name: report_of(cached.denoiser, notes=cached.notes())
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
