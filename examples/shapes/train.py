"""Trains a transformer of this world, or trains one on.

    python -m examples.shapes.train --size small --minutes 14 --out weights
    python -m examples.shapes.train --size small --minutes 60 --resume

Flow matching: a latent video z and noise n give x = (1 - s) z + s n, from which the
transformer predicts n - z, told the timestep 1000 s and the caption. What is saved is
a running mean of the weights (EMA).
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from examples.shapes import model as models
from examples.shapes.codec import CHANNELS, PATCH, PatchCodec
from examples.shapes.progress import StatusLine
from examples.shapes.world import (
    CAPTION_WORDS,
    FRAMES,
    SIZE,
    TEXT_DIM,
    embed_caption,
    render,
    sample_caption,
)

PEAK_LEARNING_RATE = {"large": 2e-3, "small": 3e-3}
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.997
WARMUP_STEPS = 100
SAVE_EVERY_S = 300.0
CODEC_VIDEOS = 200


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rendered videos as the transformer sees them."""

    latents: torch.Tensor
    """(videos, 16, 8, 16, 16), bfloat16: half the memory, far below the noise added."""
    captions: torch.Tensor
    """(videos, 4, 64), float32."""


def render_examples(
    count: int, codec: PatchCodec | None, seed: int, status: StatusLine
) -> tuple[Examples, PatchCodec]:
    """Renders videos and encodes them, with a codec fitted to the first if None."""
    rng = np.random.default_rng(seed)
    side = SIZE // PATCH
    latents = torch.empty(count, CHANNELS, FRAMES, side, side, dtype=torch.bfloat16)
    captions = torch.empty(count, CAPTION_WORDS, TEXT_DIM)
    for start in range(0, count, CODEC_VIDEOS):
        stop = min(start + CODEC_VIDEOS, count)
        status.update(f"rendering {start}/{count} videos")
        videos = []
        for i in range(start, stop):
            caption = sample_caption(rng)
            videos.append(render(caption, rng))
            captions[i] = embed_caption(caption)
        pixels = torch.from_numpy(np.stack(videos)).movedim(-1, 1) * 2 - 1
        codec = codec or PatchCodec.fit(pixels)
        latents[start:stop] = codec.encode(pixels)
    assert codec is not None, "count is positive"
    return Examples(latents=latents, captions=captions), codec


class Trainer:
    """A transformer, its optimisers and the running mean of its weights."""

    def __init__(self, size: str, resume: Path | None, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = models.load(size, path=resume) if resume else models.build(size)
        self.model.to(device).train()
        self.mean = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.steps = 0
        self.loss = math.nan
        self._peak = PEAK_LEARNING_RATE[size] * (0.3 if resume else 1)
        # Muon is for matrices that map features to features. Those outside the blocks
        # touch text, time or latents, where AdamW does better.
        matrices = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if "blocks" in name and parameter.ndim == 2
        }
        others = [p for n, p in self.model.named_parameters() if n not in matrices]
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                list(matrices.values()),
                weight_decay=0.01,
                # Scales Muon's updates like AdamW's, so that one rate serves both.
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, examples: Examples, batch: int, fraction: float) -> None:
        """Takes one step.

        Args:
            examples: What to draw from.
            batch: Videos to draw.
            fraction: How much of the training is over, in [0, 1].
        """
        self._set_rate(fraction)
        loss = self._loss(examples, batch)
        for optimiser in self._optimisers:
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
        # Shorter at first, else the mean would long remember the first weights.
        decay = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
        for name, value in self.model.state_dict().items():
            self.mean[name].lerp_(value, 1 - decay)
        value = loss.item()
        self.loss = value if self.steps == 0 else 0.98 * self.loss + 0.02 * value
        self.steps += 1

    def save(self, path: Path) -> None:
        """Writes the mean of the weights, bfloat16."""
        weights = {
            name: value.to("cpu", torch.bfloat16).contiguous() for name, value in self.mean.items()
        }
        save_file(weights, path)

    def _set_rate(self, fraction: float) -> None:
        warmup = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._peak * warmup * cosine

    def _loss(self, examples: Examples, batch: int) -> torch.Tensor:
        device = self.model.device
        chosen = torch.randint(len(examples.latents), (batch,))
        clean = examples.latents[chosen].to(device, torch.float32)
        captions = examples.captions[chosen].to(device)
        captions[torch.rand(batch, device=device) < CAPTION_DROPOUT] = 0
        # Every other batch favours the middle of the path, where most is decided; the
        # others are uniform, for a sampler starts and ends at the ends.
        sigma = torch.rand(batch, device=device)
        if self.steps % 2:
            sigma = torch.randn(batch, device=device).sigmoid()
        noise = torch.randn_like(clean)
        mixed = clean.lerp(noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.model(mixed, 1000 * sigma, captions, return_dict=False)[0]
        error: torch.Tensor = velocity.float() - (noise - clean)
        return error.square().mean()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parser().parse_args(arguments)
    # Norms keep float32 weights under autocast, which torch mentions at every run.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.size}.safetensors"
    codec_path = options.out / "codec.safetensors"
    status = StatusLine()

    codec = PatchCodec.load(codec_path) if codec_path.exists() else None
    resume = None
    if options.resume:
        # Weights know one latent space only: that of the codec they came with.
        resume = path if path.exists() else models.WEIGHTS / path.name
        codec = codec or PatchCodec.load()
    examples, codec = render_examples(options.videos, codec, options.seed, status)
    if not codec_path.exists():
        save_file(codec.state_dict(), codec_path)

    trainer = Trainer(options.size, resume, torch.device(options.device), options.seed)
    start = saved = time.monotonic()
    while (elapsed := time.monotonic() - start) < 60 * options.minutes:
        trainer.step(examples, options.batch, elapsed / (60 * options.minutes))
        status.update(
            f"{options.size}: {elapsed / 60:.1f} of {options.minutes:g} min, "
            f"step {trainer.steps}, loss {trainer.loss:.4f}"
        )
        if time.monotonic() - saved > SAVE_EVERY_S:
            trainer.save(path)
            saved = time.monotonic()
    trainer.save(path)
    status.clear()
    print(f"{trainer.steps} steps, loss {trainer.loss:.4f}, weights in {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes.train",
        description="Train a transformer on the world of shapes.",
    )
    parser.add_argument("--size", choices=sorted(models.SIZES), default="small")
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="start from the weights in --out, or from the shipped ones",
    )
    parser.add_argument("--out", type=Path, default=Path("out/weights"))
    parser.add_argument("--batch", type=int, default=8, help="videos per step")
    parser.add_argument("--videos", type=int, default=5000, help="videos to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
