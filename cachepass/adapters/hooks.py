"""Hooks that accelerate and diffusers put on modules, to move weights as they are needed.

They stand in the place of a module's `forward` and are Python that cannot be captured. One on the
whole model may run around the captured call; those on its layers cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from cachepass.errors import CaptureError

Call = Callable[[Sequence[Any], Mapping[str, Any]], Any]

_HOOK, _OWN = "_hf_hook", "_old_forward"
_MARKS = (_HOOK, "_diffusers_hook")


def around(model: nn.Module, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call of a model with its own `forward`, between the two halves of the hook it carries."""
    state = vars(model)
    hook, hooked = state.get(_HOOK), state.get("forward")
    if hook is None or hooked is None or _OWN not in state:
        return call(args, kwargs)
    args, kwargs = hook.pre_forward(model, *args, **kwargs)
    state["forward"] = state[_OWN]
    try:
        output = call(args, kwargs)
    finally:
        state["forward"] = hooked
    return hook.post_forward(model, output)


def refuse_layers(model: nn.Module) -> None:
    """Raise if a module inside of a model carries a hook.

    Raises:
        CaptureError: says which one, and what to do.
    """
    for path, module in model.named_modules():
        if path and any(vars(module).get(mark) is not None for mark in _MARKS):
            raise CaptureError(
                f"{type(model).__name__}.{path} carries a hook of accelerate or diffusers "
                "(sequential or group offload, for one), which cannot be captured: take hooks off "
                "its layers (pipe.remove_all_hooks()), and move whole models instead "
                "(pipe.enable_model_cpu_offload())"
            )
