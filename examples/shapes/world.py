"""The world: eight frames of one coloured shape that moves over a background.

A caption is four words, one of each kind: shape, colour, motion, background.
`render` draws a caption; `parse_prompt` reads one; `embed_prompt` turns one into the
tensor that the transformer is conditioned on.

The order of the words and the seed of their embedding are part of the trained
weights, and so is the order in which `render` draws its random numbers: the same
generator gives the same video in every version.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "magenta": (0.9, 0.2, 0.85),
    "white": (0.97, 0.97, 0.97),
}
MOTIONS = ("still", "drift", "bounce", "orbit", "spin")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker")

KINDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}
VOCABULARY = tuple(word for words in KINDS.values() for word in words)

FRAMES = 8
SIZE = 64
TEXT_DIM = 64
CAPTION_WORDS = len(KINDS)

Array = npt.NDArray[np.floating[Any]]

_EMBEDDING = torch.randn(len(VOCABULARY), TEXT_DIM, generator=torch.Generator().manual_seed(1234))
_Y, _X = (axis.astype(np.float32) / SIZE for axis in np.mgrid[0:SIZE, 0:SIZE])


class Caption(NamedTuple):
    """One word of each kind, in the order the transformer was trained with."""

    shape: str
    colour: str
    motion: str
    background: str


def parse_prompt(prompt: str) -> Caption | None:
    """Reads a caption from text such as `"red disc bounce plain"`, in any order.

    Returns:
        The caption, or None for an empty prompt (the unconditional one).

    Raises:
        ValueError: A word is unknown, missing or one of two of its kind.
    """
    words = re.split(r"[\s,]+", prompt.strip().lower())
    if words == [""]:
        return None
    found: dict[str, str] = {}
    for word in words:
        kind = next((k for k, known in KINDS.items() if word in known), None)
        if kind is None:
            raise ValueError(f"unknown word {word!r} in prompt {prompt!r}; {_rule()}")
        if kind in found:
            raise ValueError(
                f"prompt {prompt!r} has two words of kind {kind} "
                f"({found[kind]!r}, {word!r}); {_rule()}"
            )
        found[kind] = word
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        raise ValueError(f"prompt {prompt!r} lacks {', '.join(missing)}; {_rule()}")
    return Caption(**found)


def _rule() -> str:
    kinds = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in KINDS.items())
    return f"a prompt is one word of each kind, in any order ({kinds})"


def embed_caption(caption: Caption | None) -> torch.Tensor:
    """Embeds a caption as (4, 64) float32; None, the empty caption, is all zeros."""
    if caption is None:
        return torch.zeros(CAPTION_WORDS, TEXT_DIM)
    return _EMBEDDING[[VOCABULARY.index(word) for word in caption]]


def embed_prompt(prompt: str) -> torch.Tensor:
    """Embeds a prompt string as (4, 64) float32; see `parse_prompt`."""
    return embed_caption(parse_prompt(prompt))


def sample_caption(rng: np.random.Generator) -> Caption:
    """Draws a caption, each word uniformly within its kind."""
    return Caption(*(str(rng.choice(words)) for words in KINDS.values()))


def render(caption: Caption, rng: np.random.Generator) -> Array:
    """Draws a caption as a video; size, place, pace and shades come from `rng`.

    Returns:
        Video (8, 64, 64, 3): frames, rows, columns, RGB in [0, 1].
    """
    radius = float(rng.uniform(0.13, 0.2))  # in units of the frame's side, as all below
    xs, ys, angles = _path(caption, radius, rng)
    background = _background(caption.background, rng)
    colour = np.array(COLOURS[caption.colour], np.float32)
    video = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for i in range(FRAMES):
        dx, dy = _X - xs[i], _Y - ys[i]
        cos, sin = np.cos(angles[i]), np.sin(angles[i])
        distance = _distance(caption.shape, cos * dx + sin * dy, -sin * dx + cos * dy, radius)
        # Half a pixel either side of the outline is blended: edges carry no jaggies
        # that a linear codec would have to reproduce.
        cover = np.clip(0.5 - distance * SIZE, 0, 1)[..., None]
        video[i] = background * (1 - cover) + colour * cover
    return video


def _path(caption: Caption, radius: float, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Centre x, centre y and angle (radians) of the shape, one of each per frame."""
    frame = np.arange(FRAMES, dtype=np.float32)
    start_x, start_y = rng.uniform(0.3, 0.7, 2)
    # Always drawn, even for a disc: the sequence of draws is part of the world.
    tilt = rng.uniform(0, 2 * np.pi) * (caption.shape != "disc")
    angles = np.full(FRAMES, tilt, np.float32)
    heading = rng.uniform(0, 2 * np.pi)
    xs, ys = np.full(FRAMES, start_x), np.full(FRAMES, start_y)
    if caption.motion in ("drift", "bounce"):
        speed = 0.02 if caption.motion == "drift" else 0.14
        xs = start_x + speed * frame * np.cos(heading)
        ys = start_y + speed * frame * np.sin(heading)
        if caption.motion == "bounce":
            xs = _reflect(xs, radius, 1 - radius)
            ys = _reflect(ys, radius, 1 - radius)
    elif caption.motion == "orbit":
        turn = rng.choice([-1, 1]) * 0.55
        xs = 0.5 + 0.25 * np.cos(heading + turn * frame)
        ys = 0.5 + 0.25 * np.sin(heading + turn * frame)
    elif caption.motion == "spin":
        angles = angles + rng.choice([-1, 1]) * 0.4 * frame
    return xs, ys, angles


def _reflect(position: Array, low: float, high: float) -> Array:
    """Folds a straight line of positions into [low, high], as between two walls."""
    span = high - low
    phase = np.mod(position - low, 2 * span)
    return np.asarray(low + np.where(phase > span, 2 * span - phase, phase))


def _background(kind: str, rng: np.random.Generator) -> Array:
    """Background (64, 64, 3), always darker than any of the colours."""
    base: Array = rng.uniform(0.05, 0.35, 3)
    if kind == "plain":
        return np.broadcast_to(base, (SIZE, SIZE, 3))
    if kind == "gradient":
        lower: Array = rng.uniform(0.1, 0.6, 3)
        return np.asarray(base + _Y[..., None] * (lower - base))
    if kind == "stripes":
        fields = np.floor(_X * 2 * rng.integers(3, 6))
    else:
        count = rng.integers(2, 4)
        fields = np.floor(_X * 2 * count) + np.floor(_Y * 2 * count)
    return np.asarray(base + 0.25 * (fields % 2)[..., None])


def _distance(shape: str, u: Array, v: Array, radius: float) -> Array:
    """Signed distance of points (u, v) to the outline, negative inside (64, 64)."""
    au, av = np.abs(u), np.abs(v)
    if shape == "disc":
        return np.sqrt(u * u + v * v) - radius
    if shape == "square":
        return np.maximum(au, av) - 0.85 * radius
    if shape == "triangle":
        return np.maximum(au * 0.866 + v * 0.5, -v) - 0.6 * radius
    along_u = np.maximum(au - radius, av - 0.35 * radius)
    along_v = np.maximum(au - 0.35 * radius, av - radius)
    return np.minimum(along_u, along_v)
