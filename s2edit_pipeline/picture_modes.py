"""Pictures of every mode as RGB, and new RGB colours put back into a picture of its own mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

MAX_PIXELS = 178_956_970
"""A picture may have so many pixels at most, here as in Pillow: more is refused from the header alone."""

_SAME_AS = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB", "I;16B": "I;16", "I;16L": "I;16", "I;16N": "I;16"}
_STRIP_PIXELS = 1 << 19
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises:
    ValueError: a picture of ``size`` (width, height) has no pixels, or more than ``MAX_PIXELS``.
    """
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}.")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width} x {height}, {width * height / 1e6:,.0f} megapixels; at most "
            f"{MAX_PIXELS / 1e6:,.0f} can be worked on. Make it smaller, or crop it, first."
        )


def strips(box: Box) -> Iterator[Box]:
    """``box`` from top to bottom in pieces that don't take much memory."""
    left, top, right, bottom = box
    rows = max(1, _STRIP_PIXELS // (right - left))
    for start in range(top, bottom, rows):
        yield left, start, right, min(bottom, start + rows)


def plain_mode(image: Image.Image, name: str) -> Image.Image:
    """``image`` in one of the modes that this module knows, nothing of it lost.

    A transparent colour of an RGB or gray picture becomes an alpha channel, premultiplied alpha a straight one.

    Raises:
        ValueError: a mode that has no way to RGB, such as LAB; numbers out of range.
    """
    if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode == "P":
        if "transparency" not in image.info and image.palette is not None and image.palette.mode.endswith("A"):
            return image.convert("RGBA")
        return _palette_picture(image.size, image.tobytes(), image.getpalette() or [], image.info)
    if image.mode in _SAME_AS:
        mode = _SAME_AS[image.mode]
        if mode == "I;16":
            return Image.fromarray(np.asarray(image).astype(np.uint16))
        return image.convert("RGBA").convert(mode) if image.mode == "PA" else image.convert(mode)
    if image.mode not in _PAINTERS:
        raise ValueError(
            f"{name} has the mode {image.mode!r}, which is not read here; convert it: image.convert('RGB')."
        )
    if image.mode in ("I", "F"):
        low, high = float(np.asarray(image).min()), float(np.asarray(image).max())
        if image.mode == "I" and not (low >= 0 and high <= 65535):
            raise ValueError(f"{name} has whole numbers from {low:g} to {high:g}; expected 0 to 255 or 0 to 65535.")
        if image.mode == "F" and not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"{name} is floating point and must lie in [0, 1]; it runs from {low:g} to {high:g}. "
                "Divide by 255, or for [-1, 1] use (image + 1) / 2."
            )
    return image


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The transparency of a picture of a plain mode, "L"; None where all of it is opaque by its kind."""
    return rgba_of(image).getchannel("A") if has_alpha(image) else None


def rgba_of(image: Image.Image) -> Image.Image:
    """A picture of a plain mode as 8-bit RGBA."""
    return image.copy().convert("RGBA")  # of a palette with transparency Pillow changes what it converts


def rgb_of(image: Image.Image) -> Image.Image:
    """A picture of a plain mode as 8-bit RGB: transparency laid on white, 16 bits and [0, 1] scaled."""
    if image.mode == "RGB":
        return image
    if has_alpha(image):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba_of(image)).convert("RGB")
    if image.mode in ("I;16", "I", "F"):
        gray = np.round(deep_gray(image) / np.float32(257)) if is_deep_gray(image) else np.asarray(image)
        image = Image.fromarray(gray.astype(np.uint8))
    return image.convert("RGB")


def is_deep_gray(image: Image.Image) -> bool:
    """Whether a picture of a plain mode is gray with more than 8 bits. Numbers none of which exceeds 255 are 8 bits in
    a wide type."""
    return image.mode == "F" or (image.mode in ("I;16", "I") and int(np.asarray(image).max()) > 255)


def deep_gray(image: Image.Image) -> np.ndarray:
    """(H, W) uint16 of a picture that is so, or of a part of one."""
    values = np.asarray(image)
    return (
        np.round(values.clip(0, 1) * np.float32(65535)).astype(np.uint16)
        if image.mode == "F"
        else values.astype(np.uint16)
    )


def flat_deep(deep: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint16 of (h, w, 3), or of (h, w, 4) laid on white."""
    if deep.shape[-1] == 3:
        return deep
    share = deep[..., 3:].astype(np.float32) / 65535
    return np.round(deep[..., :3] * share + 65535 * (1 - share)).astype(np.uint16)


