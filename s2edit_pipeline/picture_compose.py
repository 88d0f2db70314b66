"""An edit put back into the photograph at full resolution.

S is the source at the box's own resolution; E and R, the edit and the reconstruction of the source, come from the
canvas. With D = E - R, what the edit changed, and g in [0, 1], 1 where that is nothing:

    result = S + w (E + g (S - R) - S) = S + w (D - (1 - g)(S - R)),

so that what the autoencoder and the canvas's resolution lost is given back wherever the edit changed nothing. w is 0
outside the region, whose pixels so stay to the bit, and rises to 1 within its border. D is freed before of the tone
that drifted along that border.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from .picture_files import SourcePicture, read_picture
from .picture_modes import Box
from .picture_placement import Placement

UNCHANGED, CHANGED = 0.02, 0.12
"""Differences between edit and reconstruction, of [0, 1]: up to the first the source's detail is given back whole, from
the second on not at all."""

MOST_DRIFT = 0.06
"""More of a difference along the border than this is no drift of the tone, but an edit that goes on beyond it."""

FEATHER_SHARE = 1 / 64
"""The width of the border in which an edit fades in, of the canvas's shorter side."""

SMALL_MASK, LARGE_MASK = 0.001, 0.9
"""Shares of the picture below and above which a mask is seldom what was meant."""

_STRIP_PIXELS = 1 << 19


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
        feather: how far the edit takes to fade in from the region's border, in canvas pixels. None: 1/64 of its
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
    depth = _depth_inside(inside > 0, placement, feather)
    weight = np.minimum(_fade(depth, feather), inside)

    difference = edit - unedited
    difference -= _drift(difference, depth, feather)
    loss = _change(difference)  # 1 - g
    return _blend(source, (difference, unedited, loss, weight), placement, limit)


def mask_warning(mask: Any, name: str = "The mask") -> str | None:
    """The sentence to warn with, about a mask that is seldom what was meant: empty, tiny or nearly everything; else
    None.

    Args:
        mask: (H, W) array or tensor in [0, 1], or PIL "L", of the whole picture.
    """
    values = _plane(mask)
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


def _plane(values: Any) -> np.ndarray:
    """(h, w) float32 in [0, 1] of a mask."""
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L")).astype(np.float32) / 255
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values)
    array = array.reshape(array.shape[-2:]) if array.ndim > 2 and array.size == np.prod(array.shape[-2:]) else array
    if array.ndim != 2:
        raise ValueError(f"A mask must be (H, W), not {array.shape}.")
    return array.astype(np.float32) / (255 if array.dtype == np.uint8 and array.max(initial=0) > 1 else 1)


def _region_on_canvas(region: Any, placement: Placement) -> tuple[np.ndarray | None, np.ndarray]:
    """The region at the picture's own size, if it came so, and on the canvas: (height, width) in [0, 1], 0 around the
    content."""
    width, height = placement.canvas_size
    left, top, right, bottom = placement.content
    content = np.zeros((height, width), np.float32)
    content[top:bottom, left:right] = 1
    if region is None:
        return None, content
    plane = _plane(region)
    across, down = plane.shape[1], plane.shape[0]
    if (across, down) == placement.picture_size and (across, down) != placement.canvas_size:
        return plane, placement.mask_to_canvas(plane)
    if width % across or height % down or width // across != height // down:
        raise ValueError(
            f"The region is {across} x {down}; it must have the picture's size {placement.picture_size}, the canvas's "
            f"{placement.canvas_size}, or that divided by a whole number."
        )
    return None, plane.repeat(height // down, 0).repeat(width // across, 1) * content


def _depth_inside(inside: np.ndarray, placement: Placement, feather: int) -> np.ndarray:
    """(height, width): how many pixels deep each lies in the region, from 1 at its border to ``feather`` + 1, and 0
    outside. The picture's own border is none of the region's."""
    left, top, right, bottom = placement.content
    open_sides = [a == b for a, b in zip(placement.box, (0, 0, *placement.picture_size), strict=True)]
    width = feather + 1
    before_after = [(0, 0), (0, 0)]
    before_after = [(width, width), (width, width)]
    region = np.pad(inside[top:bottom, left:right], before_after)
    for axis, (before, after) in enumerate(((open_sides[1], open_sides[3]), (open_sides[0], open_sides[2]))):
        lines = np.moveaxis(region, axis, 0)
        if before:
            lines[:width] = lines[width]
        if after:
            lines[-width:] = lines[-width - 1]
    layer = Image.fromarray(region.astype(np.uint8) * 255)
    depth = np.zeros(region.shape, np.float32)
    for _ in range(feather + 1):
        depth += np.asarray(layer) > 0
        layer = layer.filter(ImageFilter.MinFilter(3))
    result = np.zeros(inside.shape, np.float32)
    result[top:bottom, left:right] = depth[width:-width, width:-width]
    return result


def _fade(depth: np.ndarray, feather: int) -> np.ndarray:
    """The weight of the edit: 0 in the outermost pixels of the region, 1 from ``feather`` deeper on. Where the region
    is thinner than that it rises faster, so that its middle has the edit too."""
    steps = np.maximum(depth - 1, 0)
    layer = Image.fromarray(steps)
    thickness = steps
    for _ in range(feather):
        layer = Image.fromarray(np.where(depth > 0, _largest_beside(thickness), 0))
        thickness = np.asarray(layer)
    share = np.where(thickness > 0, steps / np.maximum(thickness, 1), 1) * (depth > 0)
    return _smoothstep(share)


def _largest_beside(values: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))).astype(np.float32)


