"""Serve prompts that come at random times: requests join and leave a running batch.

    python -m examples.serve

Prints when each video came and when it was done, and what each of their calls reused.
"""

from __future__ import annotations

import functools
import random
import time
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

import cachepass
from cachepass.serve import Batcher, Request
from examples.shapes.model import load
from examples.shapes.pipeline import GUIDANCE_SCALE, build_scheduler, embed_prompts
from examples.shapes.world import FRAMES, SIZE

PROMPTS = (
    "red disc bounce plain", "white cross still stripes", "blue triangle orbit plain",
    "green square spin checker", "yellow disc drift stripes", "magenta disc bounce gradient",
)  # fmt: skip
STEPS = 30
MAX_ROWS = 4


def request(texts: dict[str, Tensor], seed: int) -> Request:
    """One video, from noise to its latent."""
    scheduler: Any = build_scheduler("euler")
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 16, FRAMES, SIZE // 4, SIZE // 4, generator=generator)
    for moment in scheduler.timesteps:
        given = {"hidden_states": latent, "timestep": moment.reshape(1), "return_dict": False}
        v = yield {b: given | {"encoder_hidden_states": text} for b, text in texts.items()}
        guided = v["uncond"] + GUIDANCE_SCALE * (v["cond"] - v["uncond"])
        latent = scheduler.step(guided, moment, latent, return_dict=False)[0]
    return latent


def main() -> None:
    """Runs the example."""
    print("compiling at the first calls: one or two minutes ...", flush=True)
    model: Any = cachepass.compile(load("small"), policy="mixcache")
    pauses = random.Random(0)
    started = time.perf_counter()

    def now() -> str:
        return f"{time.perf_counter() - started:6.1f} s"

    def done(prompt: str, future: Future[Any]) -> None:
        error = future.exception()
        print(f"{now()}  {f'failed, {error!r}' if error else 'done'}: {prompt}", flush=True)

    with Batcher(model, max_rows=MAX_ROWS) as batcher:
        for seed, prompt in enumerate(PROMPTS):
            print(f"{now()}  came: {prompt}", flush=True)
            # Encoded here: a generator runs in the batcher's thread, and others would wait.
            texts = {"cond": embed_prompts([prompt]), "uncond": embed_prompts([""])}
            future = batcher.submit(request(texts, seed), num_inference_steps=STEPS)
            future.add_done_callback(functools.partial(done, prompt))
            time.sleep(pauses.expovariate(1.0))
    print(cachepass.report(model))


if __name__ == "__main__":
    main()
