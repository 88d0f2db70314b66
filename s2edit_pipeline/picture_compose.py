"""An edit put back into the photograph at full resolution.

S is the source at the box's own resolution; E and R, the edit and the reconstruction of the source, come from the
canvas. With D = E - R, what the edit changed, and g in [0, 1], 1 where that is nothing:

    result = S + w (E + g (S - R) - S) = S + w (D - (1 - g)(S - R)),

so that what the autoencoder and the canvas's resolution lost is given back wherever the edit changed nothing. w is 0
outside the region, whose pixels so stay to the bit, and rises to 1 within its border. D is freed before of the tone
that drifted along that border.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from .picture_files import SourcePicture, read_picture
from .picture_modes import Box, strips
from .picture_placement import Placement, mask_values

UNCHANGED, CHANGED = 0.02, 0.17
"""Changes of the structure, of [0, 1]: up to the first the source's detail is given back whole, from the second on not
at all."""

TONE_SHARE = 0.25
"""How much a change of the tone counts beside one of the structure: tanned skin and dyed hair keep their grain."""

MOST_DRIFT = 0.05
"""A difference along the border that is much larger than this is no drift of the tone, but the edit itself."""

FEATHER_SHARE = 1 / 32
"""The width of the border in which an edit fades in, of the canvas's shorter side."""

SMALL_MASK, LARGE_MASK = 0.001, 0.9
"""Shares of the picture below and above which a mask is seldom what was meant."""


def compose(
    source: Any,
    edited: Any,
    reconstruction: Any,
    region: Any,
    placement: Placement,
    feather: int | None = None,
) -> tuple[SourcePicture, Image.Image]:
    """The edit in the photograph.

    Args:
        source: a ``SourcePicture``, or what ``picture_files.read_picture`` takes.
        edited: the edit at the canvas's size: PIL, (H, W, 3) array or (3, H, W) or (1, 3, H, W) tensor, in [0, 1] or
            uint8.
        reconstruction: the source as the model gives it back unedited, likewise; None: the source on the canvas stands
            for it, and what the autoencoder lost counts as a change.
        region: (h, w) in [0, 1] or PIL "L": where the edit may change the picture; of the canvas's shape, such as the
            latents' cells, or of the whole picture's size. None: all of the box.
        placement: where the box lies on the canvas.
        feather: how far the edit takes to fade in from the region's border, in canvas pixels. None: 1/32 of its
            shorter side. Along the picture's own border there is nothing to fade from.

    Returns:
        The picture, of the source's size, mode and metadata, and its mask, "L" of the same size: where that is 0 the
        picture has the source's own pixels to the bit. ``picture.native`` is it as a PIL picture.

    Raises:
        ValueError: sizes that don't fit together; values outside [0, 1].
    """
    source = source if isinstance(source, SourcePicture) else read_picture(source, "source")
    if source.size != placement.picture_size:
        raise ValueError(f"The source is {source.size} and the placement for {placement.picture_size} (width, height).")
    edit = _canvas_colors(edited, placement.canvas_size, "edited")
    if reconstruction is None:
        unedited = np.asarray(placement.to_canvas(source.rgb)).astype(np.float32) / 255
    else:
        unedited = _canvas_colors(reconstruction, placement.canvas_size, "reconstruction")
    limit, inside = _region_on_canvas(region, placement)
    if feather is None:
        feather = max(1, round(min(placement.canvas_size) * FEATHER_SHARE))
    weight = _fade(inside > 0, placement, feather)
    ring = (inside > 0) & (weight < 0.999)
    weight = np.minimum(weight, inside)

    difference = edit - unedited
    difference -= _drift(difference, ring) * (inside > 0)[..., None]
    loss = _change(difference)  # 1 - g
    return _blend(source, (difference, unedited, loss, weight), placement, limit)


def mask_warning(mask: Any, name: str = "The mask") -> str | None:
    """The sentence to warn with, about a mask that is seldom what was meant: empty, tiny or nearly everything; else
    None.

    Args:
        mask: (H, W) array or tensor in [0, 1], or PIL "L", of the whole picture.
    """
    values = mask_values(mask)
    share = float((values >= 0.5).mean())
    if share == 0:
        return f"{name} is empty: nothing would be changed or learnt. Pass mask= (white where the subject is)."
    if share < SMALL_MASK:
        return (
            f"{name} covers {share:.2%} of the picture, too little to work at. Look at it with pipe.preview_mask(...); "
            'pass mask=, or crop="auto" to work close up.'
        )
    if share > LARGE_MASK:
        return (
            f"{name} covers {share:.0%} of the picture, so that hardly anything is kept as it is. Look at it with "
            "pipe.preview_mask(...), and pass mask= if that isn't the subject."
        )
    return None


# ------------------------------------------------------------------------------------------------ on the canvas


