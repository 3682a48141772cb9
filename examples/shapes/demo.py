"""Generates videos uncached and cached, side by side: the place to start.

    python -m examples.shapes.demo

Builds one pipeline under plain `torch.compile` and one under `cachepass.compile`,
gives both the same prompts and noise, and shows what the cache saved and what it
cost: a table, a film strip and an animation.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cachepass
from examples.shapes.progress import StatusLine

if TYPE_CHECKING:
    from examples.shapes.pipeline import ShapesPipeline

# From no motion to much: not all videos can be cached equally well.
PROMPTS = (
    "blue square still gradient",
    "green triangle spin checker",
    "yellow cross orbit stripes",
    "red disc bounce plain",
)
WARMUP_STEPS = 2
NEEDED = ("diffusers", "transformers", "safetensors", "PIL", "numpy")

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generated video."""

    video: torch.Tensor
    """(8, 3, 64, 64), RGB in [0, 1]."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt, generated both ways."""

    prompt: str
    uncached: Run
    cached: Run
    calls: dict[str, int]
    """Calls of the transformer by what became of them; see `calls_by_granularity`."""
    psnr: float
    ssim: float

    @property
    def speedup(self) -> float:
        """How many times as fast the cached run was."""
        return self.uncached.seconds / self.cached.seconds


def calls_by_granularity(pipe: ShapesPipeline) -> dict[str, int]:
    """Counts the calls of the last request: computed whole, or what was reused.

    Returns:
        Calls by what was reused, `compute` where nothing was.
    """
    report: dict[str, Any] = cachepass.report(pipe).to_dict()
    calls: dict[str, int] = report["requests"][-1]["calls"]
    return calls


def generate(pipe: ShapesPipeline, prompt: str, options: argparse.Namespace, report: Report) -> Run:
    """Generates one video and tells `report` of each step."""

    def on_step_end(
        _pipe: object, step: int, _timestep: object, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        report(f"step {step + 1}/{options.steps}")
        return tensors

    start = time.perf_counter()
    frames = pipe(
        prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
        callback_on_step_end=on_step_end,
    ).frames
    video = frames[0].cpu()  # on a GPU this waits until the work is done
    return Run(video=video, seconds=time.perf_counter() - start)


def warm_up(pipe: ShapesPipeline, options: argparse.Namespace) -> float:
    """Generates a video of two steps, so that all is compiled; returns seconds."""
    short = argparse.Namespace(**{**vars(options), "steps": WARMUP_STEPS})
    with warnings.catch_warnings():
        # Two steps leave nothing to reuse, of which the library rightly warns.
        warnings.simplefilter("ignore")
        return generate(pipe, options.prompts[0], short, lambda _: None).seconds


def compare(
    uncached: ShapesPipeline,
    cached: ShapesPipeline,
    options: argparse.Namespace,
    status: StatusLine,
) -> list[Comparison]:
    """Generates every prompt both ways.

    In turns, so that whatever else the machine does weighs on both alike.
    """
    from examples.shapes.quality import psnr, ssim

    def show(where: str, what: str) -> None:
        status.update(f"{where}, {what}")

    results = []
    for i, prompt in enumerate(options.prompts):
        where = f"prompt {i + 1}/{len(options.prompts)}, {prompt}"
        plain = generate(uncached, prompt, options, partial(show, f"{where}: uncached"))
        fast = generate(cached, prompt, options, partial(show, f"{where}: cached"))
        results.append(
            Comparison(
                prompt=prompt,
                uncached=plain,
                cached=fast,
                calls=calls_by_granularity(cached),
                psnr=psnr(fast.video, plain.video),
                ssim=ssim(fast.video, plain.video),
            )
        )
    return results


def table(results: Sequence[Comparison]) -> str:
    """Lays the figures out, one line per prompt and one for all of them."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.calls))
    width = max(len(result.prompt) for result in results)
    header = f"{'':{width}}  uncached   cached  speedup   PSNR dB   SSIM"
    lines = [header + "".join(f"  {kind:>7}" for kind in kinds)]
    for result in results:
        lines.append(
            f"{result.prompt:{width}}  {result.uncached.seconds:6.2f} s"
            f" {result.cached.seconds:6.2f} s  {result.speedup:6.2f}x"
            f"  {result.psnr:8.1f}  {result.ssim:5.3f}"
            + "".join(f"  {result.calls.get(kind, 0):7}" for kind in kinds)
        )
    slow = sum(result.uncached.seconds for result in results)
    fast = sum(result.cached.seconds for result in results)
    lines.append(f"{'all':{width}}  {slow:6.2f} s {fast:6.2f} s  {slow / fast:6.2f}x")
    return "\n".join(lines)


def draw(results: Sequence[Comparison], out: Path) -> tuple[Path, Path]:
    """Writes the film strip and the animation; returns their paths."""
    from examples.shapes.film import Scene, Take, film_strip, save_animation

    scenes = [
        Scene(
            title=result.prompt,
            takes=(
                Take(
                    lines=("uncached", f"{result.uncached.seconds:.1f} s"),
                    video=result.uncached.video,
                ),
                Take(
                    lines=(
                        "cached",
                        f"{result.cached.seconds:.1f} s",
                        f"{result.speedup:.2f}x",
                        f"{result.psnr:.1f} dB",
                    ),
                    video=result.cached.video,
                ),
            ),
        )
        for result in results
    ]
    out.mkdir(parents=True, exist_ok=True)
    strip, animation = out / "film.png", out / "film.gif"
    film_strip(scenes).save(strip)
    save_animation(scenes, animation)
    return strip, animation


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"The demo runs a diffusers pipeline, for which {', '.join(missing)} is "
            "missing here. Install what it needs with\n"
            '    pip install "cachepass[diffusers]"\n'
            'or, in a checkout,\n    pip install -e ".[diffusers]"'
        )
    from examples.shapes.pipeline import build_pipeline
    from examples.shapes.world import parse_prompt

    for prompt in options.prompts:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            sys.exit(str(error))

    pipes = [build_pipeline(options.size, options.scheduler) for _ in range(2)]
    for pipe in pipes:
        pipe.to(options.device)
        pipe.set_progress_bar_config(disable=True)
    uncached, cached = pipes
    uncached.transformer = torch.compile(uncached.transformer)
    cached = cachepass.compile(cached, policy=options.policy)

    status = StatusLine()
    status.update("compiling: torch.compile (a minute or so)")
    plain = warm_up(uncached, options)
    status.update("compiling: cachepass.compile (a minute or so)")
    fast = warm_up(cached, options)
    status.clear()
    print(
        f"{options.size} transformer on {options.device}, {options.steps} steps of "
        f"{options.scheduler}, guidance {options.guidance:g}, policy {options.policy}\n"
        f"compiled and run for {WARMUP_STEPS} steps: torch.compile {plain:.1f} s, "
        f"cachepass.compile {fast:.1f} s (not in the times below)\n"
    )
    results = compare(uncached, cached, options, status)
    status.clear()
    print(table(results))
    strip, animation = draw(results, options.out)
    print(f"\nfilm strip: {strip}\nanimation:  {animation}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes.demo",
        description="Generate videos uncached and cached, and compare them.",
    )
    parser.add_argument("--policy", default="mixcache", help="see cachepass.policies()")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--scheduler", choices=("euler", "unipc"), default="euler")
    parser.add_argument("--size", choices=("large", "small"), default="large")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
