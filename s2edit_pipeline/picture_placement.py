"""Where a picture, or a part of one, lies on the canvas that the model works on, and the way back.

Nothing is squeezed: what the canvas's shape leaves over is filled with real surroundings where there are some, else by
repeating the edge, and cut off on the way back. Points are (x, y) in pixels from the upper left corner; pixel i covers
i to i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from .picture_files import SourcePicture
from .picture_modes import Box

Values = TypeVar("Values", Image.Image, np.ndarray, torch.Tensor)

MAX_ASPECT_RATIO = 4.0
"""Longer side over shorter side, at most: the models have seen nothing thinner."""

CLOSE_UP_SHARE = 0.4
"""A close-up that shows less than this share of the picture is worth working at: it shows the subject at more than
1.5 times the size."""


@dataclass(frozen=True)
class Placement:
    """A part of a picture on a canvas: x_canvas = content.left + (x - box.left) content.width / box.width, as for y.

    Attributes:
        picture_size: (width, height) of the picture.
        box: (left, top, right, bottom) in the picture: the part that is worked on.
        canvas_size: (width, height), multiples of what the model asks for.
        content: (left, top, right, bottom) on the canvas: where the box lies. The rest repeats its edge.
    """

    picture_size: tuple[int, int]
    box: Box
    canvas_size: tuple[int, int]
    content: Box

    @property
    def box_size(self) -> tuple[int, int]:
        """(width, height) of the box, in the picture's pixels."""
        return _size_of(self.box)

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels for each pixel of the picture, across and down: alike but for the rounding of the content's
        sides to whole pixels."""
        (width, height), (across, down) = self.box_size, _size_of(self.content)
        return across / width, down / height

    def canvas_points(self, points: Any) -> np.ndarray:
        """Points (..., 2) of the picture as points of the canvas, float64."""
        return (np.asarray(points, np.float64) - self.box[:2]) * self.scale + self.content[:2]

    def picture_points(self, points: Any) -> np.ndarray:
        """Points (..., 2) of the canvas as points of the picture, float64."""
        return (np.asarray(points, np.float64) - self.content[:2]) / self.scale + self.box[:2]

    def to_canvas(self, picture: Image.Image) -> Image.Image:
        """The canvas: the box of ``picture`` ("RGB", "L" or "F") by Lanczos's filter, its edge repeated around it.

        Raises:
            ValueError: a picture of another size than the placement's, or of another mode.
        """
        if picture.mode not in ("RGB", "L", "F"):
            raise ValueError(f"The picture must be RGB, L or F, not {picture.mode}: picture.convert('RGB').")
        self._check_size(picture.size, self.picture_size, "picture")
        content = picture.resize(_size_of(self.content), Image.Resampling.LANCZOS, box=self.box)
        return self._padded(content, "edge")

    def mask_to_canvas(self, mask: Values) -> Values:
        """A mask of the whole picture on the canvas, averaged over what each canvas pixel covers, 0 around the content.

        Args:
            mask: PIL "L", or (H, W) array or tensor; what comes back is of the same kind, float32 but for PIL.
        """

        def resize(image: Image.Image) -> Image.Image:
            self._check_size(image.size, self.picture_size, "mask")
            content = image.resize(_size_of(self.content), Image.Resampling.BOX, box=self.box)
            return self._padded(content, "constant")

        return _each_channel(mask, resize)

    def from_canvas(
        self,
        values: Values,
        part: Box | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Values:
        """What lies in the content, at the box's own resolution.

        Args:
            values: of the canvas's size: a PIL picture ("RGB", "L", "F"), an array (H, W) or (H, W, C), or a tensor
                (..., H, W). Floating point isn't clipped: the bicubic filter may overshoot.
            part: a box in the picture, within the placement's, if only that is wanted.
            resample: ``Image.Resampling.BILINEAR`` never overshoots: for masks.

        Returns:
            The same kind of thing; arrays and tensors as float32.

        Raises:
            ValueError: another size than the canvas's; a part outside the box.
        """
        part = self.box if part is None else part
        if not _contains(self.box, part):
            raise ValueError(f"part={part} must lie in the placement's box {self.box}.")
        left, top = self.canvas_points(part[:2]).tolist()
        right, bottom = self.canvas_points(part[2:]).tolist()
        width, height = self.canvas_size
        source = (left, top, min(right, width), min(bottom, height))  # a rounding error past the edge is refused

        def resize(image: Image.Image) -> Image.Image:
            self._check_size(image.size, self.canvas_size, "canvas")
            return image.resize(_size_of(part), resample, box=source)

        return _each_channel(values, resize)

    def mask_from_canvas(self, mask: Any) -> Image.Image:
        """A mask on the canvas as "L" of the whole picture's size, 0 outside the box.

        Args:
            mask: PIL "L", or (H, W) array or tensor in [0, 1].
        """
        gray = Image.fromarray((mask_values(mask).clip(0, 1) * 255).round().astype(np.uint8))
        whole = Image.new("L", self.picture_size)
        whole.paste(self.from_canvas(gray, resample=Image.Resampling.BILINEAR), self.box)
        return whole

    def paste(self, picture: Image.Image, canvas: Image.Image) -> Image.Image:
        """A copy of ``picture`` with what the canvas shows in its box."""
        self._check_size(picture.size, self.picture_size, "picture")
        result = picture.copy()
        result.paste(self.from_canvas(canvas.convert(picture.mode)), self.box)
        return result

    def _check_size(self, size: tuple[int, int], expected: tuple[int, int], name: str) -> None:
        if size != expected:
            raise ValueError(
                f"The {name} is {size[0]} x {size[1]}, and this placement is for {expected[0]} x {expected[1]}."
            )

    def _padded(self, content: Image.Image, mode: Any) -> Image.Image:
        if content.size == self.canvas_size:
            return content
        left, top, right, bottom = self.content
        width, height = self.canvas_size
        array = np.asarray(content)
        around = ((top, height - bottom), (left, width - right), (0, 0))[: array.ndim]
        return Image.fromarray(np.pad(array, around, mode=mode))


@dataclass(frozen=True)
class PlacedPicture:
    """A picture, and where the part of it that is worked on lies on the model's canvas."""

    source: SourcePicture
    placement: Placement

    @cached_property
    def canvas(self) -> Image.Image:
        """What the model sees, RGB."""
        return self.placement.to_canvas(self.source.rgb)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the canvas."""
        width, height = self.placement.canvas_size
        return height, width

    @property
    def is_whole(self) -> bool:
        """Whether all of the picture is worked on."""
        return self.placement.box == (0, 0, *self.placement.picture_size)


def mask_values(values: Any) -> np.ndarray:
    """A mask as (h, w) float32 in [0, 1].

    Args:
        values: (h, w) array or tensor, with leading ones or without: bool, floating point in [0, 1], or uint8, of
            which 1 is inside where nothing is larger, else 255; or a PIL picture, of which white is inside.

    Raises:
        ValueError: another shape.
    """
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L")).astype(np.float32) / 255
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    array = array.reshape(array.shape[-2:]) if array.ndim > 2 and array.size == np.prod(array.shape[-2:]) else array
    if array.ndim != 2:
        raise ValueError(f"A mask must be (H, W), not {array.shape}.")
    return array.astype(np.float32) / (255 if array.dtype == np.uint8 and array.max(initial=0) > 1 else 1)


def place_picture(
    picture_size: tuple[int, int],
    native: int,
    multiple: int,
    box: Box | None = None,
    height: int | None = None,
    width: int | None = None,
    extend: bool = True,
) -> Placement:
    """The placement of a picture, or of its ``box``, on a canvas of about the model's own area.

    Args:
        picture_size: (width, height).
        native: the side of the square that the model was trained on.
        multiple: what the canvas's sides must be multiples of.
        box: (left, top, right, bottom) in the picture; None: all of it.
        height, width: the canvas's sides, if they are wished.
        extend: a box of another shape than the canvas's grows, as far as the picture goes, to fill it with real
            surroundings. False: it stays as it is.

    Raises:
        ValueError: a box outside the picture; a side that isn't such a multiple; a part so long and thin that no model
            has seen the like, unless both sides are wished.
    """
    box = (0, 0, *picture_size) if box is None else _checked_box(box, picture_size)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, int) or side <= 0 or side % multiple):
            raise ValueError(f"{name} must be a positive multiple of {multiple} for this model, not {side!r}.")
    if height is not None and width is not None:
        canvas = (width, height)
    else:
        ratio = _size_of(box)[0] / _size_of(box)[1]
        if max(ratio, 1 / ratio) > MAX_ASPECT_RATIO:
            part = "The picture" if box == (0, 0, *picture_size) else "The part to be worked on"
            across, down = _size_of(box)
            raise ValueError(
                f"{part} is {across} x {down}; one side may be at most {MAX_ASPECT_RATIO:g} times "
                "the other. Crop it to what you want to edit (image.crop((left, top, right, bottom))), or pass height= "
                "and width=."
            )
        canvas = _canvas_size(ratio, native, multiple, height, width)
    if extend:
        box = _grown(box, canvas, picture_size)
    across, down = _size_of(box)
    scale = min(canvas[0] / across, canvas[1] / down)
    inner = (max(1, min(canvas[0], round(across * scale))), max(1, min(canvas[1], round(down * scale))))
    left, top = (canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2
    return Placement(picture_size, box, canvas, (left, top, left + inner[0], top + inner[1]))


def subject_box(
    mask: Any,
    picture_size: tuple[int, int],
    margin: float = 0.3,
    shape: tuple[int, int] | None = (1, 1),
    min_size: int = 64,
) -> Box:
    """The close-up of a subject: the smallest box of ``shape`` that holds its whole mask and a margin.

    Args:
        mask: (h, w) array or tensor in [0, 1] or PIL "L", of the picture's shape but of any resolution; the subject
            is where it is at least half of white.
        picture_size: (width, height).
        margin: on each side, as a share of the subject's longer side.
        shape: (width, height) of the box up to scale. None: the subject's own.
        min_size: the box's shorter side is at least so long, where the picture is.

    Returns:
        (left, top, right, bottom) inside the picture. Of another shape only where the picture is too small for it.

    Raises:
        ValueError: the mask is empty.
    """
    inside = mask_values(mask) >= 0.5
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        raise ValueError("The mask is empty: there is no subject to work close up at. Pass crop=None, or mask=.")
    spans = []  # of the subject with its margin, across and down, in the picture's pixels
    cells = [(columns, inside.shape[1], picture_size[0]), (rows, inside.shape[0], picture_size[1])]
    ends = [(int(found[0]) * side / count, (int(found[-1]) + 1) * side / count) for found, count, side in cells]
    around = margin * max(stop - start for start, stop in ends)
    for (start, stop), side in zip(ends, picture_size, strict=True):
        spans.append((max(0, math.floor(start - around)), min(side, math.ceil(stop + around))))
    width, height = (stop - start for start, stop in spans)
    across, down = (width, height) if shape is None else shape
    unit = max(width / across, height / down, min_size / min(across, down))
    sides = [
        max(needed, min(side, round(unit * part)))
        for needed, side, part in zip((width, height), picture_size, (across, down), strict=True)
    ]
    left, top = (
        min(max(0, round((start + stop - side) / 2)), whole - side)
        for (start, stop), side, whole in zip(spans, sides, picture_size, strict=True)
    )
    return left, top, left + sides[0], top + sides[1]


def close_up_box(mask: Any, picture_size: tuple[int, int], share: float = CLOSE_UP_SHARE, **options: Any) -> Box | None:
    """:func:`subject_box` where a close-up is worth it, because it shows less than ``share`` of the picture; else None.

    Args:
        options: as :func:`subject_box` takes them.
    """
    box = subject_box(mask, picture_size, **options)
    width, height = _size_of(box)
    return box if width * height < share * picture_size[0] * picture_size[1] else None


def _canvas_size(ratio: float, native: int, multiple: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(width, height): of the multiples about the native area, those whose shape is nearest to ``ratio``."""
    if height is not None:
        return max(multiple, round(height * ratio / multiple) * multiple), height
    if width is not None:
        return width, max(multiple, round(width / ratio / multiple) * multiple)

    def near(side: float) -> list[int]:
        middle = round(side / multiple)
        return [count * multiple for count in range(max(1, middle - 2), middle + 3)]

    def misfit(size: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(size[0] / size[1] / ratio)), abs(math.log(size[0] * size[1] / native**2))

    sizes = [(wide, tall) for wide in near(native * ratio**0.5) for tall in near(native / ratio**0.5)]
    closest = min(misfit(size)[1] for size in sizes)
    # an eighth less or more area is as good, or what comes nearest to it
    return min((size for size in sizes if misfit(size)[1] <= max(closest, math.log(1.125)) + 1e-9), key=misfit)


