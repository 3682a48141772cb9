"""From dynamo's graph to a program: capture, then passes, then lowering, read top to bottom."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from cachepass import capture
from cachepass.errors import CachePassError, PolicyError
from cachepass.lowering.compiler import RegionCompiler
from cachepass.lowering.graph import GraphCompiler
from cachepass.lowering.regions import lower
from cachepass.lowering.shapes import plan_of
from cachepass.observe import dump_to
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.denoiser import Denoiser
from cachepass.runtime.policies import for_model, resolve
from cachepass.runtime.program import Driver, Program

Inner = Literal["inductor", "eager"]


def dump_folder() -> str | None:
    """Where graphs are dumped if nobody says it in code."""
    return os.environ.get("CACHEPASS_DUMP") or None


def backend_of(
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
            driver = Driver(gm.forward)
        else:
            driver = lower(gm, args, compiler)
        denoiser.regions, denoiser.compile_seconds = compiler.count, compiler.seconds
        if denoiser.storage.max_bytes is None:
            return driver
        plan = plan_of(gm, args, denoiser.storage, denoiser.policy.name)
        return dataclasses.replace(driver, plan=plan)

    def cachepass(captured: fx.GraphModule, _: Sequence[Any]) -> Program:
        gm = capture.own_graph(captured, parameters)
        policy = denoiser.policy
        passes = default_pipeline(policy.sites, policy.signals())
        number = len(denoiser.programs)  # a new shape may be a new graph
        observers = []
        if dump is not None:
            observers = [dump_to(pathlib.Path(dump, f"graph{number}") if number else dump)]
        try:
            result = run_passes(gm, passes, observers=observers)
        except CachePassError as error:
            if capture.sized_by_data(gm):
                raise capture.SizedByDataError(str(error)) from error
            raise
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
    backend = backend_of(denoiser, RegionCompiler(), "inductor", dump_folder(), ())
    program = backend(gm, example_inputs)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise CachePassError(
                "gradients are on: cachepass is for inference, and a reused value has no "
                "gradient. Call the model under torch.no_grad()"
            )
        return program(*args)

    return call
