"""What a policy will keep of a request, from shapes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config

from cachepass import capture
from cachepass.lowering.shapes import plan_of
from cachepass.moe.shadow import Shadow
from cachepass.pass_manager import run_passes
from cachepass.passes import default_pipeline
from cachepass.runtime.batch import in_front
from cachepass.runtime.guidance import rows_among
from cachepass.runtime.plan import Plan
from cachepass.runtime.policies import AnyPolicy, for_model, resolve
from cachepass.runtime.storage import Storage


def plan(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    policy: str | os.PathLike[str] | AnyPolicy = "mixcache",
    options: dict[str, Any] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """What a policy keeps on a model: nothing is computed, so both may be on the meta device.

    ::

        with torch.device("meta"):
            model = WanTransformer3DModel(...)  # 14B: no memory is taken
            inputs = {"hidden_states": torch.empty(1, 16, 21, 90, 160), ...}
        print(cachepass.plan(model, inputs, policy="mixcache"))

    Args:
        model: a diffusion transformer, not compiled.
        example_inputs: keyword arguments of one call.
        policy: as in `compile`.
        options: as in `compile`.
        cache_dtype: as in `compile`.

    Raises:
        CaptureError: the call cannot be captured.
    """
    chosen = for_model(resolve(policy, options), model)
    rows = rows_among(example_inputs)
    # As where it is compiled: the number of rows is open, if there are several.
    several = {n: {0: None} for n, v in example_inputs.items() if rows > 1 and in_front(v, rows)}
    with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # added late
        gm, args = capture.capture_call(Shadow(model).module, example_inputs, several)
    gm = run_passes(gm, default_pipeline(chosen.sites, chosen.signals())).graph_module
    return plan_of(gm, args, Storage(dtype=cache_dtype), chosen.name)
