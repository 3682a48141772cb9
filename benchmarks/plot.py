"""Quality over speed as a picture, drawn with Pillow, which is there with diffusers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

SPEEDS = (1.3, 1.6, 2.0, 2.5, 3.0, 4.0)
_SIZE = (1200, 760)
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 330, 40, 50
_GREY, _DARK = (225, 225, 225), (90, 90, 90)


def draw(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, thick: Collection[str] = ()
) -> None:
    """Write a PNG of (speedup, PSNR in dB) points, a line for each name beside its end.

    Args:
        curves: name -> points, in any order.
        path: the file; its folder is made.
        thick: names whose lines are thick.
    """
    if not curves:
        return
    width, height = _SIZE
    qualities = [quality for curve in curves.values() for _, quality in curve]
    low, high = math.floor(min(qualities) / 5) * 5, math.ceil(max(qualities) / 5 + 0.01) * 5
    fastest = max(SPEEDS[-1], *(speed for curve in curves.values() for speed, _ in curve))

    def place(speed: float, quality: float) -> tuple[float, float]:
        x = math.log(max(speed, 1.0)) / math.log(fastest)
        y = (quality - low) / (high - low)
        return _LEFT + x * (width - _LEFT - _RIGHT), height - _BOTTOM - y * (
            height - _TOP - _BOTTOM
        )

    picture = Image.new("RGB", _SIZE, (250, 250, 250))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for quality in range(low, high + 1, 5):
        (x, y), (end, _) = place(1, quality), place(fastest, quality)
        pen.line((x, y, end, y), _GREY)
        pen.text((_LEFT - 8, y), str(quality), _DARK, font, anchor="rm")
    for speed in (1.0, *SPEEDS):
        (x, y), (_, end) = place(speed, low), place(speed, high)
        pen.line((x, y, x, end), _GREY)
        pen.text((x, y + 8), f"{speed:g}x", _DARK, font, anchor="mt")
    title = "PSNR to the uncached video (dB) over speedup, against plain torch.compile"
    pen.text((_LEFT, 12), title, (30, 30, 30), font)
    # Names stand in the order of the curves' ends, pushed apart where they would overlap.
    names = sorted(curves, key=lambda name: place(*max(curves[name]))[1])
    above = float(_TOP)
    for i, name in enumerate(names):
        colour = ImageColor.getrgb(f"hsv({137 * i % 360}, 90%, 75%)")  # neighbours far apart
        line = [place(*point) for point in sorted(curves[name])]
        pen.line(line, colour, 4 if name in thick else 1)
        for x, y in line:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        room = (height - _BOTTOM - above) / (len(names) - i)
        above = max(above + min(18.0, room), line[-1][1])
        above = min(above, height - _BOTTOM - 18.0 * (len(names) - i - 1))
        pen.line((*line[-1], width - _RIGHT + 20, above), (200, 200, 200), 1)
        pen.text((width - _RIGHT + 24, above), name, colour, font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