def _smoothstep(share: np.ndarray) -> np.ndarray:
    share = share.clip(0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def _change(difference: np.ndarray) -> np.ndarray:
    """1 - g: how much of the source's detail the edit has done away with, from the largest difference nearby."""
    most = np.abs(difference).max(-1)
    spread = Image.fromarray(most)
    for _ in range(2):
        spread = Image.fromarray(_largest_of_nine(np.asarray(spread)))
    return _smoothstep((_blurred(np.asarray(spread), 1) - UNCHANGED) / (CHANGED - UNCHANGED))


def _largest_of_nine(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _blurred(values: np.ndarray, radius: int) -> np.ndarray:
    """(h, w) averaged over squares of 2 ``radius`` + 1, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(values, [(radius + 1, radius) if axis == a else (0, 0) for a in (0, 1)], mode="edge")
        sums = np.cumsum(padded, axis, dtype=np.float64)
        count = 2 * radius + 1
        values = np.take(sums, range(count, sums.shape[axis]), axis) - np.take(
            sums, range(sums.shape[axis] - count), axis
        )
        values = (values / count).astype(np.float32)
    return values


def _drift(difference: np.ndarray, depth: np.ndarray, feather: int) -> np.ndarray:
    """(H, W, 3): the low-frequency offset of the tone along the region's border, spread inwards.

    Each pixel's offset is the mean of the border's, weighted by about the square of one over the distance (Shepard's
    interpolation), as a sum of means over squares of 2, 4, 8 ... pixels. A difference larger than ``MOST_DRIFT`` counts
    little, and the offset never exceeds it.
    """
    ring = (depth > 0) & (depth <= feather)
    size = np.abs(difference).max(-1)
    belief = ring * np.exp(-((size / MOST_DRIFT) ** 2)).astype(np.float32)
    total = np.full(depth.shape, 1e-6, np.float32)
    offset = np.zeros_like(difference)
    side = 2
    while side <= 2 * max(depth.shape):
        total += _mean_over(belief, side)
        for channel in range(3):
            offset[..., channel] += _mean_over(belief * difference[..., channel], side)
        side *= 2
    offset = (offset / total[..., None]).clip(-MOST_DRIFT, MOST_DRIFT)
    return offset * (depth > 0)[..., None]


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
    colors = source.colors(part).copy()
    most = np.iinfo(colors.dtype).max
    rows = max(1, _STRIP_PIXELS // (right - left))
    for start in range(top, bottom, rows):
        strip = (left, start, right, min(bottom, start + rows))
        w = placement.from_canvas(weight, strip, Image.Resampling.BILINEAR)
        if limit is not None:
            w = np.minimum(w, limit[strip[1] : strip[3], left:right])
        shown = np.where(w > 0, np.maximum(np.round(w * 255), 1), 0).astype(np.uint8)
        mask.paste(Image.fromarray(shown), strip)
        s = colors[start - top : strip[3] - top].astype(np.float32)
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
        colors[start - top : strip[3] - top] = np.rint(s).clip(0, most)
    return source.with_colors(part, colors), mask


def _part_with_weight(weight: np.ndarray, placement: Placement) -> Box | None:
    """The smallest box in the picture outside which the weight is 0; None where it is 0 everywhere."""
    rows, columns = np.flatnonzero(weight.any(1)), np.flatnonzero(weight.any(0))
    if not len(rows):
        return None
    # the bilinear filter reaches one canvas pixel further
    corners = placement.picture_points([(columns[0] - 1, rows[0] - 1), (columns[-1] + 2, rows[-1] + 2)])
    left, top = np.floor(corners[0]).astype(int).tolist()
    right, bottom = np.ceil(corners[1]).astype(int).tolist()
    box = placement.box
    return max(left, box[0]), max(top, box[1]), min(right, box[2]), min(bottom, box[3])
