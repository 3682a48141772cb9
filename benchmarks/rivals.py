"""What `benchmarks.peers` compares: methods of several libraries, each behind one face.

A contender is one method with one knob, whose values stand in order, from slow to fast.
Every value gets a pipeline and compiled code of its own, on one set of weights, so that
no setting runs what another one left behind: guards, recompilations, state.

Peers are set up as their documentation says, by their public entry points, at their
defaults but for what is said here. Only what they hold, and what they decided, is looked
for inside of them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import (
    FasterCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
)
from torch import Tensor, nn

import cachepass
from benchmarks.quality import Request, generate
from benchmarks.testbed import plain
from examples.shapes.pipeline import ShapesPipeline, build_pipeline

FULL_STEPS = 50

# (period, first step that may be reused) at 50 steps. Every method that keeps to a fixed
# pace gets the same ones: from which step on is reused matters as much as how often.
PACES = (
    (2, 30), (2, 20), (2, 15), (2, 10), (3, 15), (3, 10),
    (4, 10), (5, 10), (6, 10), (8, 10), (10, 8), (12, 6),
)  # fmt: skip
RANGES = (2, 3, 4, 5, 6, 8, 10)
# The defaults, of 3 and 2, would end at 2.5x.
MAGCACHE_IN_A_ROW = 6


def geometric(low: float, high: float, count: int = 33) -> tuple[float, ...]:
    """Values in equal ratios, rounded to what a person would write."""
    return tuple(float(f"{low * (high / low) ** (i / (count - 1)):.3g}") for i in range(count))


THRESHOLDS = geometric(0.02, 0.95)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders have in common."""

    size: str
    steps: int
    tuning: Request
    """A video to calibrate with."""
    weights: Mapping[str, Tensor] = field(compare=False, repr=False)

    def pipeline(self) -> Any:
        """A pipeline of a class of its own: some peers patch the class they are given."""
        parts = build_pipeline(self.size).components
        # Where weights lie in memory alone makes two equal models differ by some percent.
        parts["transformer"].load_state_dict(self.weights, assign=True)
        # Two peers know models by how the name of the pipeline's class begins.
        pipe = type("WanShapesPipeline", (ShapesPipeline,), {})(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def at(self, step: int) -> int:
        """A step of 50, as one of these steps; never the first."""
        return max(1, round(step * self.steps / FULL_STEPS))

    def paces(self) -> list[tuple[int, int]]:
        """`PACES` for these steps."""
        return [(period, self.at(start)) for period, start in PACES]


@dataclass(kw_only=True)
class Contender:
    """A pipeline with a method in it."""

    pipe: Any
    held: Callable[[], object] = lambda: None
    """Where the tensors are that it keeps, asked at the end of a step."""
    reused: Callable[[], dict[str, bool]] = dict
    """Whether the call of each branch was skipped in the step that just ended."""
    regions: Callable[[], int] = lambda: 0
    """What it compiled that dynamo does not count."""


Grid = Sequence[Any] | Callable[[Setting], Sequence[Any]]


@dataclass(frozen=True)
class Entry:
    """How to make a contender."""

    side: Literal["baseline", "peer", "ours"]
    build: Callable[[Setting, Any], Contender]
    knob: str = ""
    values: Grid = (None,)
    note: str = ""

    def grid(self, setting: Setting) -> Sequence[Any]:
        """The values of its knob, from slow to fast."""
        return self.values(setting) if callable(self.values) else self.values


def bytes_held(root: object) -> int:
    """Size of all tensors that can be reached from an object, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(root)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(root: object) -> Iterator[Tensor]:
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif not isinstance(item, nn.Module) and not callable(item):
            todo += getattr(item, "__dict__", {}).values()


# --- the model without a cache ---------------------------------------------------------


def _uncached(setting: Setting, _: Any) -> Contender:
    return Contender(pipe=setting.pipeline())


def compiled(setting: Setting, _: Any = None) -> Contender:
    """Plain torch.compile: what every speedup is over."""
    return Contender(pipe=_whole(setting.pipeline()))


def _whole(pipe: Any) -> Any:
    pipe.transformer = plain(pipe.transformer)
    return pipe


# --- diffusers -------------------------------------------------------------------------


def _hooks(config: Callable[[Setting, Any, Any], Any]) -> Callable[[Setting, Any], Contender]:
    """Contenders of `enable_cache`, by the config for (setting, value, pipeline)."""

    def build(setting: Setting, value: Any) -> Contender:
        pipe = setting.pipeline()
        model = pipe.transformer
        model.enable_cache(config(setting, value, pipe))
        registries = [vars(module).get("_diffusers_hook") for module in model.modules()]
        hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
        return Contender(pipe=_whole(pipe), held=lambda: hooks)

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
def _magnitudes(setting: Setting) -> list[float]:
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
        mag_ratios=_magnitudes(setting),
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


_SHARED_COUNT = "counts calls, not steps: both guidance calls share what it keeps"


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
            _whole(pipe)
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
        pipe=_whole(pipe), held=lambda: utils.get_current_cache_context(), reused=reused
    )


# --- cachepass -------------------------------------------------------------------------


def mixcache_fields(value: float) -> dict[str, Any]:
    """One tolerance for all that is compared with a threshold."""
    usual = cachepass.MixCache()
    shortest, longest = usual.interval
    return {
        "trigger": usual.trigger * value,
        "shorten": usual.shorten * value,
        "lengthen": usual.lengthen * value,
        "latest_start": min(1.0, usual.latest_start / value),
        "interval": (shortest, max(longest, round(longest * value))),
    }


def adacache_fields(value: float) -> dict[str, Any]:
    """The codebook for changes `value` times as large, with longer rates above 1."""
    *entries, (bound, rate) = cachepass.AdaCache().codebook
    scaled = [(b * value, round(r * max(1.0, value))) for b, r in entries]
    return {"codebook": (*scaled, (max(bound, 2 * scaled[-1][0]), rate))}


def _threshold(warmup: int) -> Callable[[Any, Setting], dict[str, Any]]:
    return lambda value, setting: {"threshold": value, "warmup_steps": setting.at(warmup)}


def _dbcache(value: float, setting: Setting) -> dict[str, Any]:
    return {"threshold": value, "front": 1, "warmup_steps": setting.at(8)}


def _our_magcache(value: float, setting: Setting) -> dict[str, Any]:
    ratios = tuple(_magnitudes(setting))
    return {"threshold": value, "ratios": ratios, "max_in_a_row": MAGCACHE_IN_A_ROW}


def _schedule(value: tuple[int, int], setting: Setting) -> dict[str, Any]:
    period, start = value
    every = cachepass.Schedule.every(period, steps=setting.steps, granularity="step", start=start)
    return {"reuse": dict(every.reuse)}


@dataclass(frozen=True)
class Dial:
    """A policy of ours: the name of its knob, the knob's values, the fields that one sets."""

    knob: str
    values: Grid
    fields: Callable[[Any, Setting], dict[str, Any]]
    policy: str = ""
    """Its name in `cachepass.policies()`, if the contender has another one."""


# One line for each contender of ours.
DIALS = {
    "mixcache": Dial("tolerance", geometric(0.25, 8), lambda v, _: mixcache_fields(v)),
    "adacache": Dial("scale of the codebook", geometric(0.25, 8), lambda v, _: adacache_fields(v)),
    "firstblock": Dial("threshold", THRESHOLDS, _threshold(10)),
    "teacache": Dial("threshold", geometric(0.01, 2), _threshold(10)),
    "schedule": Dial("period, start", Setting.paces, _schedule),
    "dbcache": Dial("threshold", THRESHOLDS, _dbcache),
    "easycache": Dial("threshold", geometric(0.005, 1), _threshold(10)),
    "dicache": Dial("threshold", geometric(0.02, 4), _threshold(10)),
    "magcache": Dial("threshold", geometric(0.005, 2), _our_magcache),
    "taylorseer": Dial(
        "interval, start", Setting.paces, lambda v, _: {"interval": v[0], "warmup_steps": v[1]}
    ),
    "pab": Dial("range", RANGES, lambda v, _: {"self_attention": v, "cross": v}),
    "fastercache": Dial("range", RANGES, lambda v, _: {"attention_period": v, "cfg_period": v}),
}


def cached(setting: Setting, policy: Any, options: dict[str, Any] | None = None) -> Contender:
    """A pipeline under a policy of ours."""
    pipe = cachepass.compile(setting.pipeline(), policy=policy, options=options)

    def regions() -> int:
        count: int = cachepass.report(pipe).to_dict()["compiles"]["regions"]
        return count

    return Contender(pipe=pipe, regions=regions)


def _ours(name: str, dial: Dial) -> Entry:
    def build(setting: Setting, value: Any) -> Contender:
        return cached(setting, dial.policy or name, dial.fields(value, setting))

    return Entry("ours", build, dial.knob, dial.values)


def without_dial() -> list[str]:
    """Policies of ours that nobody gave a knob here."""
    known = {dial.policy or name for name, dial in DIALS.items()}
    return sorted({*cachepass.policies()} - known - {"compute"})


_SHARED = "counts calls, not steps: what it keeps of one guidance call, the other one gets"


def entries() -> dict[str, Entry]:
    """All contenders by name."""
    table = {
        "eager": Entry("baseline", _uncached),
        "plain again": Entry("baseline", compiled, note="the null"),
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
    return table | {f"cachepass {name}": _ours(name, dial) for name, dial in DIALS.items()}
