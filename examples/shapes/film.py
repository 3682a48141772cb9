"""Pictures of videos side by side: a film strip (PNG) and a moving one (GIF)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_PAPER = (250, 250, 250)
_INK = (30, 30, 30)
_FAINT = (110, 110, 110)
_GAP = 2
_MARGIN = 12
_TITLE = 26
_CAPTION = 18
_LABEL_WIDTH = 104
_FRAME_MS = 140


@dataclass(frozen=True, kw_only=True)
class Take:
    """One video of a scene and the lines to write beside it."""

    lines: tuple[str, ...]
    """The first line is the name, the others are figures."""
    video: torch.Tensor
    """(frames, 3, height, width), RGB in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Takes of one prompt, to be compared."""

    title: str
    takes: tuple[Take, ...]


def film_strip(scenes: Sequence[Scene], scale: int = 2) -> Image.Image:
    """Lays scenes out below each other: a row for each take, a column for each frame.

    Args:
        scenes: At least one; all videos of one size.
        scale: Pixels of the picture per pixel of a video.
    """
    frames, height, width = _size(scenes, scale)
    rows = sum(len(scene.takes) for scene in scenes)
    picture = Image.new(
        "RGB",
        (
            _LABEL_WIDTH + frames * (width + _GAP) + 2 * _MARGIN,
            len(scenes) * _TITLE + rows * (height + _GAP) + 2 * _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(picture)
    top = _MARGIN
    for scene in scenes:
        draw.text((_MARGIN, top + 4), scene.title, _INK, _font(15))
        top += _TITLE
        for take in scene.takes:
            _write(draw, _MARGIN, top + height // 2, take.lines)
            for i, frame in enumerate(_images(take.video, scale)):
                left = _MARGIN + _LABEL_WIDTH + i * (width + _GAP)
                picture.paste(frame, (left, top))
            top += height + _GAP
    return picture


def save_animation(scenes: Sequence[Scene], path: Path, scale: int = 3) -> None:
    """Writes a GIF that loops: a column for each scene, a row for each take.

    Args:
        scenes: At least one; all videos of one size, all scenes with as many takes.
        path: Where to write it.
        scale: Pixels of the picture per pixel of a video.
    """
    frames, height, width = _size(scenes, scale)
    rows = len(scenes[0].takes)
    paper = Image.new(
        "RGB",
        (
            len(scenes) * (width + _MARGIN) + _MARGIN,
            _TITLE + rows * (height + _CAPTION + _GAP) + _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(paper)
    places: list[tuple[int, int, list[Image.Image]]] = []
    for column, scene in enumerate(scenes):
        left = _MARGIN + column * (width + _MARGIN)
        draw.text((left, 6), scene.title, _INK, _font(13))
        for row, take in enumerate(scene.takes):
            top = _TITLE + row * (height + _CAPTION + _GAP)
            draw.text((left, top + 2), "  ".join(take.lines), _FAINT, _font(11))
            places.append((left, top + _CAPTION, _images(take.video, scale)))
    pictures = []
    for i in range(frames):
        picture = paper.copy()
        for left, top, images in places:
            picture.paste(images[i], (left, top))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=_FRAME_MS, loop=0)


def _size(scenes: Sequence[Scene], scale: int) -> tuple[int, int, int]:
    """Number of frames, and height and width of one in the picture."""
    frames, _, height, width = scenes[0].takes[0].video.shape
    return frames, height * scale, width * scale


def _images(video: torch.Tensor, scale: int) -> list[Image.Image]:
    """One enlarged image per frame; pixels stay square, as smoothing would flatter."""
    pixels = (video.float().cpu().clamp(0, 1) * 255).round().byte()
    return [
        Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(
            (frame.shape[2] * scale, frame.shape[1] * scale), Image.Resampling.NEAREST
        )
        for frame in pixels
    ]


def _write(draw: ImageDraw.ImageDraw, left: int, middle: int, lines: Sequence[str]) -> None:
    """Writes lines below each other, centred on a height."""
    step = 17
    top = middle - step * len(lines) // 2
    for i, line in enumerate(lines):
        ink, size = (_INK, 13) if i == 0 else (_FAINT, 12)
        draw.text((left, top + i * step), line, ink, _font(size))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
