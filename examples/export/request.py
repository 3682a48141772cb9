"""What a pipeline asks of its denoiser, written down: the inputs of programs and their examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from examples.shapes.pipeline import GUIDANCE_SCALE

STEPS = 50


@dataclasses.dataclass(frozen=True)
class Request:
    """One video of the shapes example."""

    noise: Tensor
    """(1, channels, frames, height, width)"""
    texts: dict[str, Tensor]
    """Branch of guidance -> (1, words, width)"""
    sigmas: Tensor
    """(steps + 1,), from 1 to 0; timesteps are 1000 times as large."""

    def call(self, branch: str = "cond") -> dict[str, Any]:
        """Keyword arguments of the first call of a branch."""
        return {
            "hidden_states": self.noise,
            "timestep": 1000 * self.sigmas[:1],
            "encoder_hidden_states": self.texts[branch],
            "return_dict": False,
        }


def generate(pipe: Any, prompt: str, steps: int = STEPS, **options: Any) -> Tensor:
    """The latent of a video, from noise that depends on nothing else."""
    pipe.set_progress_bar_config(disable=True)
    frames: Tensor = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).frames
    return frames


def listen(pipe: Any, prompt: str, steps: int = STEPS, **options: Any) -> Request:
    """What the pipeline would ask for: the calls of one step are heard, the rest is left."""
    heard: list[dict[str, Any]] = []

    def hear(_: object, __: object, given: dict[str, Any]) -> None:
        heard.append(given)

    def stop(pipe: Any, *_: object) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    hook = pipe.transformer.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        generate(pipe, prompt, steps, callback_on_step_end=stop, **options)
    finally:
        hook.remove()
    cond, uncond = heard
    return Request(
        noise=cond["hidden_states"],
        texts={
            "cond": cond["encoder_hidden_states"],
            "uncond": uncond["encoder_hidden_states"],
        },
        sigmas=pipe.scheduler.sigmas.clone(),
    )


def relative(a: Tensor, b: Tensor) -> float:
    """The distance of two tensors over the size of the second."""
    return float((a - b).norm() / b.norm())