def paint(image: Image.Image, box: Box, colors: np.ndarray, changed: np.ndarray) -> Image.Image:
    """A copy of ``image`` with new colours in ``box``, in its own mode; what hasn't changed keeps its bits.

    - Alpha stays. A colour under it is such that, laid on white, it is the new one; where nothing shows it stays.
    - Gray takes the new colours' luma.
    - CMYK keeps its black where the new colour allows it.
    - A palette keeps the colours in use; its free places get the most needed new ones, the rest is dithered.
    - One bit is dithered.

    Args:
        image: a picture of a plain mode.
        colors: (h, w, 3) uint8 or uint16, as large as ``box``.
        changed: (h, w) bool.
    """
    result = image.copy()
    if not changed.any():
        return result
    if image.mode == "P":
        return _paint_palette(result, box, colors, changed)
    left, top, right, _ = box
    is_wide = image.mode in ("I;16", "I", "F")
    values = np.array(image) if is_wide else np.empty(0)
    for strip in strips(box):
        rows = slice(strip[1] - top, strip[3] - top)
        patch = np.array(image.crop(strip))
        patch[changed[rows]] = _PAINTERS[image.mode](patch, colors[rows])[changed[rows]]
        if is_wide:
            values[strip[1] : strip[3], left:right] = patch
        elif image.mode == "1":  # numpy shows one bit as bool
            result.paste(Image.fromarray(patch), strip)
        else:
            result.paste(Image.frombytes(image.mode, patch.shape[1::-1], patch.tobytes()), strip)
    if is_wide:
        result = Image.fromarray(values)
        result.info = dict(image.info)
    return result


