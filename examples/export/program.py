"""A cached denoiser as a program of torch.export: saved, loaded and run without cachepass.

    python -m examples.export.program

Makes a video with the pipeline under `cachepass.compile` and one with the program, whose
loop is `run` below: all that a runner has to know.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cachepass
from examples.export.request import Request, generate, listen, relative
from examples.shapes.pipeline import GUIDANCE_SCALE, build_pipeline

PROMPT = "red disc bounce plain"
POLICY = "mixcache"


@torch.no_grad()
def run(program: Any, cold: Any, request: Request) -> tuple[Tensor, int]:
    """Denoise; also says how many calls were reused as a whole."""
    latent, steps, skipped = request.noise, len(request.sigmas) - 1, 0
    kept = dict.fromkeys(request.texts, cold["branch"])
    shared = cold["request"]
    for step in range(steps):
        found = {}
        for number, (branch, text) in enumerate(request.texts.items()):
            made = program(
                hidden_states=latent,
                timestep=1000 * request.sigmas[step : step + 1],
                encoder_hidden_states=text,
                step=torch.tensor(step),
                num_steps=torch.tensor(steps),
                branch=torch.tensor(number),
                state={"branch": kept[branch], "request": shared},
            )
            kept[branch] = kept[branch] | made["state"]["branch"]
            shared = shared | made["state"]["request"]
            found[branch] = made["output"]
            skipped += int(made["reused"]["step"].all())
        velocity = found["uncond"] + GUIDANCE_SCALE * (found["cond"] - found["uncond"])
        latent = latent + (request.sigmas[step + 1] - request.sigmas[step]) * velocity
    return latent, skipped


def main() -> None:
    """Runs the example."""
    pipe: Any = build_pipeline("small")
    request = listen(pipe, PROMPT)
    print("exporting (a quarter of a minute) ...")
    program = cachepass.export(pipe.transformer, request.call(), policy=POLICY)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shapes.pt2")
        torch.export.save(program, path)
        print(f"saved: {path.stat().st_size / 1e6:.1f} MB")
        program = torch.export.load(path)
    print("running ...")
    latent, skipped = run(program.module(), program.example_inputs[1]["state"], request)
    print(f"{skipped} of {2 * (len(request.sigmas) - 1)} calls were skipped")
    wanted = generate(cachepass.compile(pipe, policy=POLICY, inner="eager"), PROMPT)
    print(f"distance to the pipeline under cachepass.compile: {relative(latent, wanted):.1e}")


if __name__ == "__main__":
    main()
