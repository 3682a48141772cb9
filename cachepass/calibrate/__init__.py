"""Fit a policy's numbers to a model: `calibrate` runs the pipeline and returns a `Profile`.

Every fit measures requests that compute everything (or, for thresholds of signals that caching
itself changes, requests under the policy), on the user's own pipeline, which is as before
afterwards.
"""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from cachepass.adapters import diffusers as pipelines
from cachepass.calibrate.adacache import fit_adacache
from cachepass.calibrate.influence import fit_mixcache
from cachepass.calibrate.magcache import fit_magcache
from cachepass.calibrate.runs import Fitted, Runs, untouched
from cachepass.calibrate.teacache import fit_teacache
from cachepass.calibrate.threshold import fit_threshold
from cachepass.errors import CachePassError, PolicyError
from cachepass.runtime.policies import Profile, named, policies
from cachepass.runtime.policies.profile import described, versions
from cachepass.runtime.policy import NamedPolicy

Fit = Callable[[Runs, Any, float | None], Fitted]

_FITS: Mapping[str, tuple[Fit, tuple[str, ...]]] = {
    "teacache": (fit_teacache, ("coefficients",)),
    "magcache": (fit_magcache, ("ratios", "uncond_ratios")),
    "adacache": (fit_adacache, ("motion_scale",)),
    "mixcache": (fit_mixcache, ("influence",)),
}
"""Policy -> its fit, and the fields that it always sets."""

_OURS = ("prompt", "num_inference_steps", "generator", "output_type", "return_dict")
"""Arguments of the pipeline's call that calibration gives."""


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    policy: str = "teacache",
    options: Mapping[str, Any] | None = None,
    num_inference_steps: int = 50,
    seed: int = 0,
    rate: float | None = None,
    progress: bool = True,
    call_options: Mapping[str, Any] | None = None,
) -> Profile:
    """Fit a policy to a pipeline's model, and to a wished amount of work.

    =============== =============================== ===========================
    policy          always fitted                   with `rate`
    =============== =============================== ===========================
    ``teacache``    `coefficients`                  `threshold`
    ``magcache``    `ratios`, `uncond_ratios`       `threshold`
    ``adacache``    `motion_scale`                  the bounds of `codebook`
    ``mixcache``    `influence`                     (an error)
    with threshold  nothing (an error)              `threshold`
    =============== =============================== ===========================

    Args:
        pipe: a diffusers pipeline, not compiled. It is as before afterwards, whatever happens.
        prompts: what to measure; the i-th one starts from the noise of ``seed + i``.
        policy: name of the policy.
        options: fields of the policy that are not fitted.
        num_inference_steps: steps of each request. Most numbers belong to a number of steps.
        seed: of the noise that requests start from.
        rate: the wished share of computed steps, above 0 and below 1; of policies that run
            some blocks in each call, the share of computed blocks.
        progress: show a bar over all runs on stderr, where tqdm is installed.
        call_options: further arguments of the pipeline's call, such as `height`.

    Returns:
        What was fitted, ready for ``compile(pipe, policy=profile)``.

    Raises:
        PolicyError: an argument is out of its range, there is nothing to fit, or the policy
            cannot reach the rate.
        CachePassError: `pipe` is no pipeline, or is compiled.
    """
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    _check_arguments(given, num_inference_steps, rate, call_options or {})
    base = named(policy, options)
    fit = _fit_of(base, rate, options or {})
    models = _models(pipe)
    runs = Runs(
        pipe=pipe,
        prompts=given,
        num_inference_steps=num_inference_steps,
        seed=seed,
        call_options=dict(call_options or {}),
        title=f"calibrate {policy}" if progress else None,
    )
    with untouched(pipe, models), warnings.catch_warnings():
        # Requests that only measure reuse nothing.
        warnings.filterwarnings("ignore", message="policy .* reused nothing")
        with runs:
            fitted = fit(runs, base, rate)
    return Profile(
        policy=policy,
        fields={**(options or {}), **fitted.fields},
        model=described(models[0]),
        scheduler=described(pipe.scheduler),
        num_inference_steps=num_inference_steps,
        prompts=len(given),
        versions=versions(),
        measured=fitted.measured,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _check_arguments(
    prompts: Sequence[str], steps: int, rate: float | None, call_options: Mapping[str, Any]
) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise PolicyError(
            f"calibrate(`prompts`={list(prompts)!r}): must be one string or several, at least one"
        )
    if steps < 2:
        raise PolicyError(f"calibrate(`num_inference_steps`={steps}): must be at least 2")
    if rate is not None and not 0 < rate < 1:
        raise PolicyError(
            f"calibrate(`rate`={rate!r}): must be a share of computed steps above 0 and below 1"
        )
    taken = [name for name in call_options if name in _OURS]
    if taken:
        raise PolicyError(
            f"calibrate(`call_options`=...): holds {taken}, which calibration gives itself: leave "
            "it out, and use `prompts`, `num_inference_steps` and `seed`"
        )


def _fit_of(base: NamedPolicy, rate: float | None, options: Mapping[str, Any]) -> Fit:
    if base.name in _FITS:
        fit, sets = _FITS[base.name]
    elif _has_threshold(base):
        fit, sets = fit_threshold, ()
        if rate is None:
            raise PolicyError(
                f"policy {base.name!r} has nothing to fit but its `threshold`: say with `rate` "
                "which share of the work is to be computed, such as rate=0.5"
            )
    else:
        able = [name for name, kind in policies().items() if name in _FITS or _has_threshold(kind)]
        raise PolicyError(
            f"policy {base.name!r} has nothing to fit: choose one of {', '.join(sorted(able))}"
        )
    if rate is not None and _has_threshold(base):
        sets += ("threshold",)
    both = [name for name in sets if name in options]
    if both:
        raise PolicyError(
            f"calibrate(`options`=...): holds {both}, which calibration fits: leave it out"
        )
    return fit


def _has_threshold(policy: NamedPolicy | type[NamedPolicy]) -> bool:
    return "threshold" in (field.name for field in dataclasses.fields(policy))


def _models(pipe: Any) -> list[Any]:
    """The denoisers of a pipeline, all of one kind."""
    if isinstance(pipe, nn.Module):
        raise CachePassError(
            "calibrate runs whole requests: give it the pipeline, not the model "
            f"({type(pipe).__name__})"
        )
    found = pipelines.denoisers(pipe)
    for name, module in found.items():
        if getattr(module, "_orig_mod", None) is not None:  # by torch.compile, or by us
            raise CachePassError(
                f"`{name}` of this pipeline is compiled already: calibrate the plain pipeline "
                "(cachepass.restore(pipe) takes cachepass off)"
            )
    kinds = [described(module) for module in found.values()]
    if not kinds:
        raise CachePassError(
            f"{type(pipe).__name__} holds no denoiser: looked for a component whose forward takes "
            f"`timestep`, found {sorted(pipe.components)}"
        )
    if any(kind != kinds[0] for kind in kinds):
        raise CachePassError(
            f"{type(pipe).__name__} holds denoisers that differ ({', '.join(found)}), and a "
            "profile is of one model: calibrate a pipeline that holds one of them"
        )
    return list(found.values())
