"""A cached denoiser as an ONNX file, in a pipeline of diffusers.

    python -m examples.export.onnx

Makes a video with the file and one with the file of the same model that caches nothing, both
in onnxruntime. Needs cachepass[onnx].
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import cachepass
from cachepass.onnx import Denoiser
from examples.export.request import generate, listen, relative
from examples.shapes.pipeline import build_pipeline

PROMPT = "red disc bounce plain"


def timed(pipe: Any, prompt: str) -> tuple[Tensor, float]:
    """A latent, and the seconds it took once all is warm."""
    generate(pipe, prompt, 2)
    started = time.perf_counter()
    return generate(pipe, prompt), time.perf_counter() - started


def main() -> None:
    """Runs the example."""
    pipe: Any = build_pipeline("small")
    model, request = pipe.transformer, listen(pipe, PROMPT)
    videos, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for policy in ("compute", "mixcache"):
            print(f"exporting {policy} (half a minute) ...")
            path = Path(folder, f"{policy}.onnx")
            cachepass.export_onnx(model, request.call(), path, policy=policy)
            pipe.transformer = Denoiser(path, scheduler=pipe.scheduler)
            videos[policy], seconds[policy] = timed(pipe, PROMPT)
            skipped = sum("step" in sites for _, _, sites in pipe.transformer.reused)
            print(f"{policy}: {seconds[policy]:.1f} s, {skipped} calls skipped")
    away = relative(videos["mixcache"], videos["compute"])
    print(f"{seconds['compute'] / seconds['mixcache']:.2f}x as fast, {away:.3f} away from uncached")


if __name__ == "__main__":
    main()