def _grown(box: Box, shape: tuple[int, int], picture_size: tuple[int, int]) -> Box:
    """``box`` made wider or taller, to ``shape`` or as far as the picture goes, about its middle."""
    width, height = _size_of(box)
    wanted = (round(height * shape[0] / shape[1]), round(width * shape[1] / shape[0]))
    ends = []
    for axis in (0, 1):
        start, stop = box[axis], box[axis + 2]
        side = max(stop - start, min(picture_size[axis], wanted[axis]))
        start = min(max(0, (start + stop - side) // 2), picture_size[axis] - side)
        ends.append((start, start + side))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _checked_box(box: Any, picture_size: tuple[int, int]) -> Box:
    try:
        left, top, right, bottom = (int(number) for number in box)
        whole = all(int(number) == number for number in box)
    except (TypeError, ValueError):
        whole = False
    if not whole or not _contains((0, 0, *picture_size), (left, top, right, bottom)):
        raise ValueError(
            f"The crop must be (left, top, right, bottom) in whole pixels inside the picture's "
            f"{picture_size[0]} x {picture_size[1]}, not {box!r}."
        )
    return left, top, right, bottom


def _contains(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] < inner[2] <= outer[2] and outer[1] <= inner[1] < inner[3] <= outer[3]


def _size_of(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _each_channel(values: Values, resize: Callable[[Image.Image], Image.Image]) -> Values:
    """``resize`` applied to a PIL picture as it is, and to arrays and tensors channel by channel in floating point."""
    if isinstance(values, Image.Image):
        return resize(values)
    if isinstance(values, torch.Tensor):
        planes = values.detach().float().cpu().reshape(-1, *values.shape[-2:]).numpy()
        resized = np.stack([np.asarray(resize(Image.fromarray(np.ascontiguousarray(plane)))) for plane in planes])
        return torch.from_numpy(resized).reshape(*values.shape[:-2], *resized.shape[-2:]).to(values.device)
    array = np.asarray(values, np.float32)
    if array.ndim == 2:
        return np.array(resize(Image.fromarray(np.ascontiguousarray(array))))
    planes = np.moveaxis(array, -1, 0)
    return np.stack([np.asarray(resize(Image.fromarray(np.ascontiguousarray(plane)))) for plane in planes], -1)
