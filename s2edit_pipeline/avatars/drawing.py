"""What every subject of the avatars world shares: its palette, its edits, its picture and the masks of its parts."""

from __future__ import annotations

import colorsys
import functools
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

IMAGE_SIZE = 128
"""Side of a rendered picture, in pixels."""

CAPTION_PREFIX = "a photo of"

EXPRESSIONS = ("neutral", "smiling", "sad", "angry", "surprised", "winking")
GLASSES = ("none", "glasses", "sunglasses")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "grey", "black")
BACKGROUNDS = ("white", "grey", "blue", "green", "yellow", "pink", "purple", "orange")

PARTS = (
    "person", "hair", "headwear", "glasses", "facial_hair", "expression", "clothes", "background",
    "creature", "pattern",
)  # fmt: skip
"""Regions of a picture that words refer to; see :func:`part_masks`."""

SPLITS = ("train", "varied", "held_out")
"""Training subjects in the palette's own shades, training subjects in shades of all kinds, and unseen subjects."""

COLOR_BASE = {
    "red": "#e0393e", "orange": "#f08a2c", "yellow": "#f6d44c", "green": "#3fa65a", "blue": "#3f7fd6",
    "purple": "#8a4fbf", "pink": "#f48fb8", "white": "#f4f4f4", "grey": "#929598", "black": "#2a2d33",
}  # fmt: skip
BACKGROUND_BASE = {
    "white": "#fafafa", "grey": "#c4c8cc", "blue": "#a9d3f5", "green": "#b4e3b8", "yellow": "#fbeea2",
    "pink": "#fbcfdc", "purple": "#d5c4f0", "orange": "#fbcf9e",
}  # fmt: skip
TRAIN_SHADES = (0, 1, 2)
HELD_OUT_SHADES = (3, 4, 5)
Shade = int | tuple[float, float, float]
"""A row of ``SHADES``, or such a row itself."""
VARIED_SHADES = ((-0.025, 0.025), (0.8, 1.1), (0.82, 1.06))
"""Where the shades of varied subjects lie: the range of each number of a row. All of ``SHADES`` lie inside."""
# hue offset (turns), factor on saturation, factor on value: one row a shade
SHADES = (
    (0.0, 1.0, 1.0), (0.014, 0.88, 0.93), (-0.014, 1.0, 0.86),
    (0.007, 0.94, 0.90), (-0.010, 0.86, 0.97), (0.020, 1.0, 0.90),
)  # fmt: skip