def _canvas_colors(values: Any, canvas_size: tuple[int, int], name: str) -> np.ndarray:
    """(height, width, 3) float32 in [0, 1]."""
    if isinstance(values, Image.Image):
        array = np.asarray(values.convert("RGB"))
    elif isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be (3, H, W) or (1, 3, H, W), not {tuple(values.shape)}.")
        array = (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()
    else:
        array = np.asarray(values)
    if array.shape != (canvas_size[1], canvas_size[0], 3):
        raise ValueError(f"{name} is {array.shape}, and the canvas {(canvas_size[1], canvas_size[0], 3)}.")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{name} must lie in [0, 1]; it runs from {low:g} to {high:g}. For [-1, 1] use (x + 1) / 2.")
    return array.clip(0, 1)


def _region_on_canvas(region: Any, placement: Placement) -> tuple[np.ndarray | None, np.ndarray]:
    """The region at the picture's own size, if it came so, and on the canvas: (height, width) in [0, 1], 0 around the
    content."""
    width, height = placement.canvas_size
    left, top, right, bottom = placement.content
    content = np.zeros((height, width), np.float32)
    content[top:bottom, left:right] = 1
    if region is None:
        return None, content
    plane = mask_values(region)
    across, down = plane.shape[1], plane.shape[0]
    if (across, down) == placement.picture_size and (across, down) != placement.canvas_size:
        return plane, placement.mask_to_canvas(plane)
    if width % across or height % down or width // across != height // down:
        raise ValueError(
            f"The region is {across} x {down}; it must have the picture's size {placement.picture_size}, the canvas's "
            f"{placement.canvas_size}, or that divided by a whole number."
        )
    cells = Image.fromarray((plane > 0).astype(np.float32))
    whole = np.asarray(cells.resize((width, height), Image.Resampling.NEAREST))
    soft = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
    return None, whole * soft * content


def _fade(region: np.ndarray, placement: Placement, feather: int) -> np.ndarray:
    """(height, width): the weight of the edit, 0 outside the region (bool) and at its border, 1 about ``feather``
    pixels deeper; the stairs that a border has are smoothed. The picture's own border is none of the region's.

    What the region keeps when half of ``feather``, and a pixel, is cut off all around it is blurred by that half. Parts
    too thin to come to 1 in this way get a narrower border, into which the wider one passes over.
    """
    left, top, right, bottom = placement.content
    width, height = placement.picture_size
    at_border = [a == b for a, b in zip(placement.box, (0, 0, width, height), strict=True)]
    padded = region[top:bottom, left:right]
    around = feather + 1
    for axis, ends in enumerate(((at_border[1], at_border[3]), (at_border[0], at_border[2]))):
        for end, repeated in enumerate(ends):
            sides = [(0, 0), (0, 0)]
            sides[axis] = (around, 0) if end == 0 else (0, around)
            padded = np.pad(padded, sides, mode="edge") if repeated else np.pad(padded, sides)
    inner = ~_grow(~padded, diagonally=True)  # the filter that draws this larger sees one pixel further
    weight = np.zeros(padded.shape, np.float32)
    rest = padded
    half = feather // 2
    while rest.any():
        blurred = _blurred_twice(~_grown(~padded, half + 1) & inner, half) * inner if half else padded
        here = _blurred_twice(_grown(rest, 2 * half + 1), half)
        weight = np.maximum(weight, blurred * here)
        if half == 0:
            break
        rest = rest & ~_grown(blurred > 0.999, 3 * half + 3)
        half //= 2
    result = np.zeros(region.shape, np.float32)
    result[top:bottom, left:right] = weight[around:-around, around:-around]
    return np.where(region & (result > 1e-3), result, np.float32(0))  # nothing but rounding errors is smaller


def _grown(values: np.ndarray, steps: int) -> np.ndarray:
    """(h, w): the largest value within ``steps`` pixels, in octagons, which are nearly circles."""
    for step in range(steps):
        values = _grow(values, diagonally=step % 2 == 1)
    return values


def _grow(values: np.ndarray, diagonally: bool) -> np.ndarray:
    """The largest value of each pixel and its four neighbours, or all eight."""
    padded = np.pad(values, 1, mode="edge")
    across = np.maximum(padded[:, :-2], padded[:, 2:])
    if diagonally:
        across = np.maximum(across, padded[:, 1:-1])
        return np.maximum(np.maximum(across[:-2], across[2:]), across[1:-1])
    down = np.maximum(padded[:-2, 1:-1], padded[2:, 1:-1])
    return np.maximum(np.maximum(across[1:-1], down), values)


def _change(difference: np.ndarray) -> np.ndarray:
    """(H, W): 1 - g, how much of the source's detail the edit has done away with, from its largest change nearby."""
    tone = np.stack([_blurred(_blurred(difference[..., channel], 4), 4) for channel in range(3)], -1)
    structure = _grown(np.abs(difference - tone).max(-1), 3)
    change = _blurred(structure + TONE_SHARE * np.abs(tone).max(-1), 1)
    share = ((change - UNCHANGED) / (CHANGED - UNCHANGED)).clip(0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)  # no edge where it begins and ends


def _blurred(values: np.ndarray, radius: int) -> np.ndarray:
    """(h, w) averaged over squares of 2 ``radius`` + 1, edges repeated."""
    count = 2 * radius + 1
    for _ in range(2):  # down the columns, then across
        sums = np.pad(values, ((radius + 1, radius), (0, 0)), mode="edge").cumsum(0, dtype=np.float64)
        values = ((sums[count:] - sums[:-count]) / count).astype(np.float32).T
    return values


def _blurred_twice(values: np.ndarray, radius: int) -> np.ndarray:
    """Blurred by ``radius`` in two goes, so that no edge is left."""
    return _blurred(_blurred(values.astype(np.float32), radius // 2), radius - radius // 2)


def _drift(difference: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """(H, W, 3): the low-frequency offset of the tone in the ring (bool) along the region's border, spread from there.

    Each pixel's offset is the mean of the ring's, weighted by about the square of one over the distance (Shepard's
    interpolation), as a sum of means over squares of 2, 4, 8 ... pixels. A difference counts the less the larger it is
    beside ``MOST_DRIFT``, and all of them are held against a tenth of belief that there is no drift.
    """
    belief = ring * np.exp(-np.square(np.abs(difference).max(-1) / MOST_DRIFT)).astype(np.float32)
    total = np.full(ring.shape, 1e-12, np.float32)
    offset = np.zeros_like(difference)
    side = 2
    while side <= 2 * max(ring.shape):
        total += _mean_over(belief + np.float32(0.1) * ring, side)
        for channel in range(3):
            offset[..., channel] += _mean_over(belief * difference[..., channel], side)
        side *= 2
    return offset / total[..., None]


def _mean_over(values: np.ndarray, side: int) -> np.ndarray:
    """(h, w) averaged over squares of ``side`` pixels and drawn smoothly again."""
    height, width = values.shape
    down, across = -(-height // side), -(-width // side)
    padded = np.pad(values, ((0, down * side - height), (0, across * side - width)))
    image = Image.fromarray(np.ascontiguousarray(padded)).reduce(side)
    drawn = image.resize((across * side, down * side), Image.Resampling.BILINEAR)
    return np.asarray(drawn)[:height, :width]


# ------------------------------------------------------------------------------------------------ in the picture


def _blend(
    source: SourcePicture,
    canvas: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    placement: Placement,
    limit: np.ndarray | None,
) -> tuple[SourcePicture, Image.Image]:
    """The module's formula, strip by strip; ``canvas`` is D, R, 1 - g and w."""
    difference, unedited, loss, weight = canvas
    mask = Image.new("L", source.size)
    part = _part_with_weight(weight, placement)
    if part is None:
        return source, mask
    left, top, right, bottom = part
    colors = np.empty((bottom - top, right - left, 3), source.color_type)
    most = np.iinfo(colors.dtype).max
    for strip in strips(part):
        w = placement.from_canvas(weight, strip, Image.Resampling.BILINEAR)
        if limit is not None:
            w = np.minimum(w, limit[strip[1] : strip[3], left:right])
        shown = np.where(w > 0, np.maximum(np.round(w * 255), 1), 0).astype(np.uint8)
        mask.paste(Image.fromarray(shown), strip)
        s = source.colors(strip).astype(np.float32)
        change = placement.from_canvas(difference, strip)
        change *= most
        k = placement.from_canvas(loss, strip, Image.Resampling.BILINEAR)
        lost = placement.from_canvas(unedited, strip)
        lost *= -most
        lost += s
        lost *= k[..., None]
        change -= lost
        change *= w[..., None]
        s += change
        colors[strip[1] - top : strip[3] - top] = np.rint(s).clip(0, most)
    return source.with_colors(part, colors), mask


def _part_with_weight(weight: np.ndarray, placement: Placement) -> Box | None:
    """The smallest box in the picture outside which the weight is 0; None where it is 0 everywhere."""
    rows, columns = np.flatnonzero(weight.any(1)), np.flatnonzero(weight.any(0))
    if not len(rows):
        return None
    reach = math.ceil(max(1.0, *placement.scale))  # of the bilinear filter, in canvas pixels
    first, last = (columns[0] - reach, rows[0] - reach), (columns[-1] + 1 + reach, rows[-1] + 1 + reach)
    corners = placement.picture_points([first, last])
    left, top = np.floor(corners[0]).astype(int).tolist()
    right, bottom = np.ceil(corners[1]).astype(int).tolist()
    box = placement.box
    return max(left, box[0]), max(top, box[1]), min(right, box[2]), min(bottom, box[3])
