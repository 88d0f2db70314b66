"""Pictures side by side with captions, in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

GAP, CAPTION = 8, 22
"""Pixels between pictures, and above each for its caption."""

Captioned = tuple[str, PIL.Image.Image | None]


def picture_sheet(rows: Sequence[Sequence[Captioned]], side: int = 256, title: str = "") -> PIL.Image.Image:
    """Rows of (caption, picture), each picture drawn to fit a square of ``side`` pixels; None leaves its place empty.

    Args:
        title: a line above them all.
    """
    font = ImageFont.load_default(14)
    top = (CAPTION if title else 0) + GAP
    columns = max((len(row) for row in rows), default=0)
    size = (columns * (side + GAP) + GAP, len(rows) * (side + CAPTION + GAP) + top)
    sheet = PIL.Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, 4), _fitting(draw, title, font, size[0] - 2 * GAP), "black", font)
    for y, row in enumerate(rows):
        for x, (caption, picture) in enumerate(row):
            if picture is None:
                continue
            left, upper = GAP + x * (side + GAP), top + y * (side + CAPTION + GAP)
            scale = side / max(picture.size)
            shown = _flat(picture).resize(
                (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
                PIL.Image.Resampling.LANCZOS,
            )
            sheet.paste(shown, (left, upper + CAPTION))
            edge = (left - 1, upper + CAPTION - 1, left + shown.width, upper + CAPTION + shown.height)
            draw.rectangle(edge, outline="#999")
            draw.text((left, upper + 3), _fitting(draw, caption, font, side), "black", font)
    return sheet


def difference_picture(before: PIL.Image.Image, after: PIL.Image.Image, gain: float = 4.0) -> PIL.Image.Image:
    """Where and how much ``after`` differs from ``before``: gray is no difference, ``gain`` makes it easier to see."""
    if before.size != after.size:
        before = before.resize(after.size, PIL.Image.Resampling.LANCZOS)
    one, other = (np.asarray(_flat(picture), np.float32) for picture in (before, after))
    return PIL.Image.fromarray((128 + gain * (other - one)).clip(0, 255).astype(np.uint8))


def _flat(picture: PIL.Image.Image) -> PIL.Image.Image:
    """RGB, what is transparent on white."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", above.size, "white"), above).convert("RGB")


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """``text``, cut to ``width`` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