def paint_deep(deep: np.ndarray, box: Box, colors: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """:func:`paint` for (H, W, 3) or (H, W, 4) uint16."""
    left, top, right, bottom = box
    result = deep.copy()
    patch = result[top:bottom, left:right]
    for strip in strips(box):
        rows = slice(strip[1] - top, strip[3] - top)
        piece, new = patch[rows], colors[rows]
        piece[changed[rows], :3] = (new if deep.shape[-1] == 3 else _straight(piece, new, 65535))[changed[rows]]
    return result


def _eight_bits(colors: np.ndarray) -> np.ndarray:
    if colors.dtype == np.uint8:
        return colors
    return np.round(colors / np.float32(257)).astype(np.uint8)


def _converted(mode: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Pillow's own way from RGB to ``mode``; "1" dithers."""
    return lambda patch, colors: np.asarray(Image.fromarray(_eight_bits(colors)).convert(mode))


def _straight(patch: np.ndarray, colors: np.ndarray, most: int) -> np.ndarray:
    """The colours that, under the patch's alpha and laid on white, are ``colors``: (c - (1 - a)) / a."""
    share = patch[..., -1:].astype(np.float32) / most
    straight = (colors - most * (1 - share)) / np.where(share == 0, 1, share)
    return np.where(share == 0, patch[..., :3], np.round(straight).clip(0, most)).astype(patch.dtype)


def _rgba(patch: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return np.concatenate([_straight(patch, _eight_bits(colors), 255), patch[..., 3:]], -1)


def _gray_alpha(patch: np.ndarray, colors: np.ndarray) -> np.ndarray:
    gray = np.asarray(Image.fromarray(_eight_bits(colors)).convert("L"))[..., None]
    wide = np.concatenate([np.repeat(patch[..., :1], 3, -1), patch[..., 1:]], -1)
    return np.concatenate([_straight(wide, np.repeat(gray, 3, -1), 255)[..., :1], patch[..., 1:]], -1)


def _cmyk(patch: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Pillow reads (255 - C)(255 - K) / 255; this is its inverse with the K of ``patch``, lowered where the colour is
    lighter than that K allows."""
    rgb = _eight_bits(colors).astype(np.float32)
    light = np.maximum(255 - patch[..., 3:].astype(np.float32), rgb.max(-1, keepdims=True))
    ink = 255 - 255 * rgb / np.maximum(light, 1)
    return np.round(np.concatenate([np.where(light == 0, 0, ink), 255 - light], -1)).astype(np.uint8)


def _wide_gray(patch: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Luma for "I;16", "I" and "F": in the colours' own range, but for "F" in [0, 1]."""
    gray = colors.astype(np.float32) @ _LUMA
    if patch.dtype == np.float32:
        return gray / np.float32(np.iinfo(colors.dtype).max)
    return np.round(gray).astype(patch.dtype)


def _paint_palette(result: Image.Image, box: Box, colors: np.ndarray, changed: np.ndarray) -> Image.Image:
    indices = np.array(result)
    patch = indices[box[1] : box[3], box[0] : box[2]]
    palette = np.zeros((256, 3), np.uint8)
    stored = np.array(result.getpalette() or [], np.uint8).reshape(-1, 3)
    palette[: len(stored)] = stored
    opacity = np.full(256, 255)
    transparency = result.info.get("transparency")
    if isinstance(transparency, int):
        opacity[transparency] = 0
    elif transparency is not None:
        opacity[: len(transparency)] = list(transparency)[:256]
    changed = changed & (opacity[patch] == 255)
    if not changed.any():
        return result

    counts = np.bincount(indices.ravel(), minlength=256) - np.bincount(patch[changed], minlength=256)
    free = np.flatnonzero((counts == 0) & (opacity == 255))
    colors = _eight_bits(colors)
    if len(free):
        needed = Image.fromarray(colors[changed][None]).quantize(len(free), Image.Quantize.MEDIANCUT)
        new = np.array(needed.getpalette() or [], np.uint8).reshape(-1, 3)[: len(free)]
        palette[free[: len(new)]] = new
        places = np.concatenate([np.flatnonzero((counts > 0) & (opacity == 255)), free[: len(new)]])
    else:
        places = np.flatnonzero((counts > 0) & (opacity == 255))
    chart = Image.new("P", (1, 1))
    chart.putpalette(palette[places].tobytes())
    nearest = np.asarray(Image.fromarray(colors).quantize(palette=chart, dither=Image.Dither.FLOYDSTEINBERG))
    patch[changed] = places[np.minimum(nearest, len(places) - 1)][changed]
    return _palette_picture(result.size, indices.tobytes(), palette.tobytes(), result.info)


def _palette_picture(
    size: tuple[int, int], indices: bytes, palette: list[int] | bytes, info: Mapping[Any, Any]
) -> Image.Image:
    image = Image.frombytes("P", size, indices)
    image.putpalette(palette)
    image.info = dict(info)
    return image


_PAINTERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "RGB": lambda patch, colors: _eight_bits(colors),
    "RGBA": _rgba,
    "L": _converted("L"),
    "LA": _gray_alpha,
    "1": _converted("1"),
    "P": _rgba,  # never asked: see _paint_palette
    "CMYK": _cmyk,
    "YCbCr": _converted("YCbCr"),
    "HSV": _converted("HSV"),
    "I;16": _wide_gray,
    "I": _wide_gray,
    "F": _wide_gray,
}