def rgb(color: str) -> tuple[int, int, int]:
    """``"#rrggbb"`` as three numbers, 0 to 255."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def hex_color(hue: float, saturation: float, value: float) -> str:
    """The colour as ``"#rrggbb"``; ``hue`` in turns, the others cut off at 1."""
    red_green_blue = colorsys.hsv_to_rgb(hue % 1.0, min(1.0, saturation), min(1.0, value))
    return "#" + "".join(f"{round(255 * c):02x}" for c in red_green_blue)


def shade(base: str, which: Shade) -> str:
    """Shade ``which`` (0 is the word's own colour) of the hex colour ``base``, as ``"#rrggbb"``."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb(base)))
    dh, fs, fv = SHADES[which] if isinstance(which, int) else which
    return hex_color(h + dh, s * fs, v * fv)


def draw_shade(rng: random.Random, split: str) -> Shade:
    """A shade for a subject of ``split``."""
    if split == "varied":
        turn, saturation, value = (rng.uniform(*bounds) for bounds in VARIED_SHADES)
        return turn, saturation, value
    return rng.choice(HELD_OUT_SHADES if split == "held_out" else TRAIN_SHADES)


def check_split(split: str) -> None:
    """Raises:
    ValueError: ``split`` is not one of :data:`SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(map(repr, SPLITS))}, not {split!r}.")


SubjectType = TypeVar("SubjectType", bound="Subject")


class Subject:
    """Who or what a picture shows: a frozen dataclass of named attributes, which captions may say, and of all that
    they never say, its *identity*."""

    ATTRIBUTES: ClassVar[Mapping[str, tuple[str, ...]]]
    """What a caption can name of this kind of subject, and the values it can take."""
    PART: ClassVar[str]
    """Which of ``PARTS`` its noun speaks of."""

    noun: str
    expression: str
    glasses: str
    headwear: str
    background: str
    background_shade: Shade

    def plain(self, attribute: str) -> dict[str, Any]:
        """What else a new value of ``attribute`` settles, since a word can't say it: a colour's plainest shade."""
        if attribute == "background" or attribute.endswith("_color"):
            return {attribute.removesuffix("_color") + "_shade": 0}
        return {}

    def shows(self, attribute: str) -> bool:
        """Whether the picture tells the value of ``attribute``."""
        raise NotImplementedError

    def parts(self) -> tuple[str, ...]:
        """What can be left out of the picture, see :meth:`draw`: those of ``PARTS`` that it has."""
        raise NotImplementedError

    def draw(self, size: int, hidden: str | None = None) -> np.ndarray:
        """(size, size, 4) uint8 drawing on a transparent ground, the part ``hidden`` left out of it."""
        raise NotImplementedError

    def expression_region(self, size: int) -> np.ndarray:
        """(size, size) bool: where any two of its expressions differ."""
        raise NotImplementedError

    def edited(self: SubjectType, **changes: str) -> SubjectType:
        """The same subject with the named attributes changed: the truth of an edit.

        Whatever a word can't say of a new thing (its cut, its shade, its make) is then at its plainest.

        Raises:
            ValueError: an attribute that captions don't name, or a value it can't take.
        """
        fresh: dict[str, Any] = dict(changes)
        for name, value in changes.items():
            if name not in self.ATTRIBUTES:
                raise ValueError(f"{name!r} is not a named attribute; choose from {', '.join(self.ATTRIBUTES)}.")
            if value not in self.ATTRIBUTES[name]:
                raise ValueError(f"{name} can't be {value!r}; choose from {', '.join(self.ATTRIBUTES[name])}.")
            if getattr(self, name) != value:
                fresh.update(self.plain(name))
        return replace(self, **fresh)  # type: ignore[type-var]


def rasterize(svg: str, size: int) -> np.ndarray:
    """(size, size, 4) uint8 pixels of an SVG document."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@functools.lru_cache(maxsize=256)  # comparing subjects draws the same ones again and again
def _picture(subject: Subject, size: int) -> np.ndarray:
    rgba = subject.draw(size).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    ground = np.array(rgb(shade(BACKGROUND_BASE[subject.background], subject.background_shade)), np.float32)
    picture: np.ndarray = (rgba[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)
    return picture


def render_array(subject: Subject, size: int = IMAGE_SIZE) -> np.ndarray:
    """The picture of ``subject`` as a (size, size, 3) uint8 array."""
    return _picture(subject, size).copy()


def render(subject: Subject, size: int = IMAGE_SIZE) -> Image.Image:
    """The picture of ``subject`` as an RGB image of ``size`` x ``size`` pixels."""
    return Image.fromarray(render_array(subject, size))


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(size, size) bool: where two drawings differ by more than the faint rim of an edge."""
    return np.abs(a.astype(np.int16) - b).max(-1) > 12


def where_any_differ(drawings: Sequence[np.ndarray]) -> np.ndarray:
    """(size, size) bool, not to be written to: where any of the drawings differs from the first."""
    region: np.ndarray = np.any([differs(drawing, drawings[0]) for drawing in drawings], axis=0)
    region.setflags(write=False)
    return region


def part_masks(subject: Subject, size: int = IMAGE_SIZE) -> dict[str, np.ndarray]:
    """Where each part is, as (size, size) bool arrays: drawn with and without it, and compared.

    Keys are those of :data:`PARTS` that the picture has (the subject's own and "background" always).
    "expression" is where the face would change with the expression.
    """
    shown = subject.draw(size)
    inside = shown[..., 3] > 127
    masks = {subject.PART: inside, "background": ~inside}
    masks |= {part: differs(shown, subject.draw(size, part)) for part in subject.parts()}
    masks["expression"] = subject.expression_region(size)
    return masks


def changed_pixels(before: Subject, after: Subject, size: int = IMAGE_SIZE) -> np.ndarray:
    """(size, size) bool: the pixels in which the two subjects' pictures differ."""
    a, b = render_array(before, size).astype(np.int16), render_array(after, size)
    return np.abs(a - b).max(-1) > 0
