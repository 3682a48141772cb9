"""The peers: diffusers' hooks, cache-dit and ParaAttention, as contenders.

They are set up as their documentation says, by their public entry points, at their
defaults but for what is said here. Only what they hold, and what they decided, is looked
for inside of them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import (
    FasterCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
)

from benchmarks.contender import (
    MAGCACHE_IN_A_ROW,
    RANGES,
    THRESHOLDS,
    Contender,
    Entry,
    Setting,
    compile_whole,
    geometric,
)
from benchmarks.quality import generate

# --- diffusers -------------------------------------------------------------------------


def _hooks(config: Callable[[Setting, Any, Any], Any]) -> Callable[[Setting, Any], Contender]:
    """Contenders of `enable_cache`, by the config for (setting, value, pipeline)."""

    def build(setting: Setting, value: Any) -> Contender:
        pipe = setting.pipeline()
        model = pipe.transformer
        model.enable_cache(config(setting, value, pipe))
        registries = [vars(module).get("_diffusers_hook") for module in model.modules()]
        hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
        return Contender(pipe=compile_whole(pipe), held=lambda: hooks)

    return build


def _first_block(setting: Setting, value: Any) -> Contender:
    contender = _hooks(lambda _, v, __: FirstBlockCacheConfig(threshold=v))(setting, value)
    registry = contender.pipe.transformer.blocks[0]._diffusers_hook
    states = registry.get_hook("fbc_leader_block_hook").state_manager

    def reused() -> dict[str, bool]:
        return {name: not state.should_compute for name, state in states._state_cache.items()}

    contender.reused = reused
    return contender


@functools.cache
def magnitudes(setting: Setting) -> list[float]:
    """MagCache's ratios for this model: its calibration prints them, a list per branch."""
    pipe = setting.pipeline()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=setting.steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        generate(pipe, setting.tuning, setting.steps)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[1")]
    # The config has room for one list: that of the first call, the conditional one.
    ratios: list[float] = ast.literal_eval(lists[0])
    return ratios


def _magcache(setting: Setting, value: Any, _: Any) -> MagCacheConfig:
    return MagCacheConfig(
        threshold=value,
        max_skip_steps=MAGCACHE_IN_A_ROW,
        num_inference_steps=setting.steps,
        mag_ratios=magnitudes(setting),
    )


def _seacache(setting: Setting, value: Any, _: Any) -> SeaCacheConfig:
    return SeaCacheConfig(
        threshold=value,
        retention_steps=setting.at(10),
        # The default of 2 would end below 3x.
        max_consecutive_cached=6,
    )


def _taylorseer(_: Setting, value: Any, __: Any) -> TaylorSeerCacheConfig:
    period, start = value
    return TaylorSeerCacheConfig(
        cache_interval=period,
        disable_cache_before_step=start,
        taylor_factors_dtype=torch.float32,
        # The default looks for attention by names that no module of Wan has.
        use_lite_mode=True,
    )


def _pab(_: Setting, value: Any, pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=value,
        cross_attention_block_skip_range=value,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _fastercache(_: Setting, value: Any, pipe: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=value,
        # The cache of the unconditional output needs both branches in one batch.
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


# --- cache-dit -------------------------------------------------------------------------


def _cache_dit(
    *, whole: bool, forecast: bool = False, masked: bool = False
) -> Callable[[Setting, Any], Contender]:
    def build(setting: Setting, value: Any) -> Contender:
        import cache_dit

        pipe = setting.pipeline()
        model = pipe.transformer
        how = (
            {"steps_computation_mask": list(value), "steps_computation_policy": "static"}
            if masked
            else {"residual_diff_threshold": value}
        )
        config = cache_dit.DBCacheConfig(
            # The default of 8 blocks that always run is meant for 40 and more.
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=setting.at(8),
            **how,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if forecast else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        manager, [name] = model._context_manager, model._context_names
        if whole:
            compile_whole(pipe)
        else:
            model.compile_repeated_blocks()

        def reused() -> dict[str, bool]:
            context = manager.get_context(name)
            step = context.get_current_step()
            return {
                "cond": step in context.get_cached_steps(),
                "uncond": step in context.get_cfg_cached_steps(),
            }

        return Contender(pipe=pipe, held=lambda: manager.get_context(name), reused=reused)

    return build


def _masks(setting: Setting) -> list[tuple[int, ...]]:
    """Its own masks and those of `PACES`, by how much they compute."""
    import cache_dit

    steps = setting.steps
    masks = [
        cache_dit.steps_mask(
            compute_bins=[start] + [1] * steps, cache_bins=[period - 1] * steps, total_steps=steps
        )
        for period, start in setting.paces()
    ]
    for mask in masks:
        mask[-1] = 1  # as in its own
    if steps >= 8:  # below, it has some for 4 and 6 steps only
        own = ("slow", "medium", "fast", "ultra")
        masks += [cache_dit.steps_mask(total_steps=steps, mask_policy=policy) for policy in own]
    return sorted({tuple(mask) for mask in masks}, key=lambda mask: (-sum(mask), mask))


# --- ParaAttention ---------------------------------------------------------------------


def _para_attn(setting: Setting, value: Any) -> Contender:
    from para_attn.first_block_cache import utils
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe

    pipe = setting.pipeline()
    apply_cache_on_pipe(pipe, residual_diff_threshold=value, warmup_steps=setting.at(10))
    last: dict[str, object] = {}

    def reused() -> dict[str, bool]:
        # It keeps no record; a call that computes puts a new tensor in place.
        buffers = utils.get_current_cache_context().buffers
        key = "first_hidden_states_residual"
        now = {"cond": buffers.get(key), "uncond": buffers.get(f"{key}_alter")}
        same = {branch: last.get(branch) is tensor for branch, tensor in now.items()}
        last.update(now)
        return same

    return Contender(
        pipe=compile_whole(pipe), held=lambda: utils.get_current_cache_context(), reused=reused
    )


_SHARED = "counts calls, not steps: what it keeps of one guidance call, the other one gets"


def entries() -> dict[str, Entry]:
    """The peers by name."""
    table = {
        "diffusers First-Block": Entry("peer", _first_block, "threshold", THRESHOLDS),
        "diffusers MagCache": Entry("peer", _hooks(_magcache), "threshold", geometric(0.005, 2)),
        "diffusers SeaCache": Entry("peer", _hooks(_seacache), "threshold", geometric(0.01, 2)),
        "diffusers TaylorSeer": Entry(
            "peer", _hooks(_taylorseer), "interval, start", Setting.paces
        ),
        "diffusers PAB": Entry("peer", _hooks(_pab), "range", RANGES, _SHARED),
        "diffusers FasterCache": Entry("peer", _hooks(_fastercache), "range", RANGES, _SHARED),
        "ParaAttention First-Block": Entry("peer", _para_attn, "threshold", THRESHOLDS),
    }
    for how, whole in (("regional", False), ("whole", True)):
        dbcache, taylor = (_cache_dit(whole=whole, forecast=forecast) for forecast in (False, True))
        mask = _cache_dit(whole=whole, masked=True)
        table[f"cache-dit DBCache {how}"] = Entry("peer", dbcache, "threshold", THRESHOLDS)
        table[f"cache-dit DBCache+Taylor {how}"] = Entry("peer", taylor, "threshold", THRESHOLDS)
        table[f"cache-dit mask {how}"] = Entry("peer", mask, "mask", _masks)
    return table
